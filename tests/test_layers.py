from __future__ import annotations

import pytest

from decondense.layers import EMBEDDING, FINAL_NORM, LOGITS, STACK_OUTPUT, block, parse


@pytest.mark.parametrize(
    ("layer", "label", "key"),
    [
        (EMBEDDING, "embedding", "embedding"),
        (block(1), "block 1", "block_01"),
        (block(12), "block 12", "block_12"),
        (FINAL_NORM, "final norm", "final_norm"),
        (STACK_OUTPUT, "stack output", "stack_output"),
        (LOGITS, "logits", "logits"),
    ],
)
def test_labels_and_keys_are_read_back(layer, label, key):
    assert (layer.label, str(layer), layer.key(12)) == (label, label, key)
    assert parse(label) == parse(key) == layer


def test_keys_of_deep_models_sort():
    keys = [block(number).key(120) for number in range(1, 121)]
    assert keys == sorted(keys)
    assert [parse(key).number for key in keys] == list(range(1, 121))


@pytest.mark.parametrize("text", ["block", "block 0", "block_00", "Block 1", "block 1 ", "blocks", "norm", ""])
def test_other_texts_name_no_layer(text):
    with pytest.raises(ValueError, match="is not a layer"):
        parse(text)
