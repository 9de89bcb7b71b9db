"""What docs/guides/export.md says: a target is a stock model to the tools that read folders of models."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cbd_trl import Chain, from_chain
from tests.chain.helpers import DEEP, WIDE, build_tiny_chain
from tests.tiny import ROWS, tiny_model
from tests.tokenizer import tiny_tokenizer

# What llama.cpp calls them; it has no OPT.
ARCHITECTURES = {family: MODEL_ARCH[row.gguf] for family, row in ROWS.items() if row.gguf is not None}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    return build_tiny_chain(tmp_path_factory.mktemp("export") / "chain")


def write_gguf(folder: Path, file: Path) -> None:
    """A Llama folder as GGUF: names by gguf's own table, query and key rows in llama.cpp's order."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for key, tensor in load_file(folder / "model.safetensors").items():
        for projection, count in heads.items():
            if projection in key:
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(key, (".weight",)), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("shape", [DEEP, WIDE], ids=["depth", "width"])
def test_a_target_goes_through_gguf_and_back(chain, tmp_path, shape):
    model: Any = from_chain(chain, config=shape, save_directory=tmp_path / "target")
    write_gguf(tmp_path / "target", tmp_path / "target.gguf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="target.gguf", dtype=torch.float32)
    tokens = torch.arange(6, 26)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        torch.testing.assert_close(back(input_ids=tokens).logits, expected, rtol=0, atol=1e-5 * expected.std().item())


def test_a_saved_target_is_a_folder_like_any_other(chain, tmp_path):
    model = from_chain(chain, config=WIDE, save_directory=tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert type(model) is LlamaForCausalLM and config["architectures"] == ["LlamaForCausalLM"]
    assert not {"auto_map", "custom_pipelines"} & config.keys()
    # Files, tensors and fields of one that transformers made from the same config; one field more, and a card.
    del model.config.cbd_trl
    LlamaForCausalLM(model.config).save_pretrained(tmp_path / "stock")
    tiny_tokenizer().save_pretrained(tmp_path / "stock")
    stock = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config.keys() - stock.keys() == {"cbd_trl"} and stock.keys() <= config.keys()
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    assert names | {"README.md"} == {path.name for path in (tmp_path / "target").iterdir()}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("target", "stock"))
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: one.shape for key, one in theirs.items()}
    assert AutoTokenizer.from_pretrained(tmp_path / "target").chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_gguf_has_a_name_for_every_tensor(family):
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], 4)
    # Of some families llama.cpp has tied heads alone.
    tied = {} if MODEL_TENSOR.OUTPUT in MODEL_TENSORS[ARCHITECTURES[family]] else {"tie_word_embeddings": True}
    model = tiny_model(family, **tied)
    unnamed = [key for key, _ in model.named_parameters() if names.get_name(key, (".weight", ".bias")) is None]
    # Numbers of an activation (Apertus) are metadata of the file; the converter renames a bias (Qwen3.5).
    assert [key for key in unnamed if ".act_fn." not in key and not key.endswith(".dt_bias")] == []
