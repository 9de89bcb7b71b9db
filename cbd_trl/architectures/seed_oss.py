"""Seed-OSS: Llama with biases on queries, keys and values, on what the attention writes, and in the FFN, by option."""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.llama import LLAMA, MLP_BIASES, QKV_BIASES, layer_tensors


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    if config.attention_bias:
        tensors |= QKV_BIASES
    if config.attention_out_bias:
        tensors |= {"self_attn.o_proj.bias": "width"}
    if config.mlp_bias:
        tensors |= MLP_BIASES
    return tensors


SEED_OSS = replace(LLAMA, model_types=("seed_oss",), layer_tensors=_layer_tensors)
