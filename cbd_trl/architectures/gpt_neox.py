"""GPT-NeoX and Pythia: LayerNorm, rotary attention with q, k and v interleaved head by head, plain FFN.

Where `use_parallel_residual` is set, attention and FFN read the same stream, each through its own norm: for the
surgery two sites like any others.
"""

from collections.abc import Mapping
from typing import Any

from cbd_trl.architectures.base import Family, Site, WidthOfHeads

_WIDTH = WidthOfHeads("GPT-NeoX", "hidden_size", "num_attention_heads")


def _tensors(config: Any) -> dict[str, str]:
    return {
        "gpt_neox.embed_in.weight": "vocab width",
        "gpt_neox.final_layer_norm.weight": "width",
        "gpt_neox.final_layer_norm.bias": "width",
        "lm_head.weight": "vocab width",
    }


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = {
        "input_layernorm.weight": "width",
        "input_layernorm.bias": "width",
        "attention.query_key_value.weight": "group.part.dim width",
        "attention.dense.weight": "width group.dim",
        "post_attention_layernorm.weight": "width",
        "post_attention_layernorm.bias": "width",
        "mlp.dense_h_to_4h.weight": "ffn width",
        "mlp.dense_h_to_4h.bias": "ffn",
        "mlp.dense_4h_to_h.weight": "width ffn",
        "mlp.dense_4h_to_h.bias": "width",
    }
    if config.attention_bias:
        tensors |= {"attention.query_key_value.bias": "group.part.dim", "attention.dense.bias": "width"}
    return tensors


def _sizes(config: Any) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "width": config.hidden_size,
        "ffn": config.intermediate_size,
        "group": config.num_attention_heads,
        "query": 1,
        "dim": _WIDTH.head_size(config.hidden_size, config.num_attention_heads),
        "part": 3,
    }


def _assign(config: Any, sizes: Mapping[str, int]) -> None:
    _WIDTH.check(sizes)
    config.hidden_size = sizes["width"]
    config.intermediate_size = sizes["ffn"]
    config.num_attention_heads = sizes["group"]


GPT_NEOX = Family(
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    depth_field="num_hidden_layers",
    tensors=_tensors,
    layer_tensors=_layer_tensors,
    sites=(
        Site("input_layernorm", ("width",), ("attention.query_key_value",), norm=True),
        Site("attention.dense", ("group", "dim"), ("attention.dense",), norm=False),
        Site("post_attention_layernorm", ("width",), ("mlp.dense_h_to_4h",), norm=True),
        Site("mlp.dense_4h_to_h", ("ffn",), ("mlp.dense_4h_to_h",), norm=False),
    ),
    final_site=Site("gpt_neox.final_layer_norm", ("width",), ("lm_head",), norm=True),
    embedding="gpt_neox.embed_in",
    head="lm_head",
    sizes=_sizes,
    assign=_assign,
    shape_fields={
        "num_hidden_layers": "layer",
        "hidden_size": "width",
        "intermediate_size": "ffn",
        "num_attention_heads": "heads",
    },
    resolve=_WIDTH.resolve,
    norm_type="layer",
    eps_field="layer_norm_eps",
    check=lambda config: None,
    file_names={"embed_out.weight": "lm_head.weight"},
)
