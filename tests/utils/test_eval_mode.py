"""A model in eval mode for a while, and with an attention that runs wherever it is."""

import pytest
import torch
from torch import nn

from cbd_trl.utils.modeling import in_eval_mode, portable_attention
from tests.flash import FLASH, install
from tests.tiny import tiny_model

IDS = torch.arange(1, 7)[None]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_it_was_whatever_happens(training: bool) -> None:
    model = nn.Sequential(nn.Dropout()).train(training)
    with in_eval_mode(model):
        assert not model.training and not model[0].training
    assert model.training is model[0].training is training
    with pytest.raises(KeyboardInterrupt), in_eval_mode(model):
        raise KeyboardInterrupt
    assert model.training is training


@pytest.mark.parametrize("name", [FLASH, "flash_attention_3", "flex_attention", "kernels-community/flash-attn3"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_kernel_gives_way_and_comes_back(family: str, name: str) -> None:
    """Gemma 2 caps its attention scores, which SDPA cannot."""
    model = tiny_model(family)
    wanted, how = model(IDS).logits, model.config._attn_implementation
    model.config._attn_implementation_internal = name
    with pytest.raises(KeyboardInterrupt), portable_attention(model):
        assert model.config._attn_implementation == how
        assert torch.equal(model(IDS).logits, wanted)
        raise KeyboardInterrupt
    assert model.config._attn_implementation == name


def test_a_kernel_that_runs_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits on an accelerator; PyTorch's own functions are left as they are."""
    install(monkeypatch)
    model = tiny_model("llama")
    for name in ("eager", "sdpa", FLASH):
        model.set_attn_implementation(name)
        half = tiny_model("llama").to(device="meta", dtype=torch.bfloat16)
        half.set_attn_implementation(name)
        with portable_attention(model), portable_attention(half):
            assert model.config._attn_implementation == ("sdpa" if name == FLASH else name)
            assert half.config._attn_implementation == name
