"""Held-out loss: exact, the same tokens for every model."""

import pytest
import torch

from cbd_trl.losses.held_out import held_out_loss
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
