"""Llama, Mistral, Ministral, Qwen2, Qwen3 and SmolLM3: RMSNorm, rotary grouped-query attention, gated FFN.

What other families share with them is read from here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Family, Site, WidthOfHeads

QKV_BIASES = {
    "self_attn.q_proj.bias": "group.query.dim",
    "self_attn.k_proj.bias": "group.dim",
    "self_attn.v_proj.bias": "group.dim",
}
ATTENTION_BIASES = {**QKV_BIASES, "self_attn.o_proj.bias": "width"}
MLP_BIASES = {"mlp.gate_proj.bias": "ffn", "mlp.up_proj.bias": "ffn", "mlp.down_proj.bias": "width"}
QK_NORMS = {"self_attn.q_proj": "self_attn.q_norm", "self_attn.k_proj": "self_attn.k_norm"}


def _tensors(config: Any) -> dict[str, str]:
    return {"model.embed_tokens.weight": "vocab width", "model.norm.weight": "width", "lm_head.weight": "vocab width"}


def layer_tensors(config: Any) -> dict[str, str]:
    """{name: axes} inside one layer."""
    tensors = {
        "input_layernorm.weight": "width",
        "self_attn.q_proj.weight": "group.query.dim width",
        "self_attn.k_proj.weight": "group.dim width",
        "self_attn.v_proj.weight": "group.dim width",
        "self_attn.o_proj.weight": "width group.query.dim",
        "post_attention_layernorm.weight": "width",
        "mlp.gate_proj.weight": "ffn width",
        "mlp.up_proj.weight": "ffn width",
        "mlp.down_proj.weight": "width ffn",
    }
    # Only where the family reads the option: a config may carry stray fields.
    if config.model_type == "qwen2":
        tensors |= QKV_BIASES
    if config.model_type in ("llama", "qwen3", "smollm3") and config.attention_bias:
        tensors |= ATTENTION_BIASES
    if config.model_type in ("llama", "smollm3") and config.mlp_bias:
        tensors |= MLP_BIASES
    if config.model_type == "qwen3":
        tensors |= {"self_attn.q_norm.weight": "dim", "self_attn.k_norm.weight": "dim"}
    return tensors


def _sizes(config: Any) -> dict[str, int]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise ValueError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}: every key/value head "
            "serves the same number of query heads. Choose a multiple."
        )
    return {
        "vocab": config.vocab_size,
        "width": config.hidden_size,
        "ffn": config.intermediate_size,
        "group": groups,
        "query": heads // groups,
        "dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def _assign(config: Any, sizes: Mapping[str, int]) -> None:
    config.hidden_size = sizes["width"]
    config.intermediate_size = sizes["ffn"]
    config.num_key_value_heads = sizes["group"]
    config.num_attention_heads = sizes["group"] * sizes["query"]
    # Pinned, or transformers would derive another head size from the new width.
    config.head_dim = sizes["dim"]


def _resolve(sizes: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    resolved = {**sizes, **{dim: value for dim, value in given.items() if dim != "heads"}}
    heads = given.get("heads")
    if heads is None:
        return resolved
    if "group" not in given:
        # Fewer heads of the same kind: whole key/value groups go, the queries per group stay.
        resolved["group"] = heads // sizes["query"] if heads % sizes["query"] == 0 else sizes["group"]
    if heads % resolved["group"]:
        raise ValueError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={resolved['group']}: every "
            "key/value head serves the same number of query heads. Set both."
        )
    resolved["query"] = heads // resolved["group"]
    return resolved


LLAMA = Family(
    model_types=("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3"),
    layers="model.layers",
    depth_field="num_hidden_layers",
    tensors=_tensors,
    layer_tensors=layer_tensors,
    sites=(
        Site("input_layernorm", ("width",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm=True),
        Site("self_attn.o_proj", ("group", "query", "dim"), ("self_attn.o_proj",), norm=False),
        Site("post_attention_layernorm", ("width",), ("mlp.gate_proj", "mlp.up_proj"), norm=True),
        Site("mlp.down_proj", ("ffn",), ("mlp.down_proj",), norm=False),
    ),
    final_site=Site("model.norm", ("width",), ("lm_head",), norm=True),
    embedding="model.embed_tokens",
    head="lm_head",
    sizes=_sizes,
    assign=_assign,
    shape_fields={
        "num_hidden_layers": "layer",
        "hidden_size": "width",
        "intermediate_size": "ffn",
        "num_attention_heads": "heads",
        "num_key_value_heads": "group",
    },
    resolve=_resolve,
    norm_type="rms",
    eps_field="rms_norm_eps",
    check=lambda config: None,
    output_norms=lambda config: QK_NORMS if config.model_type == "qwen3" else {},
    per_layer_fields=("layer_types", "no_rope_layers"),
    engine_patterns={"smollm3": {"no_rope_layers": (1, 1, 1, 0)}},
)

# Attention and FFN read one norm and are added to the stream together.
PARALLEL_SITES = (
    Site("input_layernorm", ("width",), LLAMA.sites[0].readers + LLAMA.sites[2].readers, norm=True),
    LLAMA.sites[1],
    LLAMA.sites[3],
)


def with_width_of_heads(family: Family, name: str) -> Family:
    """Tie the width of a family with grouped-query heads to these: width = heads x head size.

    Args:
        family: as it is without.
        name: of it, for a reader.
    """
    width = WidthOfHeads(name, "hidden_size", "num_attention_heads")

    def assign(config: Any, sizes: Mapping[str, int]) -> None:
        width.check(sizes)
        family.assign(config, sizes)

    def resolve(sizes: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
        return width.with_width(family.resolve(sizes, width.with_heads(sizes, given)), given)

    return replace(family, assign=assign, resolve=resolve)
