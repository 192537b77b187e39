from __future__ import annotations

import pytest
import torch

from decondense.sequences import (
    SequenceReader,
    SequencesError,
    argument_names,
    bind,
    count_in_batch,
    count_sequences,
    real_and_same,
)

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
    assert same_pairs(segments[:, 2:], [[0, 0, 0]])
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


def test_rotary_positions_of_vision_models():
    """[3, B, T] are (time, height, width): a document starts where all are 0; of [4, B, T] the first row counts."""
    text = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    image = torch.tensor([[0, 1, 1, 1, 0, 1, 2]])  # a picture from the second token on, at one time
    height = torch.tensor([[0, 1, 1, 2, 0, 1, 2]])
    width = torch.tensor([[0, 0, 2, 2, 0, 1, 2]])
    three = torch.stack([image, height, width])
    expected = [[0, 0, 0, 0, 1, 1, 1]]
    assert same_pairs(real_and_same({"position_ids": three}, 1, 7, CPU)[1], expected)
    assert same_pairs(real_and_same({"position_ids": torch.cat([text[None], three])}, 1, 7, CPU)[1], expected)
    # the rows of vision positions may be 0 within a document: only the text tells then
    zeros = torch.zeros(3, 1, 7, dtype=torch.long)
    assert same_pairs(real_and_same({"position_ids": torch.cat([text[None], zeros])}, 1, 7, CPU)[1], expected)
    assert real_and_same({"position_ids": torch.arange(5).expand(3, 2, 5)}, 2, 5, CPU) == (None, None)


def test_positions_of_a_batch_one_row_after_the_other():
    positions = torch.tensor([0, 1, 0, 1, 0, 1, 2, 3])
    for flat in (positions, positions[None]):
        assert same_pairs(real_and_same({"position_ids": flat}, 2, 4, CPU)[1], [[0, 0, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("name", ["seq_idx", "document_ids", "doc_ids"])
def test_numbers_of_documents_may_be_those_of_a_corpus(name):
    _, segments = real_and_same({name: torch.tensor([[907, 907, 907, 31, 31, 4]])}, 1, 6, CPU)
    assert same_pairs(segments, [[0, 0, 0, 1, 1, 2]])
    assert count_sequences(None, segments, 1, 6) == 2


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seqlens", "cu_seq_lens"])
def test_tokens_behind_the_last_boundary_are_padding(name):
    real, segments = real_and_same({name: torch.tensor([0, 3, 5, 5])}, 1, 8, CPU)
    assert real.tolist() == [[True] * 5 + [False] * 3]
    assert same_pairs(segments[:, :5], [[0, 0, 0, 1, 1]])
    for bad in ([1, 4, 8], [0, 4, 9], [0, 5, 3, 8]):
        with pytest.raises(SequencesError, match=name):
            real_and_same({name: torch.tensor(bad)}, 1, 8, CPU)


# rows of 7, 5 and 2 real tokens; 0 is the padding id
IDS = torch.tensor([[5, 9, 4, 7, 7, 3, 8], [6, 3, 9, 9, 5, 0, 0], [4, 5, 0, 0, 0, 0, 0]])
REAL = IDS != 0


@pytest.mark.parametrize("name", ["key_padding_mask", "src_key_padding_mask", "encoder_padding_mask"])
@pytest.mark.parametrize("added", [False, True])
def test_torchs_masks_are_true_at_padding(name, added):
    mask = torch.zeros(3, 7).masked_fill(~REAL, float("-inf")) if added else ~REAL
    assert torch.equal(real_and_same({"input_ids": IDS, name: mask}, 3, 7, CPU)[0], REAL)


@pytest.mark.parametrize("name", ["padding_mask", "mask", "pad_mask", "input_mask"])
@pytest.mark.parametrize("said", ["real", "padding", "added"])
def test_masks_of_either_meaning_are_settled_by_the_ids(name, said):
    mask = {"real": REAL, "padding": (~REAL).long(), "added": torch.zeros(3, 7).masked_fill(~REAL, -1e9)}[said]
    reader = SequenceReader()
    tokens = ("input_ids", IDS)
    assert torch.equal(reader.read({name: mask}, 3, 7, CPU, tokens=tokens)[0], REAL)
    # once settled it holds for a batch that would not tell
    other = IDS.clone()
    other[0] = torch.tensor([5, 5, 5, 5, 5, 0, 0])
    assert torch.equal(reader.read({name: mask}, 3, 7, CPU, tokens=("input_ids", other))[0], REAL)


def test_masks_without_padding_and_masks_that_do_not_tell():
    ones = torch.ones(3, 7, dtype=torch.bool)
    assert real_and_same({"input_ids": IDS, "mask": ones}, 3, 7, CPU)[0].all()
    assert real_and_same({"input_ids": IDS, "mask": ~ones}, 3, 7, CPU)[0].all()
    half = torch.zeros(3, 7, dtype=torch.bool)
    half[:, :2] = True
    with pytest.raises(SequencesError, match="cannot be determined"):
        real_and_same({"input_ids": IDS + 1 + torch.arange(7), "mask": half}, 3, 7, CPU)


def test_who_attends_to_whom_is_not_who_is_real():
    triangle = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for mask in (triangle, torch.zeros(7, 7).masked_fill(triangle, float("-inf")), triangle.expand(6, 7, 7)):
        assert real_and_same({"input_ids": IDS, "mask": mask}, 3, 7, CPU)[0] is None
        square = torch.arange(3, 52).reshape(7, 7)
        assert real_and_same({"input_ids": square, "mask": mask}, 7, 7, CPU)[0] is None


@pytest.mark.parametrize("rows", [1, 3])
def test_attention_patterns_that_may_hold_padding_or_documents_are_refused(rows):
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    window = causal & (torch.arange(7)[:, None] - torch.arange(7) < 3)
    documents = causal & (torch.arange(7)[:, None] // 4 == torch.arange(7) // 4)
    ids = torch.arange(1, 7 * rows + 1).reshape(rows, 7)
    for plain in (causal[None, None], window[None].repeat(rows, 1, 1), ~causal.expand(rows, 2, 7, 7)):
        assert real_and_same({"ids": ids, "mask": plain}, rows, 7, CPU) == (None, None)
    padded = causal & torch.tensor([True] * 5 + [False] * 2)
    added = torch.zeros(7, 7).masked_fill(~padded, -torch.inf)
    for mask in (documents, padded, added):
        batch = {"mask": mask.expand(rows, 1, 7, 7)}
        with pytest.raises(SequencesError, match="the mask is an attention pattern"):
            real_and_same(batch, rows, 7, CPU)
        with pytest.raises(SequencesError, match="the mask is an attention pattern"):
            real_and_same(batch | {"position_ids": torch.arange(7)[None]}, rows, 7, CPU)
        real = torch.ones(rows, 7, dtype=torch.bool)
        assert real_and_same(batch | {"key_padding_mask": ~real}, rows, 7, CPU)[0].all()
    restart = {"mask": documents.expand(rows, 1, 7, 7), "input_pos": (torch.arange(7) % 4)[None]}
    assert real_and_same(restart, rows, 7, CPU)[1].max() == 1
    for opaque in (object(), [documents]):
        with pytest.raises(SequencesError, match="block_mask"):
            real_and_same({"block_mask": opaque}, rows, 7, CPU)
        assert real_and_same({"block_mask": opaque, "positions": torch.arange(7)}, rows, 7, CPU) == (None, None)


def test_an_attention_pattern_that_changes_is_noticed_away_from_the_cpu():
    reader = SequenceReader()
    reader._meaning["mask"] = "pattern"  # as a first plain mask on another device leaves it
    meta = torch.device("meta")
    reader.read({"mask": torch.ones(2, 1, 4, 4, device=meta)}, 2, 4, meta)
    assert len(reader._overlooked) == 1
    reader._overlooked = {key: torch.tensor(True) for key in reader._overlooked}
    with pytest.raises(SequencesError, match="some masks hold padding"):
        reader.check()


@pytest.mark.parametrize("name", ["padding", "src_padding_mask", "is_pad", "pad_positions"])
def test_any_name_with_padding_in_it_is_read(name):
    for mask in (REAL, ~REAL, (~REAL)[:, None, None]):
        assert torch.equal(real_and_same({"input_ids": IDS, name: mask}, 3, 7, CPU)[0], REAL)
    for value in (None, True, "left", 0, torch.tensor(0)):
        assert real_and_same({"input_ids": IDS, name: value}, 3, 7, CPU) == (None, None)
    assert real_and_same({"input_ids": IDS, "memory_" + name: REAL, "tgt_" + name: REAL}, 3, 7, CPU)[0] is None


def test_predicted_places_are_not_padding():
    """Padding is at the ends of the rows: a mask of masked tokens marks one id too."""
    ids = torch.tensor([[5, 1, 4, 1, 7, 3, 8], [6, 3, 1, 9, 5, 1, 2]])
    with pytest.raises(SequencesError, match="cannot be determined"):
        real_and_same({"input_ids": ids, "mask": ids == 1}, 2, 7, CPU)


def test_a_float_mask_without_padding_may_be_added_to_the_scores():
    for mask in (torch.zeros(2, 4), torch.ones(2, 4)):
        assert real_and_same({"attention_mask": mask}, 2, 4, CPU)[0].all()
    added = torch.tensor([[0.0, 0, 0, -1e9], [0, 0, -1e9, -1e9]])
    for mask in (added, added.half(), (added == 0).float(), 2 * (added == 0).float()):
        assert torch.equal(real_and_same({"attention_mask": mask}, 2, 4, CPU)[0], added == 0)
    for mask in (added, (added < 0).float()):  # 1.0 = padding in some, though torch would add it
        assert torch.equal(real_and_same({"encoder_padding_mask": mask}, 2, 4, CPU)[0], added == 0)


@pytest.mark.parametrize("name", ["lengths", "src_lengths", "seq_lens", "valid_lens"])
def test_lengths_of_rows_or_of_the_documents_of_one_row(name):
    for lengths in (torch.tensor([7, 5, 2]), torch.tensor([[7], [5], [2]]), [7, 5, 2]):
        assert torch.equal(real_and_same({name: lengths}, 3, 7, CPU)[0], REAL)
    real, segments = real_and_same({name: [3, 1, 2]}, 1, 7, CPU)
    assert real.tolist() == [[True] * 6 + [False]]
    assert same_pairs(segments[:, :6], [[0, 0, 0, 1, 2, 2]])
    for bad in ([7, 5], [7, 5, 9]):
        with pytest.raises(SequencesError, match=name):
            real_and_same({name: bad}, 3, 7, CPU)


def test_positions_that_start_again_above_zero():
    """RoBERTa counts from 2, with 1 at padding; a cut stream begins in the middle of a document."""
    for positions, expected in (
        ([2, 3, 4, 2, 3, 1, 1], [0, 0, 0, 1, 1, 2, 3]),
        ([57, 58, 0, 1, 2, 0, 1], [0, 0, 1, 1, 1, 2, 2]),
        ([0, 1, 2, 3, 3, 3, 3], [0] * 7),
    ):
        assert same_pairs(real_and_same({"position_ids": torch.tensor([positions])}, 1, 7, CPU)[1], [expected])


def test_negative_documents_are_padding():
    real, segments = real_and_same({"sequence_id": torch.tensor([[4, 4, 9, 9, 9, -1, -1]])}, 1, 7, CPU)
    assert real.tolist() == [[True] * 5 + [False] * 2]
    assert count_sequences(real, segments, 1, 7) == 2


def test_segments_that_the_model_embeds_are_no_documents():
    batch = {"segment_ids": torch.tensor([[0, 0, 0, 1, 1]])}
    with pytest.raises(SequencesError, match="document_ids"):
        real_and_same(batch, 1, 5, CPU)
    assert SequenceReader(embeds_segments=True).read(batch, 1, 5, CPU) == (None, None)


def test_inputs_with_the_tokens_first():
    reader = SequenceReader()
    arguments = {"attention_mask": REAL.T.long(), "position_ids": torch.arange(7)[:, None].expand(7, 3)}
    real, segments = reader.read(arguments, 3, 7, CPU, tokens=("src", IDS.T), tokens_first=True)
    assert torch.equal(real, REAL)
    assert segments is None
    # torch's padding masks are [batch, tokens] whatever the layout is, also where no shape tells
    square = IDS[:, :3]
    mask = torch.tensor([[False, False, True], [False, False, False], [False, True, True]])
    real, _ = reader.read({"src_key_padding_mask": mask}, 3, 3, CPU, tokens=("src", square), tokens_first=True)
    assert torch.equal(real, ~mask)


def test_calls_are_read_by_the_names_of_the_forward():
    class Model(torch.nn.Module):
        def forward(self, ids, mask=None, *, scale=1.0):
            return ids

    assert argument_names(Model()) == ("ids", "mask", "scale")
    assert bind(("ids", "mask"), (1, 2), {"scale": 3}) == {"ids": 1, "mask": 2, "scale": 3}
    assert bind(("batch", "scale"), ({"input_ids": 1}, 2), {}) == {"input_ids": 1, "scale": 2}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"shape \(2, 1, 5, 5\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"shape \(2, 3\)"),
        ({"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)}, r"key_padding_mask has shape \(2, 6\)"),
        ({"mask": torch.ones(2, 4)}, r"mask has shape \(2, 4\)"),
        ({"document_ids": torch.zeros(3, 5)}, r"document_ids has shape \(3, 5\)"),
        ({"position_ids": torch.zeros(3, 2, 4)}, r"position_ids has shape \(2, 4\)"),
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
