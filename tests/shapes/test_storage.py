"""Bytes of weights and of a cache: of files that llama.cpp and gguf wrote, and of caches that transformers filled."""

import gguf
import pytest
import torch
from gguf.quants import quantize
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

from cbd_trl.architectures import describe
from cbd_trl.shapes.storage import BLOCKS, STORAGES, Memory, fitting_type, tensor_bytes
from tests.tiny import tiny_model

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
GEMMA = Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    sliding_window=512,
)
QWEN = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def test_blocks_are_those_of_ggml():
    names = {"float32": "F32", "bf16": "BF16"}
    for name, block in BLOCKS.items():
        kind = gguf.GGMLQuantizationType[names.get(name, name.upper())]
        assert block == gguf.GGML_QUANT_SIZES[kind], name


@pytest.mark.parametrize(
    ("config", "storage", "size"),
    [
        pytest.param(SMOLLM2, "q4_1", 96_576_768, id="SmolLM2-135M-Instruct.Q4_1"),
        pytest.param(GEMMA, "q4_k_m", 246_587_904, id="gemma-3-270m.Q4_K_M"),
        pytest.param(QWEN, "q4_k_m", 485_452_288, id="qwen2.5-0.5b.Q4_K_M"),
    ],
)
def test_weights_of_published_files(config, storage, size):
    """The bytes of all tensors in files that llama-quantize wrote: the last is of an untied head."""
    assert Memory.of(describe(config), storage, 1)[0] == size


@pytest.mark.parametrize(("storage", "kind"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("f16", "F16")])
def test_weights_of_a_file_that_gguf_writes(storage, kind, tmp_path):
    """Norms in float32; rows of 40 numbers are not whole blocks; the table is the head, which Q4_0 keeps larger."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=40, tie_word_embeddings=True)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, tensor in model.named_parameters():
        wanted = gguf.GGMLQuantizationType[kind]
        if kind == "Q4_0" and "embed" in name:
            wanted = gguf.GGMLQuantizationType.Q8_0
        if kind != "F16" and tensor.shape[-1] == 40:
            wanted = gguf.GGMLQuantizationType.F16
        if tensor.ndim == 1:
            wanted = gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(tensor.detach().numpy(), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    written = sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    assert Memory.of(describe(model.config), storage, 1)[0] == written


@pytest.mark.parametrize(
    ("kind", "row", "found"),
    [
        ("q4_k", 512, "q4_k"),
        ("q4_k", 640, "q5_0"),
        ("q5_k", 640, "q5_1"),
        ("q6_k", 640, "q8_0"),
        ("q4_k", 648, "f16"),
        ("q4_0", 648, "f16"),
        ("float32", 7, "float32"),
    ],
)
def test_rows_that_are_not_whole_blocks_take_another_type(kind, row, found):
    assert fitting_type(kind, row) == found


def test_bitsandbytes_quantizes_linear_layers_alone():
    model = tiny_model("qwen2", tie_word_embeddings=False)
    linear = [module.weight for name, module in model.named_modules() if name.endswith("_proj")]
    others = model.num_parameters() - sum(weight.numel() for weight in linear)
    sizes = {storage: Memory.of(describe(model.config), storage, 1)[0] for storage in ("int8", "nf4")}
    assert sizes["int8"] == 2 * others + sum(weight.numel() + 4 * len(weight) for weight in linear)
    assert sizes["nf4"] == 2 * others + sum(weight.numel() // 2 + 4 * -(-weight.numel() // 64) for weight in linear)
    assert tensor_bytes("nf4", 65, 65) == 33 + 8


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "phi3", "gpt2", "qwen3_5_text", "lfm2", "nanochat"])
@pytest.mark.parametrize("tied", [True, False])
def test_float_storages_are_the_parameters(family, tied):
    architecture = describe(tiny_model(family, tie_word_embeddings=tied).config)
    found = {storage: Memory.of(architecture, storage, 1)[0] for storage in STORAGES}
    assert (found["float32"], found["bf16"]) == (4 * architecture.num_parameters, 2 * architecture.num_parameters)
    assert found["q8_0"] <= found["f16"] <= found["float32"] and found["nf4"] < found["int8"] < found["bf16"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text", "gpt_oss", "lfm2", "qwen3_5_text"])
def test_cache_of_a_context(family):
    """As many numbers as transformers keeps (one token less of a window: it is the one that is being read)."""
    model, length = tiny_model(family), 11
    with torch.no_grad():
        filled = model(torch.arange(3, 3 + length)[None], use_cache=True).past_key_values
    wanted = 0
    for layer in filled.layers:
        if getattr(layer, "keys", None) is not None:
            _, groups, kept, dim = layer.keys.shape
            window = getattr(layer, "sliding_window", None)
            assert kept == (length if window is None else min(length, window - 1))
            wanted += 2 * 2 * groups * dim * (length if window is None else min(length, window))
        for states in ("conv_states", "recurrent_states"):
            kept_states = getattr(layer, states, {}).values()
            wanted += 4 * sum(state.numel() for state in kept_states if state is not None)
    assert Memory.of(describe(model.config), "bf16", length)[1] == wanted
