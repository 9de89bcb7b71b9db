"""LFM2 (dense): layers with a short convolution, and some with attention, each in front of a gated FFN.

A convolution has as many channels as the stream, each by itself between two gates, so these are coordinates of their
own in every layer, which are sorted and cut with the width. The FFN width of the config is rounded where
`block_auto_adjust_ff_dim` says so; a cut writes the width itself.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Site
from cbd_trl.architectures.llama import LLAMA

_CONV = {
    "conv.in_proj.weight": "part.conv width",
    "conv.conv.weight": "conv one kernel",
    "conv.out_proj.weight": "width conv",
}
_CONV_BIASES = {"conv.in_proj.bias": "part.conv", "conv.conv.bias": "conv", "conv.out_proj.bias": "width"}


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = {
        "operator_norm.weight": "width",
        "self_attn.q_proj.weight": "group.query.dim width",
        "self_attn.k_proj.weight": "group.dim width",
        "self_attn.v_proj.weight": "group.dim width",
        "self_attn.q_layernorm.weight": "dim",
        "self_attn.k_layernorm.weight": "dim",
        "self_attn.out_proj.weight": "width group.query.dim",
        **_CONV,
        "ffn_norm.weight": "width",
        "feed_forward.w1.weight": "ffn width",
        "feed_forward.w3.weight": "ffn width",
        "feed_forward.w2.weight": "width ffn",
    }
    return tensors | _CONV_BIASES if config.conv_bias else tensors


def _ffn(config: Any) -> int:
    width: int = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is None:
        return width
    multiple = config.block_multiple_of
    return -(-int(config.block_ffn_dim_multiplier * width) // multiple) * multiple


def _sizes(config: Any) -> dict[str, int]:
    own = {"ffn": _ffn(config), "conv": config.hidden_size, "part": 3, "kernel": config.conv_L_cache, "one": 1}
    return {**LLAMA.sizes(config), **own}


def _assign(config: Any, sizes: Mapping[str, int]) -> None:
    if sizes["ffn"] != _ffn(config):
        config.block_auto_adjust_ff_dim = False
    adjusted = config.intermediate_size
    LLAMA.assign(config, sizes)
    if config.block_auto_adjust_ff_dim:
        config.intermediate_size = adjusted


def _resolve(sizes: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    resolved = LLAMA.resolve(sizes, given)
    return {**resolved, "conv": resolved["width"]}


LFM2 = replace(
    LLAMA,
    model_types=("lfm2",),
    tensors=lambda config: {
        "model.embed_tokens.weight": "vocab width",
        "model.embedding_norm.weight": "width",
        "lm_head.weight": "vocab width",
    },
    layer_tensors=_layer_tensors,
    sites=(
        Site(
            "operator_norm",
            ("width",),
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "conv.in_proj"),
            norm=True,
        ),
        Site("self_attn.out_proj", ("group", "query", "dim"), ("self_attn.out_proj",), norm=False),
        Site("conv.out_proj", ("conv",), ("conv.out_proj",), norm=False),
        Site("ffn_norm", ("width",), ("feed_forward.w1", "feed_forward.w3"), norm=True),
        Site("feed_forward.w2", ("ffn",), ("feed_forward.w2",), norm=False),
    ),
    final_site=Site("model.embedding_norm", ("width",), ("lm_head",), norm=True),
    sizes=_sizes,
    assign=_assign,
    resolve=_resolve,
    eps_field="norm_eps",
    output_norms=lambda config: {
        "self_attn.q_proj": "self_attn.q_layernorm",
        "self_attn.k_proj": "self_attn.k_layernorm",
    },
    per_layer_fields=("layer_types",),
    engine_patterns={},
    own_modules={"self_attn": "full_attention", "conv": "conv"},
    index_fields=("full_attn_idxs",),
)
