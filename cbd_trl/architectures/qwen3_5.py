"""Qwen3.5 (text): layers with a gated DeltaNet and, every fourth, one with gated attention, each in front of an FFN.

A DeltaNet mixes tokens by a short convolution and a linear recurrence. Its heads are kept, whatever the width. Its
norm shares the epsilon of the others and normalizes what comes from behind an activation, so growth in width leaves
the epsilon as it is. Each query head of an attention layer has as many rows again in `q_proj`, which gate its output.
Gains are stored as 1 + w, but for that of the DeltaNet.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Site
from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, QK_NORMS, layer_tensors

_DELTA_NET = {
    "linear_attn.in_proj_qkv.weight": "mixed width",
    "linear_attn.in_proj_z.weight": "value_head.value_dim width",
    "linear_attn.in_proj_b.weight": "value_head width",
    "linear_attn.in_proj_a.weight": "value_head width",
    "linear_attn.conv1d.weight": "mixed one kernel",
    "linear_attn.A_log": "value_head",
    "linear_attn.dt_bias": "value_head",
    "linear_attn.norm.weight": "value_dim",
    "linear_attn.out_proj.weight": "width value_head.value_dim",
}
_QUERIES_AND_GATES = {
    "self_attn.q_proj.weight": "group.query.gate.dim width",
    "self_attn.q_norm.weight": "dim",
    "self_attn.k_norm.weight": "dim",
}
_KEPT = "a chain keeps the heads of the linear layers, whose rows for queries, keys and values lie in one tensor"


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config) | _QUERIES_AND_GATES | _DELTA_NET
    if config.attention_bias:
        tensors |= ATTENTION_BIASES | {"self_attn.q_proj.bias": "group.query.gate.dim"}
    return tensors


def _sizes(config: Any) -> dict[str, int]:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    own = {
        "gate": 2,
        "mixed": 2 * keys + values,
        "value_head": config.linear_num_value_heads,
        "value_dim": config.linear_value_head_dim,
        "kernel": config.linear_conv_kernel_dim,
        "one": 1,
    }
    return {**LLAMA.sizes(config), **own}


_READS, _HEADS, *_FFN = LLAMA.sites
_IN_PROJECTIONS = tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a"))

QWEN3_5 = replace(
    LLAMA,
    model_types=("qwen3_5_text",),
    layer_tensors=_layer_tensors,
    sites=(
        replace(_READS, readers=(*_READS.readers, *_IN_PROJECTIONS)),
        _HEADS,
        Site("linear_attn.out_proj", ("value_head", "value_dim"), ("linear_attn.out_proj",), norm=False),
        *_FFN,
    ),
    sizes=_sizes,
    output_norms=lambda config: QK_NORMS,
    gain_offset=1.0,
    per_layer_fields=("layer_types",),
    engine_patterns={"qwen3_5_text": {"layer_types": (*["linear_attention"] * 3, "full_attention")}},
    own_modules={"self_attn": "full_attention", "linear_attn": "linear_attention"},
    kept_fields=dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), _KEPT),
    fixed_eps=True,
)
