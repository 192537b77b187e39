from __future__ import annotations

import random

import numpy as np
import torch

from decondense.seeding import derive, fence, generator, hash_array, hash_parameters, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_fence_restores_every_global_generator() -> None:
    seed_everything(3, "test")
    expected = draw()
    seed_everything(3, "test")
    with fence():
        draw()
        torch.manual_seed(99)
        np.random.seed(5)
        random.seed(7)
    assert draw() == expected


def test_a_fence_restores_after_an_exception() -> None:
    seed_everything(3, "test")
    expected = draw()
    seed_everything(3, "test")
    try:
        with fence():
            draw()
            raise KeyError
    except KeyError:
        pass
    assert draw() == expected


def test_named_generators_do_not_touch_the_global_one() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    torch.rand(4, generator=generator(1, "pairs", 7))
    assert torch.equal(before, torch.get_rng_state())


def test_seed_purpose_and_step_each_change_the_stream() -> None:
    def first(*name):
        return float(torch.rand((), generator=generator(*name)))

    streams = [first(0, "a"), first(1, "a"), first(0, "b"), first(0, "a", 1)]
    assert len(set(streams)) == 4
    assert first(0, "a") == streams[0]
    # the parts are separated: (1, "1x") is not (11, "x")
    assert derive(1, "1x") != derive(11, "x")


def test_hashes_see_values_names_and_types() -> None:
    model = torch.nn.Linear(3, 2)
    before = hash_parameters(model)
    assert before == hash_parameters(model)
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert hash_parameters(model) != before
    assert hash_parameters(model.to(torch.bfloat16)) != before
    assert hash_array(np.zeros(4, np.int32)) != hash_array(np.zeros(4, np.int64))
    assert hash_array(np.zeros((2, 2))) != hash_array(np.zeros(4))
