"""{reference} = {chunked}, for every form, scope of pairs and way to the gradient; gradcheck of both."""

from __future__ import annotations

import itertools

import pytest
import torch
from loss_inputs import ALONE, randn
from torch import Tensor

from decondense.losses import FORMS, dispersion_loss, sum_and_count, vectors

B, T, D = 3, 37, 12


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that do not divide T, several chunks: every branch of the sweep on small inputs."""
    monkeypatch.setattr(vectors, "tile_size", lambda n, device: min(n, 16))
    monkeypatch.setattr(vectors, "chunk_rows", lambda rows, n, device: 2)


def make_input() -> Tensor:
    z = randn(B, T, D) + 0.5
    z[:, 5] = z[:, 9]
    z[0, 3] = 0
    return z


def tied(gradient: Tensor, form: str) -> Tensor:
    """The gradient with the two equal tokens taken together where only the nearest token is pushed, or ranks count.

    Which of two equal tokens is nearest to a third one is decided by the rounding of the processor's matrix product;
    both choices are subgradients, and agree in all but the place.
    """
    if form not in ("koleo", "visreg"):
        return gradient
    gradient = gradient.clone()
    gradient[:, 5] += gradient[:, 9]
    gradient[:, 9] = 0
    return gradient


def make_mask() -> Tensor:
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[1] = False
    mask[1, 4] = True  # one token: no pair
    return mask


TILED = [name for name in ALONE if FORMS[name].tiled]
IMPLEMENTED = [  # what is held constant in the gradient has tests of its own
    (name, impl)
    for name in ALONE
    if not FORMS[name].held
    for impl in ("reference", "chunked")
    if impl in FORMS[name].implementations
]
SEGMENTS = (torch.arange(T) // 10).expand(B, T).contiguous()
SCRAMBLED = (torch.arange(T) * 7 % 3 - 5).expand(B, T).contiguous()

SCOPES = {
    "all": {},
    "mask": {"mask_BT": make_mask()},
    "segments": {"segments_BT": SEGMENTS},
    "scrambled segments": {"segments_BT": SCRAMBLED, "mask_BT": make_mask()},
    "groups": {"pairs": "grouped", "group_size": 8, "mask_BT": make_mask()},
    "groups of segments": {"pairs": "grouped", "group_size": 8, "mask_BT": make_mask(), "segments_BT": SEGMENTS},
    "subset": {"pairs": "subset", "subset_size": 16, "mask_BT": make_mask()},
    "batch": {"within": "batch", "mask_BT": make_mask()},
    "recompute": {"gradient": "recompute", "mask_BT": make_mask()},
}


def value_and_gradient(z: Tensor, **keywords: object) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = dispersion_loss(z, generator=torch.Generator().manual_seed(1), **keywords)
    value.backward()
    assert z.grad is not None
    return value.detach(), z.grad


@pytest.mark.parametrize(
    ("form", "scope"),
    [
        (form, scope)
        for form, scope in itertools.product(TILED, SCOPES)
        if (SCOPES[scope].get("pairs") != "grouped" or FORMS[form].kind != "features")
        and (SCOPES[scope].get("within") != "batch" or not FORMS[form].ordered)
    ],
)
def test_reference_and_chunked_agree(small_tiles: None, form: str, scope: str) -> None:
    keywords = SCOPES[scope]
    # the small tau needs the running maximum
    for tau in (0.7, 1e-3) if FORMS[form].kind == "pairs" else (0.7,):
        expected = value_and_gradient(make_input(), form=form, tau=tau, impl="reference", **keywords)
        actual = value_and_gradient(make_input(), form=form, tau=tau, impl="chunked", **keywords)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-11)
        scale = expected[1].norm().clamp(min=1e-3)
        # at the small tau one duplicate pair has all the weight; its force is rounding over delta^2
        a, b = tied(actual[1], form) / scale, tied(expected[1], form) / scale
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10 / tau)
        if "mask_BT" in keywords:
            assert (actual[1][~keywords["mask_BT"]] == 0).all()


@pytest.mark.parametrize(("form", "impl"), IMPLEMENTED)
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, form: str, impl: str) -> None:
    monkeypatch.setattr(vectors, "tile_size", lambda n, device: min(n, 4))
    monkeypatch.setattr(vectors, "chunk_rows", lambda rows, n, device: 1)
    z = (randn(2, 9, 3) + 0.3).requires_grad_()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    segments = (torch.arange(9) // 5).expand(2, 9).contiguous()
    for rest in ({"mask_BT": mask}, {"segments_BT": segments}):

        def loss(x: Tensor, rest: dict[str, Tensor] = rest) -> Tensor:
            generator = torch.Generator().manual_seed(2)
            return dispersion_loss(x, form=form, impl=impl, tau=0.8, slices=8, generator=generator, **rest)

        assert torch.autograd.gradcheck(loss, (z,), eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=False)


@pytest.mark.parametrize("form", [name for name, info in FORMS.items() if info.kind == "pairs"])
def test_a_second_backward_through_a_retained_graph(form: str) -> None:
    z = make_input().requires_grad_()
    loss = dispersion_loss(z, form=form, impl="chunked")
    first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ALONE)
def test_the_incoming_gradient_scales(form: str) -> None:
    z = make_input()
    generator = torch.Generator
    one = z.clone().requires_grad_()
    dispersion_loss(one, form=form, generator=generator().manual_seed(0)).backward()
    three = z.clone().requires_grad_()
    (3 * dispersion_loss(three, form=form, generator=generator().manual_seed(0))).backward()
    torch.testing.assert_close(three.grad, 3 * one.grad)


@pytest.mark.parametrize(("form", "impl"), IMPLEMENTED)
def test_mask_is_slicing(form: str, impl: str) -> None:
    z = make_input()[:1]
    keep = torch.zeros(1, T, dtype=torch.bool)
    keep[0, 4:29] = True
    garbage = torch.where(keep.unsqueeze(-1), z, torch.inf)
    draws = torch.Generator
    masked = dispersion_loss(garbage, keep, form=form, impl=impl, generator=draws().manual_seed(0))
    sliced = dispersion_loss(z[:, 4:29], form=form, impl=impl, generator=draws().manual_seed(0))
    torch.testing.assert_close(masked, sliced)


@pytest.mark.parametrize(("form", "impl"), IMPLEMENTED)
def test_segments_are_sequences(form: str, impl: str) -> None:
    z = make_input()[1:2]
    segments = torch.tensor([5] * 11 + [2] * 20 + [9] * 5 + [1])
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    if FORMS[form].ordered:  # documents in pieces, each in its own order
        for kind in segments.unique():
            own = segments[order] == kind
            order[own] = order[own].sort().values
    draws = torch.Generator
    packed = sum_and_count(
        z[:, order],
        segments_BT=segments[order].unsqueeze(0),
        form=form,
        impl=impl,
        generator=draws().manual_seed(0),
    )
    alone = [
        dispersion_loss(z[:, part], form=form, impl=impl, generator=draws().manual_seed(0))
        for part in (slice(0, 11), slice(11, 31), slice(31, 36))
    ]
    torch.testing.assert_close(packed[0], torch.stack(alone).sum())
    assert packed[1].item() == 3  # the document of one token has no pair


@pytest.mark.parametrize(("form", "impl"), IMPLEMENTED)
def test_nothing_to_pair_is_zero_with_zero_gradients(form: str, impl: str) -> None:
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2] = True
    z = randn(2, 6, 4).requires_grad_()
    draws = torch.Generator().manual_seed(0)
    total, count = sum_and_count(z, mask, form=form, impl=impl, generator=draws)
    total.backward()
    assert total.item() == 0
    assert count.item() == 0
    assert (z.grad == 0).all()
    single = randn(2, 1, 4).requires_grad_()
    dispersion_loss(single, form=form, impl=impl, generator=draws).backward()
    assert (single.grad == 0).all()


def test_memory_is_linear_and_no_pair_matrix_is_saved() -> None:
    # what autograd keeps between forward and backward is bounded by a few tensors like z
    z = torch.randn(2, 600, 8, requires_grad=True)
    for gradient in ("forward", "recompute"):
        kept: list[int] = []

        def pack(x: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            dispersion_loss(z, impl="chunked", gradient=gradient)
        assert max(kept) <= z.numel()


def test_float32_keeps_up_with_float64_on_many_tokens() -> None:
    z = randn(2, 700, 24)
    expected = value_and_gradient(z, impl="reference")
    value, gradient = value_and_gradient(z.float(), impl="chunked")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected[0], rtol=2e-6, atol=0)
    assert ((gradient - expected[1]).norm() / expected[1].norm()).item() < 2e-6
