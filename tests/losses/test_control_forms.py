"""Centring, straightness and VISReg against definitions written out in float64, and what each of them must not do."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from loss_inputs import condensed, orthonormal, randn, simplex
from torch import Tensor

from decondense.losses import FORMS, dispersion_loss

B, T, D = 3, 23, 7
MASK = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.3
MASK[1] = False
MASK[1, 4] = True  # one token: no pair
SEGMENTS = (torch.arange(T) * 7 % 3 - 5).expand(B, T).contiguous()  # documents in pieces
SCOPES = {
    "all": {},
    "mask": {"mask_BT": MASK},
    "segments": {"segments_BT": SEGMENTS, "mask_BT": MASK},
}
IMPLS = ["reference", "chunked"]


def documents(scope: str) -> list[tuple[int, list[int]]]:
    """Row and places of the real tokens of every sequence or document of two tokens or more."""
    real = SCOPES[scope].get("mask_BT", torch.ones(B, T, dtype=torch.bool))
    label = SCOPES[scope].get("segments_BT", torch.zeros(B, T, dtype=torch.long))
    found = [
        (row, [t for t in range(T) if real[row, t] and label[row, t] == kind])
        for row in range(B)
        for kind in label.unique().tolist()
    ]
    return [(row, places) for row, places in found if len(places) > 1]


def centring(z_ND: Tensor) -> Tensor:
    return z_ND.mean(0).square().sum() / z_ND.square().sum(1).mean().detach()


def straightness(z_ND: Tensor) -> Tensor:
    bends = []
    for before, here, after in zip(z_ND, z_ND[1:], z_ND[2:], strict=False):
        a, b = here - before, after - here
        bends.append(1 - a @ b / (a.norm() * b.norm()))
    return torch.stack(bends).mean() if bends else z_ND.sum() * 0.0


def directions(slices: int) -> Tensor:
    drawn = torch.randn(D, slices, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def visreg(z_ND: Tensor) -> Tensor:
    n, normal = len(z_ND), NormalDist()
    mean = z_ND.mean(0)
    sd = (z_ND - mean).square().mean(0).sqrt()
    quantiles = torch.tensor([normal.inv_cdf((i + 0.5) / n) for i in range(n)], dtype=torch.float64)
    y = ((z_ND - mean) / sd.detach()) @ directions(5)
    shape = torch.stack([(y[:, m].sort().values - quantiles).square().mean() for m in range(5)]).mean()
    return (1 - sd).square().mean() + shape + mean.square().mean()


BY_HAND = {"centring": centring, "straightness": straightness, "visreg": visreg}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", BY_HAND)
def test_value_and_gradient_are_those_written_out(form: str, scope: str, impl: str) -> None:
    z = randn(B, T, D) * 1.3 + 0.4
    found, expected = z.clone().requires_grad_(), z.clone().requires_grad_()
    draws = torch.Generator().manual_seed(1)
    value = dispersion_loss(found, form=form, impl=impl, slices=5, generator=draws, **SCOPES[scope])
    sets = documents(scope)
    wanted = torch.stack([BY_HAND[form](expected[row, places]) for row, places in sets]).mean()
    assert len(sets) > 1
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
    (value * 3).backward()
    (wanted * 3).backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-14)


def gradient(z: Tensor, **options: object) -> Tensor:
    z = z.clone().requires_grad_()
    dispersion_loss(z, generator=torch.Generator().manual_seed(1), **options).backward()
    assert z.grad is not None
    return z.grad


def test_centring_shifts_all_tokens_alike_and_the_mean_cosine_does_not() -> None:
    z = condensed(2, 20, 8, 0.9)
    shift = gradient(z, form="centring")
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=1e-12, atol=0)
    assert (torch.linalg.vecdot(shift[:, 0], z.mean(1)) > 0).all()  # against the mean, when lowered
    turned = gradient(z, form="mean_cosine")
    torch.testing.assert_close(torch.linalg.vecdot(turned, z), torch.zeros(2, 20, dtype=z.dtype), rtol=0, atol=1e-12)
    assert (turned - turned[:, :1]).norm() > 0.1 * turned.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_closed_forms(impl: str) -> None:
    def value(z: Tensor, form: str) -> float:
        draws = torch.Generator().manual_seed(1)
        return dispersion_loss(z[None], form=form, impl=impl, generator=draws).item()

    n = 6
    equal, line = orthonormal(1, 8).expand(n, 8), torch.arange(n)[:, None] * randn(1, 8) + 3
    assert value(equal, "centring") == pytest.approx(1)
    assert value(simplex(n, 8), "centring") == pytest.approx(0, abs=1e-12)
    assert value(orthonormal(n, 8), "centring") == pytest.approx(1 / n)
    assert value(line, "straightness") == pytest.approx(0, abs=1e-12)
    assert value(line[[0, 1] * 3], "straightness") == pytest.approx(2)
    assert value(equal, "straightness") == pytest.approx(1)
    assert value(orthonormal(n, 8), "straightness") == pytest.approx(1.5)  # 120 degrees between e2 - e1 and e3 - e2
    assert value(line[:2], "straightness") == 0
    assert value(randn(4000, 4), "visreg") < 0.01
    assert value(5 * randn(400, 4), "visreg") == pytest.approx(16, rel=0.1)
    assert value(randn(400, 4) + 2, "visreg") == pytest.approx(4, rel=0.1)


def test_visreg_pushes_where_sigreg_has_stopped() -> None:
    cloud = randn(1, 40, 6)
    norms = {
        form: [gradient(spread * cloud, form=form).norm().item() for spread in (1e-2, 1e-3)]
        for form in ("visreg", "sigreg")
    }
    assert norms["sigreg"][1] < 0.2 * norms["sigreg"][0]
    assert norms["visreg"][1] > norms["visreg"][0]


@pytest.mark.parametrize("form", BY_HAND)
def test_collapsed_states_give_finite_gradients(form: str) -> None:
    for z in (torch.zeros(2, 9, 4), torch.ones(2, 9, 4), 1e-20 * randn(2, 9, 4).float(), 1e4 * randn(2, 9, 4).half()):
        assert gradient(z, form=form).isfinite().all()


def test_what_is_held_is_named_and_only_there() -> None:
    for name, info in FORMS.items():
        if info.teacher:
            continue
        z = (randn(1, 6, 3) + 0.3).requires_grad_()
        options = {"form": name, "impl": "reference", "slices": 4}

        def loss(x: Tensor, options: dict[str, object] = options) -> Tensor:
            return dispersion_loss(x, generator=torch.Generator().manual_seed(2), **options)

        (own,) = torch.autograd.grad(loss(z), z)
        step = 1e-6 * randn(1, 6, 3, seed=9)
        slope = (loss(z.detach() + step) - loss(z.detach() - step)).item() / 2
        exact = math.isclose(float((own * step).sum()), slope, rel_tol=1e-3, abs_tol=1e-12)
        assert exact == (not info.held), name


def test_order_is_kept_within_a_sequence_alone() -> None:
    for within in ("batch", "world"):
        with pytest.raises(ValueError, match=f"needs the tokens of one sequence.*not '{within}'"):
            dispersion_loss(randn(2, 5, 4), form="straightness", within=within)
    with pytest.raises(ValueError, match="no pairs to group"):
        dispersion_loss(randn(2, 5, 4), form="straightness", pairs="grouped")
