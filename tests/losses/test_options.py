"""LossConfig: the registry, the typed keywords, ranges, and every combination, valid or refused when it is read."""

from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from loss_inputs import randn
from pydantic import ValidationError

import decondense.losses.forms as form_files
from decondense import attach
from decondense.config import (
    COMPAT_NAMES,
    FORM_NAMES,
    CallOptions,
    ConfigError,
    DispersionConfig,
    LossConfig,
    LossOptions,
    StudyConfig,
)
from decondense.losses import COMPAT, FORMS, DispersionLoss, dispersion_loss, sum_and_count
from decondense.losses.engine import choose
from decondense.losses.forms import form_of

Z = randn(2, 5, 4)


def test_a_form_is_a_registry_entry_and_a_file() -> None:
    files = {path.stem for path in Path(form_files.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(FORMS) == set(FORM_NAMES)
    assert set(COMPAT_NAMES) == set(COMPAT)
    for name, info in FORMS.items():
        s = LossConfig(form=name)
        form = form_of(s)
        assert (info.kind == "pairs") == (form.pair_form is not None), name
        assert info.tiled == (form.pair_form is not None or form.per_segment is not None), name
        assert info.random == (form.draw is not None), name
        assert info.fused == (form.pair_form is not None and form.pair_form(s).kernel() is not None), name
        assert (info.kind == "features") == (info.cost != "pairs"), name
        if form.pair_form is not None:
            assert form.pair_form(s).diagonal == s.diagonal, name


def test_the_typed_keywords_are_the_fields() -> None:
    fields = {name: field.annotation for name, field in LossConfig.model_fields.items()}
    assert get_type_hints(LossOptions) == fields
    assert get_type_hints(CallOptions) == {name: kind for name, kind in fields.items() if name != "seed"}
    for function in (dispersion_loss, sum_and_count, DispersionLoss):
        shown = inspect.signature(function).parameters
        for name, field in LossConfig.model_fields.items():
            if name != "seed" or function is DispersionLoss:
                assert shown[name].default == field.default


@pytest.mark.parametrize("name", [name for name, f in LossConfig.model_fields.items() if f.annotation is float])
def test_numbers_that_are_none_are_refused(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf, -1 - 1e-9):
        with pytest.raises(ValidationError, match=name):
            LossConfig.model_validate({name: value})


def test_every_combination_is_computed_or_refused_when_it_is_read() -> None:
    refused = 0
    for form, pairs, compat, within, impl in itertools.product(
        FORMS,
        ("all", "grouped", "subset"),
        (None, *COMPAT),
        ("sequence", "batch", "world"),
        ("auto", "reference", "chunked"),
    ):
        options = {"form": form, "pairs": pairs, "compat": compat, "within": within, "impl": impl}
        options |= {"group_size": 3, "subset_size": 4, "slices": 4}
        try:
            LossConfig.model_validate(options)
        except ValidationError:
            refused += 1
            with pytest.raises(ConfigError, match=f"{form!r}"):
                StudyConfig.parse(
                    {"name": "s", "arms": {"a": {}, "b": {"dispersion": {"loss": options}}}}, where="study.yaml"
                )
            continue
        teacher = {"teacher_BTE": Z} if FORMS[form].teacher else {}
        assert dispersion_loss(Z, **teacher, generator=torch.Generator().manual_seed(0), **options).isfinite(), options
    # 3 combinations of pairs x 3 of within x 3 of impl for each of 11 forms without compat and 2 names, and so on
    assert refused == sum(
        1
        for info in FORMS.values()
        for pairs, compat, impl in itertools.product("agS", (None, *COMPAT), ("auto", "reference", "chunked"))
        for within in "sbw"
        if (pairs == "g" and info.kind == "features")
        or (within != "s" and info.ordered)
        or (compat and not info.compat)
        or (impl == "chunked" and not info.tiled)
    )


@pytest.mark.parametrize("form", FORMS)
def test_fused_is_refused_when_read_where_there_is_no_kernel(form: str) -> None:
    if FORMS[form].fused:
        LossConfig(form=form, impl="fused")
        with pytest.raises(ValidationError, match="'fused' does not cover compat"):
            LossConfig(form="angular", impl="fused", compat=next(iter(COMPAT)))
    else:
        with pytest.raises(ValidationError, match=f"'fused' does not cover form '{form}', only angular"):
            LossConfig(form=form, impl="fused")


def test_auto_takes_what_the_form_has() -> None:
    z = Z.float()
    for form, info in FORMS.items():
        assert choose(LossConfig(form=form), z) == ("chunked" if info.tiled else "reference")
    with pytest.raises(ValidationError, match="'chunked' does not cover form 'perplexity_entropy'"):
        LossConfig(form="perplexity_entropy", impl="chunked")


def test_one_seed_and_old_files_with_two() -> None:
    assert DispersionConfig.parse({"loss": {"seed": 5}}, where="x").seed == 5
    # the outer seed was the one that counted
    old = {"weight": 0.2, "seed": 7, "loss": {"form": "hinge", "seed": 5}}
    config = DispersionConfig.parse(old, where="x")
    assert config.loss.seed == config.seed == 7
    assert config.loss.form == "hinge"
    assert DispersionConfig.parse({"seed": 7, "loss": LossConfig(tau=0.5)}, where="x").loss == LossConfig(
        tau=0.5, seed=7
    )
    assert DispersionConfig.parse({"seed": 7}, where="x") == DispersionConfig.parse({"loss": {"seed": 7}}, where="x")
    assert "seed" not in config.model_dump()
    for wrong in ({"seed": "seven"}, {"loss": 3, "seed": 1}, {"sed": 1}):
        with pytest.raises(ConfigError):
            DispersionConfig.parse(wrong, where="x")


class _Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds.square().mean()


def test_the_seed_of_attach_is_the_seed_that_draws() -> None:
    values = {}
    for seed in (0, 1):
        for way in ("keyword", "config"):
            torch.manual_seed(0)
            model = _Tiny()
            if way == "keyword":
                handle = attach(model, blocks="layers", pairs="subset", subset_size=3, seed=seed)
            else:
                loss = LossConfig(pairs="subset", subset_size=3, seed=seed)
                handle = attach(model, config=DispersionConfig(loss=loss, blocks="layers"))
            assert handle.config.loss.seed == seed
            values[seed, way] = model(randn(2, 12, 4).float()).item()
    assert values[0, "keyword"] == values[0, "config"] != values[1, "keyword"] == values[1, "config"]
