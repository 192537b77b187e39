"""The forms that aim at cosines: of a teacher (gram), of a measured layer (profile)."""

from __future__ import annotations

import itertools

import pytest
import torch
from loss_inputs import condensed, orthonormal, randn, simplex
from torch import Tensor

from decondense.losses import DispersionLoss, dispersion_loss, sum_and_count, vectors

B, T, D, E = 3, 37, 12, 5
MASK = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.3
MASK[1] = False
MASK[1, 4] = True  # one token: no pair
SEGMENTS = (torch.arange(T) * 7 % 3 - 5).expand(B, T).contiguous()
SCOPES = {
    "all": {},
    "mask": {"mask_BT": MASK},
    "segments": {"segments_BT": SEGMENTS, "mask_BT": MASK},
    "groups": {"pairs": "grouped", "group_size": 8, "mask_BT": MASK, "segments_BT": SEGMENTS},
    "subset": {"pairs": "subset", "subset_size": 16, "mask_BT": MASK},
    "batch": {"within": "batch", "mask_BT": MASK},
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that do not divide T, several chunks."""
    monkeypatch.setattr(vectors, "tile_size", lambda n, device: min(n, 16))
    monkeypatch.setattr(vectors, "chunk_rows", lambda rows, n, device: 2)


def states() -> tuple[Tensor, Tensor]:
    z, teacher = randn(B, T, D) + 0.5, randn(B, T, E, seed=7) + 0.2
    z[:, 5] = z[:, 9]
    z[0, 3], teacher[2, 3] = 0, 0
    return z, teacher


def cosines(z_ND: Tensor) -> Tensor:
    """[N, N]; 0 for a zero vector."""
    norm = z_ND.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, z_ND / norm.clamp(min=1e-300), 0.0)
    return unit @ unit.T


def by_hand(z: Tensor, teacher: Tensor, sets: list[tuple[int, list[int]]]) -> Tensor:
    """Mean over sets of tokens (row, places) of the mean over their pairs i != j."""
    values = []
    for row, places in sets:
        off = ~torch.eye(len(places), dtype=torch.bool)
        difference = cosines(z[row, places]) - cosines(teacher[row, places])
        values.append(difference[off].square().mean())
    return torch.stack(values).mean()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("scope", ["all", "mask", "segments"])
def test_gram_is_the_mean_squared_difference_of_the_cosine_matrices(small_tiles: None, impl: str, scope: str) -> None:
    z, teacher = states()
    real = SCOPES[scope].get("mask_BT", torch.ones(B, T, dtype=torch.bool))
    label = SCOPES[scope].get("segments_BT", torch.zeros(B, T, dtype=torch.long))
    sets = [
        (row, places)
        for row, kind in itertools.product(range(B), label.unique().tolist())
        if len(places := [t for t in range(T) if real[row, t] and label[row, t] == kind]) > 1
    ]
    found, expected = (x.clone().requires_grad_() for x in (z, z))
    value = dispersion_loss(found, teacher_BTE=teacher, form="gram", impl=impl, **SCOPES[scope])
    wanted = by_hand(expected, teacher, sets)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-14)
    (value * 3).backward()
    (wanted * 3).backward()
    places = torch.ones(B, T, dtype=torch.bool)
    places[0, 3] = False  # a zero vector feels no force
    torch.testing.assert_close(found.grad[places], expected.grad[places], rtol=1e-10, atol=1e-14)
    assert (found.grad[0, 3] == 0).all()
    assert (found.grad[~real] == 0).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_gram_reference_and_chunked_agree(small_tiles: None, scope: str) -> None:
    z, teacher = states()
    found = []
    for impl in ("reference", "chunked"):
        leaf = z.clone().requires_grad_()
        draws = torch.Generator().manual_seed(1)
        value = dispersion_loss(leaf, teacher_BTE=teacher, form="gram", impl=impl, generator=draws, **SCOPES[scope])
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gram_closed_forms(impl: str) -> None:
    def value(z: Tensor, teacher: Tensor) -> float:
        return dispersion_loss(z[None], teacher_BTE=teacher[None], form="gram", impl=impl).item()

    n = 6
    equal = orthonormal(1, 9).expand(n, 9)
    assert value(orthonormal(n, 8), equal) == pytest.approx(1, abs=1e-12)
    assert value(simplex(n, 8), equal) == pytest.approx((1 + 1 / (n - 1)) ** 2, abs=1e-12)
    assert value(randn(n, 8), 3 * randn(n, 8)) == pytest.approx(0, abs=1e-12)  # another length, the same cosines
    other = torch.tensor([[1.0, 0], [-1.0, 0]], dtype=torch.float64)
    assert value(other, other.abs()) == pytest.approx(4, abs=1e-12)  # the greatest


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("form", ["gram", "profile"])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, form: str, impl: str) -> None:
    monkeypatch.setattr(vectors, "tile_size", lambda n, device: min(n, 4))
    z, teacher = (randn(2, 7, 3) + 0.3).requires_grad_(), randn(2, 7, 4, seed=2)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = False
    extra = {"teacher_BTE": teacher} if form == "gram" else {"target_cosine": 0.4}
    assert torch.autograd.gradcheck(lambda x: dispersion_loss(x, mask, form=form, impl=impl, **extra), (z,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_of_condensed_states_in_low_precision(dtype: torch.dtype) -> None:
    """Cosines of .999 against .998: the difference keeps its digits, because both are made from centred vectors."""
    z, teacher = condensed(2, 40, 16, 0.999).to(dtype), condensed(2, 40, 24, 0.998, seed=5).to(dtype)
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    value = dispersion_loss(leaf, teacher_BTE=teacher, form="gram")
    wanted = by_hand(exact, teacher.double(), [(row, list(range(40))) for row in range(2)])
    (gradient,), (expected,) = torch.autograd.grad(value, leaf), torch.autograd.grad(wanted, exact)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-3)
    error = (gradient.double() - expected).norm() / expected.norm()
    assert error < (1e-3 if dtype == torch.float32 else 1e-2)


def test_gram_a_second_backward_and_a_second_derivative() -> None:
    z, teacher = states()
    z.requires_grad_()
    loss = dispersion_loss(z, teacher_BTE=teacher, form="gram")
    first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_the_teacher_is_not_differentiated() -> None:
    z, teacher = states()
    teacher.requires_grad_()
    total, count = DispersionLoss(form="gram").sum_and_count(z.requires_grad_(), MASK, None, teacher)
    total.backward()
    assert teacher.grad is None
    assert float(count) == 2


def test_teachers_that_do_not_fit() -> None:
    z, teacher = states()
    with pytest.raises(ValueError, match="form 'gram' needs a teacher's states of the same tokens"):
        dispersion_loss(z, form="gram")
    with pytest.raises(ValueError, match="form 'angular' does not use a teacher's states"):
        dispersion_loss(z, teacher_BTE=teacher)
    with pytest.raises(ValueError, match=r"the teacher's states have shape \[3, 36, 5\]"):
        dispersion_loss(z, teacher_BTE=teacher[:, 1:], form="gram")


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_profile_is_zero_at_its_target_alone(impl: str) -> None:
    for z, cosine in ((simplex(6, 8), -1 / 5), (orthonormal(6, 8), 0.0), (orthonormal(1, 8).expand(6, 8), 1.0)):
        for target in (-0.2, 0.3, 1.0):
            value = dispersion_loss(z[None], form="profile", impl=impl, target_cosine=target)
            assert value.item() == pytest.approx((cosine - target) ** 2, abs=1e-14)
    alone, _ = sum_and_count(randn(2, 1, 4), form="profile", impl=impl, target_cosine=0.5)  # no pair
    assert float(alone) == 0
