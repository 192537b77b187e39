"""Errors, repr, copies, autocast, torch.compile, derivatives of derivatives, generators."""

from __future__ import annotations

import copy
import doctest
import pickle

import pytest
import torch
from loss_inputs import ALONE, randn

import decondense.losses as losses
from decondense.config import LossConfig
from decondense.losses import FORMS, DispersionLoss, dispersion_loss, sum_and_count

Z = randn(2, 7, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dispersion_loss(Z[0]), r"\[batch, tokens, features\], got \[7, 6\]; .*unsqueeze"),
        (lambda: dispersion_loss(Z.long()), "floating point, got torch.int64"),
        (lambda: dispersion_loss(Z[..., :1]), "1 feature"),
        (lambda: dispersion_loss([[1.0]]), "must be a tensor, got list"),
        (lambda: dispersion_loss(Z, torch.ones(2, 6)), r"mask has shape \[2, 6\].*\[2, 7\]"),
        (lambda: dispersion_loss(Z, segments_BT=torch.ones(7, dtype=torch.long)), r"segments has shape \[7\]"),
        (lambda: dispersion_loss(Z, segments_BT=torch.ones(2, 7)), "segments must be integers"),
        (lambda: dispersion_loss(Z, form="angulra"), "unknown form 'angulra'. Did you mean 'angular'"),
        (lambda: DispersionLoss(form="angulra"), "unknown form 'angulra'. Did you mean 'angular'"),
        (lambda: DispersionLoss(tua=0.3), "unknown key 'tua'.*Did you mean 'tau'"),
        (lambda: dispersion_loss(Z, tau=0.0), "tau: .*greater than 0 .got 0.0"),
        (lambda: dispersion_loss(Z, tau=float("nan")), "tau: .*finite number .got nan"),
        (lambda: dispersion_loss(Z, delta=1.0), "delta: .*less than 1 .got 1.0"),
        (lambda: dispersion_loss(Z, impl="chunky"), "impl: .*got 'chunky'.*Did you mean 'chunked'"),
        (lambda: dispersion_loss(Z, pairs="group"), "pairs: .*got 'group'.*Did you mean 'grouped'"),
        (lambda: dispersion_loss(Z, within="word"), "Did you mean 'world'"),
        (lambda: dispersion_loss(Z, pairs="grouped"), "never uses the global generator: pass generator="),
        (lambda: dispersion_loss(Z, form="sigreg"), "form 'sigreg' draws random numbers"),
        (lambda: dispersion_loss(Z, pairs="grouped", seed=3), r"pass generator=.*DispersionLoss\(seed"),
        (lambda: dispersion_loss(Z, pairs="grouped", group_size=1), "group_size: .*2 .got 1"),
        (lambda: DispersionLoss(form="mean_cosine", pairs="grouped"), "'mean_cosine' has no pairs to group"),
        (lambda: dispersion_loss(Z, impl="fused"), "impl='fused' covers .*float64"),
        (
            lambda: dispersion_loss(Z.float(), impl="fused", form="koleo"),
            "'fused' does not cover form 'koleo', only angular",
        ),
        (
            lambda: dispersion_loss(Z, within="batch", segments_BT=torch.ones(2, 7, dtype=torch.long)),
            "pass only one",
        ),
    ],
)
def test_errors_name_the_thing_the_value_and_the_remedy(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_form_describes_itself() -> None:
    for name, info in FORMS.items():
        assert info.name == name
        assert info.equation
        assert info.source
        assert info.extremes
        assert set(info.uses) <= set(LossConfig.model_fields)
        assert set(info.defaults) <= set(info.uses)
        DispersionLoss(form=name, **info.defaults)


def test_the_parameters_a_form_says_it_uses_are_the_ones_that_matter() -> None:
    other = {
        "tau": 0.5,
        "delta": 0.3,
        "margin": 0.1,
        "norm_weight": 0.7,
        "variance_weight": 3.0,
        "covariance_weight": 5.0,
        "target_std": 4.0,
        "target_cosine": 0.2,
        "slices": 7,
        "knots": 5,
    }
    for name in ALONE:
        info = FORMS[name]
        base = dispersion_loss(Z, form=name, generator=torch.Generator().manual_seed(0))
        for parameter, value in other.items():
            changed = dispersion_loss(Z, form=name, generator=torch.Generator().manual_seed(0), **{parameter: value})
            assert (changed != base).item() == (parameter in info.uses), (name, parameter)


def test_module_is_function() -> None:
    module = DispersionLoss(form="uniformity", tau=0.3)
    assert module(Z) == dispersion_loss(Z, form="uniformity", tau=0.3)
    total, count = module.sum_and_count(Z)
    assert count == 2
    assert total == sum_and_count(Z, form="uniformity", tau=0.3)[0]
    assert repr(module) == "DispersionLoss(form='uniformity', tau=0.3)"
    assert repr(DispersionLoss.from_config(LossConfig(pairs="grouped", impl="chunked"))) == (
        "DispersionLoss(form='angular', tau=1.0, delta=0.001, impl='chunked', pairs='grouped')"
    )
    assert not list(module.parameters())
    assert not module.state_dict()


def test_copies_draw_what_the_original_would() -> None:
    module = DispersionLoss(pairs="grouped", group_size=2, seed=3)
    module(Z)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.generator.set_state(module.generator.get_state())
        assert twin(Z) == copy.deepcopy(module)(Z)
    fresh = DispersionLoss(pairs="grouped", group_size=2, seed=4)
    assert [fresh(Z).item() for _ in range(3)] != [DispersionLoss(pairs="grouped", group_size=2)(Z).item()] * 3


def test_the_global_generator_is_never_touched() -> None:
    before = torch.get_rng_state()
    for keywords in ({"pairs": "grouped", "group_size": 2}, {"pairs": "subset", "subset_size": 3}, {"form": "sigreg"}):
        DispersionLoss(**keywords)(Z)
    assert torch.equal(before, torch.get_rng_state())


def test_a_subset_takes_the_same_positions_of_every_sequence() -> None:
    z = randn(1, 30, 4).expand(3, 30, 4).clone().requires_grad_()
    dispersion_loss(z, pairs="subset", subset_size=8, generator=torch.Generator().manual_seed(0)).backward()
    touched = (z.grad != 0).any(dim=-1)
    assert (touched.sum(dim=1) == 8).all()
    assert (touched == touched[0]).all()


@pytest.mark.parametrize("form", ALONE)
def test_autocast_changes_nothing(form: str) -> None:
    z = Z.float()
    draws = torch.Generator
    plain = dispersion_loss(z, form=form, generator=draws().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dispersion_loss(z, form=form, generator=draws().manual_seed(0))
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)


# visreg's gradient and the reference's are plain autograd, whose products a backward inside autocast rounds
@pytest.mark.parametrize("form", [name for name in ALONE if FORMS[name].tiled and name != "visreg"])
@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("tau", [1.0, 0.004])  # the small one is summed with a running maximum
def test_a_backward_inside_autocast_changes_nothing(form: str, gradient: str, tau: float) -> None:
    found = []
    for inside in (False, True):
        z = Z.float().requires_grad_()
        options = {"tau": tau} if "tau" in FORMS[form].uses else {}
        draws = torch.Generator().manual_seed(0)
        value = dispersion_loss(z, form=form, impl="chunked", gradient=gradient, generator=draws, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            value.backward()
        found.append(z.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("form", [name for name in ALONE if FORMS[name].kind != "features" and FORMS[name].tiled])
def test_a_second_derivative_raises_or_is_right(form: str) -> None:
    z = Z.clone().requires_grad_()
    if form != "koleo":  # whose gradient is plain autograd once the partners are known
        with pytest.raises(RuntimeError, match=r"differentiated only once: .* use impl='reference'"):
            torch.autograd.grad(dispersion_loss(z, form=form, impl="chunked"), z, create_graph=True)
    if form in ("angular", "l2_repel", "cosine_infonce"):
        smooth = (lambda x: dispersion_loss(x, form=form, impl="reference"),)
        assert torch.autograd.gradgradcheck(smooth[0], (z[:1, :4].detach().requires_grad_(),))


@pytest.mark.parametrize(
    ("form", "gradient"),
    [("angular", "forward"), ("angular", "recompute"), ("orthogonalization", "recompute"), ("hinge", "forward")],
)
def test_fullgraph_compile(form: str, gradient: str) -> None:
    torch._dynamo.reset()
    module = DispersionLoss(form=form, gradient=gradient)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)

    def step(z: torch.Tensor) -> torch.Tensor:
        return module(torch.tanh(z), mask) + module(torch.tanh(z), None, segments)

    eager, compiled = Z.float().requires_grad_(), Z.float().requires_grad_()
    expected = step(eager)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    from decondense.losses.operator import _pair_sums

    z = Z.float().requires_grad_()
    arguments = (z, None, None, "angular", [1.0, 1e-3], None, "chunked", True)
    torch.library.opcheck(_pair_sums, arguments, test_utils=("test_schema", "test_faketensor"))
    eager = sum_and_count(z)[0]
    (expected,) = torch.autograd.grad(eager, z)
    sums = _pair_sums(*arguments)[0]
    (actual,) = torch.autograd.grad((sums.sum(dim=1).log()).sum(), z, create_graph=False)
    torch.testing.assert_close(actual, expected)
    loss = _pair_sums(*arguments)[0].sum(dim=1).log().sum()
    with pytest.raises(RuntimeError, match="impl='reference'"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_the_module_docstring_runs() -> None:
    assert doctest.testmod(losses).failed == 0
    assert doctest.testmod(losses).attempted > 0


def test_it_disperses() -> None:
    """The gradient points the right way: descending any form lowers the mean cosine of condensed directions."""
    for form in ("angular", "orthogonalization", "cosine_infonce", "hinge", "mean_cosine", "uniformity", "koleo"):
        z = (randn(1, 16, 8) + 2.0).requires_grad_()
        before = dispersion_loss(z, form="mean_cosine").item()
        step = torch.optim.Adam([z], lr=0.05)
        for _ in range(40):
            step.zero_grad()
            dispersion_loss(z, form=form).backward()
            step.step()
        assert dispersion_loss(z, form="mean_cosine").item() < before - 0.2, form
