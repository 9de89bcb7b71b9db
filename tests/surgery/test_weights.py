"""State dict in, state dict out."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cbd_trl.architectures.axes import dims_of
from cbd_trl.surgery.weights import from_input_matrix, input_matrix, reader_keys, to_state, weights_of
from tests.surgery.helpers import (
    build,
    described,
    difference,
    every_case,
    full_model,
    reading_module,
    stored_tolerance,
)


@every_case
def test_weights_rebuild_the_model(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    assert set(weights) == set(architecture.tensors)
    assert difference(build(weights, architecture), model) <= stored_tolerance(architecture)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemmas_gains_and_embeddings_are_what_the_model_computes_with(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    ids, scale = torch.arange(5), 32**0.5
    entered = model.get_input_embeddings()(ids)
    torch.testing.assert_close(weights["model.embed_tokens.weight"][ids], entered, rtol=1e-6, atol=0)
    stream = torch.randn(3, 32, dtype=torch.float64)
    over_rms = stream / (stream.square().mean(-1, keepdim=True) + architecture.eps).sqrt()
    for name in ("model.norm", "model.layers.1.post_feedforward_layernorm"):
        gain = weights[f"{name}.weight"] * (scale if tied and name == "model.norm" else 1)
        torch.testing.assert_close(model.get_submodule(name)(stream), over_rms * gain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_case
def test_what_is_stored_survives_the_way_to_what_is_used_and_back(family, tied, dtype):
    model = full_model(family, tied).to(dtype)
    weights, architecture = described(model)
    for key, tensor in to_state(weights, architecture).items():
        torch.testing.assert_close(tensor.to(dtype), model.state_dict()[key], rtol=3e-7, atol=0)


@every_case
def test_input_matrix_computes_what_the_reader_computes(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    for site in architecture.sites:
        for reader in site.readers:
            key, bias = reader_keys(reader, weights, architecture)
            axes = architecture.tensors[key]
            matrix = input_matrix(weights[key], axes, site.axis)
            stream = torch.randn(3, matrix.shape[1], dtype=torch.float64)
            if key == f"{architecture.family.embedding}.weight":
                # As it enters the stream; the final norm's gain takes the inverse.
                matrix = matrix / architecture.embedding_scale
            expected = stream @ matrix.T + (0 if bias is None else weights[bias].flatten())
            # Experts and their router are no linear layers by themselves.
            if "expert" not in dims_of(axes):
                module, outputs = reading_module(model, architecture, reader)
                torch.testing.assert_close(module(stream)[:, outputs], expected)
            rebuilt = from_input_matrix(input_matrix(weights[key], axes, site.axis), weights[key], axes, site.axis)
            assert torch.equal(rebuilt, weights[key])


def test_another_constant_of_an_activation_is_refused():
    model = full_model("apertus", True)
    constants = [module for module in model.modules() if hasattr(module, "beta")]
    constants[1].beta.fill_(0.4)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn\.beta is 0\.4.*apertus with 0\.5"):
        described(model)


def test_adapters_must_be_merged_first():
    model = full_model("llama", True)
    _, architecture = described(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    with pytest.raises(ValueError, match=r"llama.*'model\."):
        weights_of(wrapped, architecture)
