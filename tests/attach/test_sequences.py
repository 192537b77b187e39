from __future__ import annotations

import pytest
import torch

from decondense.sequences import SequencesError, count_in_batch, count_sequences, real_and_same

CPU = torch.device("cpu")


def same_pairs(segments: torch.Tensor | None, expected: list[list[int]]) -> bool:
    """Whether two numberings put the same tokens together."""
    wanted = torch.tensor(expected)
    got = torch.zeros_like(wanted) if segments is None else segments
    return torch.equal(got[:, :, None] == got[:, None, :], wanted[:, :, None] == wanted[:, None, :])


def test_nothing_said_means_all_real_and_one_sequence_a_row():
    assert real_and_same({}, 2, 5, CPU) == (None, None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_plain_masks_mark_no_documents(dtype):
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]).to(dtype)
    real, segments = real_and_same({"attention_mask": mask}, 2, 4, CPU)
    assert torch.equal(real, mask.bool())
    assert segments is None


def test_positions_that_start_again_mark_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    _, segments = real_and_same({"position_ids": positions}, 1, 6, CPU)
    assert same_pairs(segments, [[0, 0, 0, 1, 1, 2]])
    assert count_sequences(None, segments, 1, 6) == 2  # the last document has one token and no pair


def test_one_row_of_plain_positions_is_broadcast_and_marks_nothing():
    assert real_and_same({"position_ids": torch.arange(6)[None]}, 3, 6, CPU) == (None, None)
    assert real_and_same({"positions": torch.arange(6)}, 3, 6, CPU) == (None, None)


def test_left_padded_positions_of_generation_style():
    batch = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]]), "position_ids": torch.tensor([[1, 1, 0, 1, 2]])}
    real, segments = real_and_same(batch, 1, 5, CPU)
    assert segments is None
    assert count_sequences(real, segments, 1, 5) == 1


def test_a_mask_that_numbers_documents():
    mask = torch.tensor([[1, 1, 2, 2, 2, 0, 0]])
    real, segments = real_and_same({"attention_mask": mask}, 1, 7, CPU)
    assert same_pairs(segments[:, :5], [[0, 0, 1, 1, 1]])
    assert real.tolist() == [[True] * 5 + [False] * 2]
    assert count_sequences(real, segments, 1, 7) == 2


def test_numbered_mask_wins_over_squashed_positions():
    batch = {"attention_mask": torch.tensor([[1, 1, 2, 2]]), "position_ids": torch.arange(4)[None]}
    assert same_pairs(real_and_same(batch, 1, 4, CPU)[1], [[0, 0, 1, 1]])


def test_boundaries_of_variable_length_kernels():
    _, segments = real_and_same({"cu_seq_lens_q": torch.tensor([0, 3, 5, 6])}, 1, 6, CPU)
    assert same_pairs(segments, [[0, 0, 0, 1, 1, 2]])
    with pytest.raises(SequencesError, match="one packed row"):
        real_and_same({"cu_seq_lens_q": torch.tensor([0, 3, 5, 6])}, 2, 6, CPU)


def test_document_index():
    _, segments = real_and_same({"seq_idx": torch.tensor([[0, 0, 1, 1]])}, 1, 4, CPU)
    assert same_pairs(segments, [[0, 0, 1, 1]])


def test_vision_positions_mark_nothing():
    assert real_and_same({"position_ids": torch.zeros(3, 2, 5, dtype=torch.long)}, 2, 5, CPU) == (None, None)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"shape \(2, 1, 5, 5\)"),
        ({"attention_mask": torch.ones(2, 3)}, "prompt tuning"),
        ({"attention_mask": {"full_attention": None}}, "is a dict"),
        ({"position_ids": torch.zeros(2, 4)}, r"position_ids has shape \(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(batch, message):
    with pytest.raises(SequencesError, match=message):
        real_and_same(batch, 2, 5, CPU)


def test_counting_a_batch_before_the_forward():
    ids = torch.ones(3, 4, dtype=torch.long)
    assert count_in_batch({"input_ids": ids}) == 3
    assert count_in_batch({"input_ids": ids[:, :1]}) == 0
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    assert count_in_batch({"input_ids": ids, "attention_mask": mask}) == 2
    packed = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]])
    assert count_in_batch({"input_ids": ids, "position_ids": packed}) == 3
    with pytest.raises(SequencesError, match="cannot be counted"):
        count_in_batch({"pixels": ids})
