"""State dict in, state dict out."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cbd_trl.surgery.weights import from_input_matrix, input_matrix, reader_keys, weights_of
from tests.surgery.helpers import build, described, every_case, full_model, logits, reading_module


@every_case
def test_weights_rebuild_the_model(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    assert set(weights) == set(architecture.tensors)
    assert torch.equal(logits(build(weights, architecture)), logits(model))


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
            expected = stream @ matrix.T + (0 if bias is None else weights[bias])
            module, outputs = reading_module(model, architecture, reader)
            torch.testing.assert_close(module(stream)[:, outputs], expected)
            assert torch.equal(from_input_matrix(matrix, weights[key], axes, site.axis), weights[key])


def test_adapters_must_be_merged_first():
    model = full_model("llama", True)
    _, architecture = described(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    with pytest.raises(ValueError, match=r"not those of a plain llama model: missing \['model.*Merge adapters"):
        weights_of(wrapped, architecture)
