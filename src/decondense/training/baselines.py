r"""The treatments that dispersion loss is compared with (Liu et al. 2026, arXiv:2602.00217, table 2 and figure 5).

Those that draw random numbers are Trainer callbacks that draw from generators of their own, named after the seed, the
purpose and the optimizer step: the order of the data and the dropout of a run stay those of its pair, and a resumed run
draws what it would have drawn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from decondense.checkpoints import ModelError
from decondense.config import ActiveForgettingConfig, ConfigError, DistillationConfig, NoisyEmbeddingConfig
from decondense.models import load_model
from decondense.seeding import generator


class NoisyEmbedding(TrainerCallback):
    r"""Uniform noise on the token embeddings while training (NEFTune, Jain et al. 2023, arXiv:2310.05914).

    .. math:: x \leftarrow x + u, \quad u \sim \mathrm{Uniform}(-a, a), \quad a = \alpha / \sqrt{S H}

    for S tokens of a sequence and H features. Nothing is added outside of training mode.
    """

    def __init__(self, model: PreTrainedModel, config: NoisyEmbeddingConfig, seed: int, rank: int = 0) -> None:
        self.config, self.seed, self.rank = config, seed, rank
        self._generator: torch.Generator | None = None
        self._step = 0
        self._hook = model.get_input_embeddings().register_forward_hook(self._add)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A generator for this step; its micro-batches draw from it one after the other."""
        self._generator, self._step = None, state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was found."""
        self._hook.remove()

    def _add(self, module: nn.Module, inputs: Any, embedded_BTH: Tensor) -> Tensor:
        if not module.training or not torch.is_grad_enabled():
            return embedded_BTH
        if self._generator is None:
            # ranks see different sequences, so their noise must differ too
            self._generator = generator(
                self.seed, f"noisy embedding, rank {self.rank}", self._step, embedded_BTH.device
            )
        tokens, features = embedded_BTH.shape[-2:]
        bound = self.config.alpha / math.sqrt(tokens * features)
        noise = torch.empty_like(embedded_BTH).uniform_(-bound, bound, generator=self._generator)
        return embedded_BTH + noise


class ActiveForgetting(TrainerCallback):
    r"""Forget the input embedding every K optimizer steps (Chen et al. 2023, arXiv:2307.01163).

    After steps K, 2K, ... (never after the last one) the embedding is drawn anew from :math:`N(0, \sigma^2)`, the
    padding row is zeroed and the embedding's Adam state is cleared. The embedding has a learning rate of its own,
    which rises and falls once in every period; everything else follows the run's schedule.

    Where input and output embedding are one tensor (GPT-2), the output embedding is forgotten with it, and the arm
    pays for that too.
    """

    def __init__(self, model: PreTrainedModel, config: ActiveForgettingConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        self.weight: Tensor = weight
        if type(self.weight).__name__ == "DTensor":
            raise ConfigError("active forgetting needs whole parameters: use one process or DDP instead of FSDP.")
        self.padding = getattr(model.config, "pad_token_id", None)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Forget, if a period has ended and training goes on."""
        if state.global_step % self.config.every or state.global_step >= state.max_steps:
            return
        with torch.no_grad():
            fresh = torch.empty(self.weight.shape, dtype=torch.float32)
            fresh.normal_(0.0, self.config.std, generator=generator(self.seed, "active forgetting", state.global_step))
            if self.padding is not None:
                fresh[self.padding] = 0.0
            self.weight.copy_(fresh)
        for holder in (optimizer, getattr(optimizer, "optimizer", None)):
            if holder is not None and self.weight in holder.state:
                for value in holder.state[self.weight].values():
                    if torch.is_tensor(value):
                        value.zero_()
                break

    def factor(self, step: int) -> float:
        """The embedding's learning-rate factor: up over the warm-up, then down to 0, once in every period."""
        position = (step % self.config.every) / self.config.every
        if position < self.config.warmup:
            return (position * self.config.every + 1) / (self.config.warmup * self.config.every + 1)
        return (1 - position) / (1 - self.config.warmup)


class Teacher:
    r"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531) from a frozen larger model.

    .. math:: L_\mathrm{KD} = -T^2 \sum_a p_a \log q_a, \quad
              p = \mathrm{softmax}(\text{teacher}/T), \; q = \mathrm{softmax}(\text{student}/T)

    averaged over the predicted tokens: the cross-entropy with the teacher's softened prediction, which has the
    gradient of the Kullback-Leibler divergence (paper, section on distillation, figure 5). The teacher is in
    evaluation mode, without gradients, in bfloat16 on a GPU.

    Raises:
        ConfigError: the teacher cannot be loaded, or its tokenizer is not the student's.
    """

    def __init__(self, config: DistillationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        try:
            teacher, theirs = load_model(config.teacher, revision=config.revision, head="causal", dtype=dtype)
        except ModelError as error:
            raise ConfigError(f"distillation.teacher {config.teacher!r} cannot be loaded: {error}") from error
        if theirs is None:
            raise ConfigError(f"distillation.teacher {config.teacher!r} comes without a tokenizer to compare.")
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"distillation.teacher {config.teacher!r} has another tokenizer than the student (vocabularies of "
                f"{len(theirs)} and {len(tokenizer)} entries): their predictions are not over the same tokens. "
                "Train both on one corpus with one vocabulary."
            )
        self.model = teacher.train(False).requires_grad_(False)

    def loss(self, input_ids_BT: Tensor, student_BTV: Tensor) -> Tensor:
        """Mean over the predicted tokens of the distillation loss, in float32 nats."""
        if self.model.device != input_ids_BT.device:
            self.model.to(input_ids_BT.device)
        heat = self.config.temperature
        with torch.no_grad():
            teacher_BTV = self.model(input_ids=input_ids_BT).logits
        # a teacher may have rows beyond the tokenizer's entries, to fill a multiple of 64
        size = min(teacher_BTV.shape[-1], student_BTV.shape[-1])
        p = (teacher_BTV[:, :-1, :size].float() / heat).softmax(-1)
        q = (student_BTV[:, :-1, :size].float() / heat).log_softmax(-1)
        loss: Tensor = (p * q).sum(-1).mean() * -(heat**2)
        return loss


def own_group(optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
    """Move one parameter into the optimizer's last group, with the settings of the group that it came from."""
    for group in optimizer.param_groups:
        kept = [parameter for parameter in group["params"] if parameter is not weight]
        if len(kept) < len(group["params"]):
            group["params"] = kept
            optimizer.add_param_group(
                {**{key: value for key, value in group.items() if key != "params"}, "params": [weight]}
            )
            return
    raise AssertionError("the embedding is a parameter of the optimizer")


def split_schedule(scheduler: LambdaLR, forgetting: ActiveForgetting) -> LambdaLR:
    """The same schedule for every group but the last, which follows the forgetting's periods."""
    optimizer = scheduler.optimizer
    lambdas = [*scheduler.lr_lambdas[: len(optimizer.param_groups) - 1], forgetting.factor]
    return LambdaLR(optimizer, lambdas)
