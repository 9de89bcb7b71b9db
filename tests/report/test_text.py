"""Held-out text as blocks."""

import pytest
import torch

from cbd_trl.report.measure import held_out_blocks


def test_held_out_blocks_join_texts_by_the_end_token(tokenizer):
    blocks = held_out_blocks(tokenizer, ["w0 w1", "w2 </s>", "w3 w4 w5"], length=3, count=2).input_ids
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("w0", "w1", "w2", "w3", "</s>")}
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [[ids["w0"], ids["w1"], ids["</s>"]], [ids["w2"], ids["</s>"], ids["w3"]]]


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"2 blocks of 3 are needed.*Give more texts"):
        held_out_blocks(tokenizer, ["w0 w1 w2"], length=3, count=2)


def test_rows_of_any_format_are_read_as_in_training(tokenizer):
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    blocks = held_out_blocks(tokenizer, [{"messages": chat}] * 2, length=6, count=2)
    assert blocks.input_ids.tolist() == [[4, 7, 2, 5, 8, 2]] * 2
