"""Hunyuan (dense): Llama with norms of each head's queries and keys, taken after the rotation.

A rotation changes neither the length of a vector nor what a factor does to it, so these norms are like Qwen3's.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, layer_tensors


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    tensors |= {"self_attn.query_layernorm.weight": "dim", "self_attn.key_layernorm.weight": "dim"}
    return tensors | ATTENTION_BIASES if config.attention_bias else tensors


HUNYUAN = replace(
    LLAMA,
    model_types=("hunyuan_v1_dense",),
    layer_tensors=_layer_tensors,
    output_norms=lambda config: {
        "self_attn.q_proj": "self_attn.query_layernorm",
        "self_attn.k_proj": "self_attn.key_layernorm",
    },
)
