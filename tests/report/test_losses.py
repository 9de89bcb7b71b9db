"""Held-out loss: exact, the same tokens for every model."""

import pytest
import torch

from cbd_trl.report.losses import held_out_loss, token_blocks
from tests.tiny import tiny_model


@pytest.fixture
def blocks():
    return torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_held_out_loss_is_the_mean_over_predicted_tokens(family, blocks):
    model = tiny_model(family)
    with torch.no_grad():
        expected = float(model(blocks, labels=blocks).loss)
    for batch_size in (1, 2, 5):
        assert held_out_loss(model, blocks, batch_size) == pytest.approx(expected, rel=1e-5)


def test_held_out_loss_leaves_the_mode_as_it_was(blocks):
    model = tiny_model("gpt2", attn_pdrop=0.5).train()
    first = held_out_loss(model, blocks)
    assert model.training and held_out_loss(model, blocks) == first


@pytest.mark.parametrize("shape", [(4, 1), (0, 8), (8,)])
def test_blocks_without_anything_to_predict_are_refused(shape):
    with pytest.raises(ValueError, match=r"wanted \(N, T\) with N >= 1 and T >= 2"):
        held_out_loss(tiny_model("llama"), torch.zeros(shape, dtype=torch.int64))


def test_token_blocks_join_texts_by_the_end_token(tokenizer):
    blocks = token_blocks(tokenizer, ["w0 w1", "w2 </s>", "w3 w4 w5"], length=3, count=2)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("w0", "w1", "w2", "w3", "</s>")}
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [[ids["w0"], ids["w1"], ids["</s>"]], [ids["w2"], ids["</s>"], ids["w3"]]]


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"have 4 tokens, but 2 blocks of 3 tokens need 6.*Give more texts"):
        token_blocks(tokenizer, ["w0 w1 w2"], length=3, count=2)
