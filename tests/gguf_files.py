"""Write a model folder as GGUF, as llama.cpp's converter does it for families that transformers reads back."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import MODEL_ARCH
from safetensors.torch import load_file

from tests.tiny import ROWS


def write_gguf(folder: Path, file: Path) -> None:
    """Write the weights in float32: names by gguf's own table, heads and gains in llama.cpp's order and scale.

    Args:
        folder: of a model of the families llama, qwen2 or gemma3_text.
        file: what is written.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = MODEL_ARCH[ROWS[config["model_type"]].gguf or ""]
    rotary = config["rope_parameters"]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rotary.get("full_attention", rotary)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if head_size := config.get("head_dim"):
        writer.add_rope_dimension_count(head_size)
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {"q_proj.weight": config["num_attention_heads"], "k_proj.weight": config["num_key_value_heads"]}
    for key, tensor in load_file(folder / "model.safetensors").items():
        count = heads.get(".".join(key.split(".")[-2:]))
        if architecture is MODEL_ARCH.LLAMA and count is not None:
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        if architecture is MODEL_ARCH.GEMMA3 and key.endswith("norm.weight"):
            tensor = tensor + 1
        name = names.get_name(key, (".weight", ".bias"))
        assert name is not None, key
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
