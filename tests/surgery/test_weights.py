"""State dict in, state dict out."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cbd_trl.surgery.weights import from_input_matrix, input_matrix, reader_keys, weights_of
from tests.surgery.helpers import build, described, difference, every_case, full_model, stored_tolerance


@every_case
def test_weights_rebuild_the_model(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    assert set(weights) == set(architecture.tensors)
    assert difference(build(weights, architecture), model) <= stored_tolerance(architecture)


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
            expected = stream @ matrix.T + (0 if bias is None else weights[bias])
            torch.testing.assert_close(model.get_submodule(reader)(stream), expected)
            rebuilt = from_input_matrix(input_matrix(weights[key], axes, site.axis), weights[key], axes, site.axis)
            assert torch.equal(rebuilt, weights[key])


def test_adapters_must_be_merged_first():
    model = full_model("llama", True)
    _, architecture = described(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    with pytest.raises(ValueError, match=r"not those of a plain llama model: missing \['model.*Merge adapters"):
        weights_of(wrapped, architecture)
