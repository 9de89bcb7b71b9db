"""Finding the stack of decoder layers."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from cbd_trl.architectures import decoder_layers, describe
from tests.tiny import FAMILIES, MIXTURES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_the_described_ones(family):
    model = tiny_model(family)
    layers = decoder_layers(model)
    assert layers is model.get_submodule(describe(model.config).family.layers)
    assert len(layers) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_wrappers_are_looked_through(family):
    model = tiny_model(family)
    layers = decoder_layers(model)
    # Of experts, peft warns that "all-linear" leaves them out.
    targets = ["v_proj"] if family in MIXTURES else "all-linear"
    # GPT-2's Conv1D stores its weight transposed, which peft wants to be told.
    lora = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2")
    assert decoder_layers(get_peft_model(model, lora)) is layers


def test_model_without_a_stack_is_refused():
    model = tiny_model("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(
        ValueError, match=r"No stack of 4 decoder layers.*LlamaForCausalLM.*`hidden_weight=0` and `swap_prob"
    ):
        decoder_layers(model)
