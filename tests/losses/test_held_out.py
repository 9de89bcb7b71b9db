"""Held-out loss: exact, the same tokens for every model, and never all logits at once."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from cbd_trl.losses import fused
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.utils.blocks import TokenBlocks
from tests.largest_tensor import LargestTensor
from tests.tiny import FAMILIES, tiny_model


@pytest.fixture
def blocks():
    return torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def dense_loss(model, blocks, labels=None):
    labels = blocks if labels is None else labels
    logits = model(input_ids=blocks, use_cache=False).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_mean_over_predicted_tokens_in_chunks_of_any_size(family, blocks, monkeypatch):
    model = tiny_model(family)
    expected = dense_loss(model, blocks)
    for chunk, compared, batch_size in ((3, 2, 2), (7, 7, 5), (1000, 1, 1)):
        monkeypatch.setattr(fused, "_CHUNK_ELEMENTS", {"cpu": chunk * 64})
        monkeypatch.setattr(fused, "_BLOCK_ELEMENTS", {"cpu": compared * 64})
        assert held_out_loss(model, blocks, batch_size) == pytest.approx(expected, rel=1e-5)


def test_labels_say_what_is_scored(blocks):
    model = tiny_model("llama")
    labels = blocks.clone()
    labels[:, :4] = -100
    labels[1] = -100
    some = held_out_loss(model, TokenBlocks(blocks, labels), 2)
    assert some == pytest.approx(dense_loss(model, blocks, labels), rel=1e-5)
    assert some != pytest.approx(held_out_loss(model, blocks), rel=1e-3)


def test_memory_does_not_grow_with_the_logits(monkeypatch):
    """32 rows of 16 tokens: all logits would be 512 x 4,096 numbers; 64 rows of them are held."""
    monkeypatch.setattr(fused, "_CHUNK_ELEMENTS", {"cpu": 64 * 4096})
    model = tiny_model("llama", vocab_size=4096)
    with LargestTensor() as largest:
        held_out_loss(model, torch.randint(0, 4096, (32, 16)), batch_size=32)
    assert largest.elements == 64 * 4096


def test_adapters_and_half_precision_count(blocks):
    model = tiny_model("llama").bfloat16()
    assert held_out_loss(model, blocks) == pytest.approx(dense_loss(model, blocks), rel=1e-2)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    assert held_out_loss(adapted, blocks) == pytest.approx(dense_loss(adapted, blocks), rel=1e-5)


def test_a_head_that_is_not_plain_is_refused(blocks):
    model = tiny_model("llama")
    model.lm_head = Doubled(model.lm_head)
    with pytest.raises(ValueError, match=r"not its output embedding times its last hidden state"):
        held_out_loss(model, blocks)


class Doubled(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = copy.deepcopy(linear)
        self.weight = linear.weight

    def forward(self, hidden):
        return 2 * self.linear(hidden)


def test_it_leaves_the_mode_as_it_was(blocks):
    model = tiny_model("gpt2", attn_pdrop=0.5).train()
    first = held_out_loss(model, blocks)
    assert model.training and held_out_loss(model, blocks) == first


@pytest.mark.parametrize("shape", [(4, 1), (0, 8), (8,)])
def test_blocks_without_anything_to_predict_are_refused(shape):
    with pytest.raises(ValueError, match=r"wanted \(N, T\) with N >= 1 and T >= 2"):
        held_out_loss(tiny_model("llama"), torch.zeros(shape, dtype=torch.int64))


def test_labels_that_score_nothing_are_refused(blocks):
    with pytest.raises(ValueError, match=r"labels scores no token"):
        held_out_loss(tiny_model("llama"), TokenBlocks(blocks, torch.full_like(blocks, -100)))
