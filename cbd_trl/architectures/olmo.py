"""OLMo 2 and 3: layers read the raw residual stream; norms after attention, FFN, and all heads' q and k.

OLMo 3 has windowed and full layers, each type with rotary settings of its own: `layer_types` travel with their layers
(llama.cpp counts instead).
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Site
from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, QK_NORMS, layer_tensors


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    del tensors["input_layernorm.weight"]
    tensors |= {
        "post_feedforward_layernorm.weight": "width",
        "self_attn.q_norm.weight": "group.query.dim",
        "self_attn.k_norm.weight": "group.dim",
    }
    return tensors | ATTENTION_BIASES if config.attention_bias else tensors


OLMO = replace(
    LLAMA,
    model_types=("olmo2", "olmo3"),
    layer_tensors=_layer_tensors,
    sites=(
        Site("self_attn.q_proj", ("width",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm=False),
        Site("self_attn.o_proj", ("group", "query", "dim"), ("self_attn.o_proj",), norm=False),
        Site("mlp.gate_proj", ("width",), ("mlp.gate_proj", "mlp.up_proj"), norm=False),
        Site("mlp.down_proj", ("ffn",), ("mlp.down_proj",), norm=False),
    ),
    output_norms=lambda config: {
        **QK_NORMS,
        "self_attn.o_proj": "post_attention_layernorm",
        "mlp.down_proj": "post_feedforward_layernorm",
    },
    engine_patterns={"olmo3": {"layer_types": (*["sliding_attention"] * 3, "full_attention")}},
)
