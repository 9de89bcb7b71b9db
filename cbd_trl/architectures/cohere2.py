"""Cohere 2 (Command R7B, Command A): Llama's attention and FFN side by side, under one LayerNorm without a bias.

Sliding layers have rotary positions and full ones have none, by `layer_types`, which travel with their layers
(llama.cpp counts instead). The logit scale is a constant of the config. transformers and llama.cpp compute the head
size from width / heads, so the width is a number of whole heads.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, PARALLEL_SITES, layer_tensors, with_width_of_heads


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    del tensors["post_attention_layernorm.weight"]
    return tensors | ATTENTION_BIASES if config.attention_bias else tensors


COHERE2 = replace(
    with_width_of_heads(LLAMA, "Cohere 2"),
    model_types=("cohere2",),
    layer_tensors=_layer_tensors,
    sites=PARALLEL_SITES,
    norm_type="layer",
    eps_field="layer_norm_eps",
    engine_patterns={"cohere2": {"layer_types": (*["sliding_attention"] * 3, "full_attention")}},
)
