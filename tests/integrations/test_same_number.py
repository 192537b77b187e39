"""The same four sequences padded, packed and padding-free give one number, whoever trains and whoever logs."""

from __future__ import annotations

import pytest
import torch
from attach_helpers import tiny, tokens

from decondense import CondensationCallback, attach, attach_trainer
from decondense.measuring import CondensationWatch

LENGTHS = (4, 9, 6, 11)
KINDS = ("padded", "packed", "padding-free")


def sequences() -> list[torch.Tensor]:
    return [row[:n] for row, n in zip(tokens(4, max(LENGTHS), seed=8), LENGTHS, strict=True)]


def batch_of(kind: str) -> dict[str, object]:
    """The four sequences as one batch."""
    groups = {"padded": [[0], [1], [2], [3]], "packed": [[0, 3], [1, 2]], "padding-free": [[0, 1, 2, 3]]}[kind]
    rows = [torch.cat([sequences()[i] for i in group]) for group in groups]
    places = [torch.cat([torch.arange(LENGTHS[i]) for i in group]) for group in groups]

    def stack(parts: list[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    batch: dict[str, object] = {"input_ids": stack(rows, 0), "labels": stack(rows, -100)}
    if kind == "padded":
        return {**batch, "attention_mask": stack([torch.ones_like(row) for row in rows], 0)}
    # without a cache transformers keeps the documents of a row apart in attention too
    return {**batch, "position_ids": stack(places, 0), "use_cache": False}


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    """Each sequence in a batch of its own; then the mean."""
    found: list[dict[str, float]] = []
    for ids in sequences():
        model = tiny()
        with attach(model, 0.0) as handle, CondensationWatch(model, every=1) as watch:
            model(input_ids=ids[None], labels=ids[None])
            found.append({**handle.pop(), **watch.step()})
    names = [name for name in found[0] if name.startswith(("dispersion", "condensation/mean_cosine/"))]
    return {name: sum(one[name] for one in found) / len(found) for name in names if name != "dispersion_weight"}


def agree(logged: dict[str, float], expected: dict[str, float], tolerance: float = 1e-6) -> None:
    assert len(expected) == 1 + 3 + 4
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_loop(kind, expected):
    model = tiny()
    with attach(model, 0.1) as handle, CondensationWatch(model, every=1) as watch:
        model(**batch_of(kind)).loss.backward()
        agree({**handle.pop(), **watch.step()}, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_trl(tmp_path, kind, expected):
    pytest.importorskip("trl")
    from test_frameworks import sft_trainer

    settings = {
        "padded": {},
        "packed": {"packing": True, "packing_strategy": "bfd", "max_length": 16},
        "padding-free": {"padding_free": True, "max_length": None},
    }[kind]
    trainer = sft_trainer(tmp_path, per_device_train_batch_size=4, dataset=sequences(), **settings)
    CondensationCallback.add_to(trainer)
    attach_trainer(trainer, 0.1)
    trainer.train()
    agree(trainer.state.log_history[0], expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_lightning(tmp_path, kind, expected):
    lightning = pytest.importorskip("lightning.pytorch")
    from decondense.integrations.lightning import DispersionCallback
    from decondense.measuring import lightning_callback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny()

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        callbacks=[DispersionCallback(0.1), lightning_callback(every=1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader([batch_of(kind)], batch_size=None))
    agree({name: float(value) for name, value in trainer.logged_metrics.items()}, expected)
