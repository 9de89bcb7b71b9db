"""OPT: LayerNorm before each part, learned positions, attention with separate q, k and v, plain FFN."""

from collections.abc import Mapping
from typing import Any

from cbd_trl.architectures.base import Family, Site, WidthOfHeads

_WIDTH = WidthOfHeads("OPT", "hidden_size", "num_attention_heads")
# The position table starts with two rows that no position uses.
_POSITION_OFFSET = 2


def _tensors(config: Any) -> dict[str, str]:
    return {
        "model.decoder.embed_tokens.weight": "vocab width",
        "model.decoder.embed_positions.weight": "position width",
        "model.decoder.final_layer_norm.weight": "width",
        "model.decoder.final_layer_norm.bias": "width",
        "lm_head.weight": "vocab width",
    }


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = {
        "self_attn_layer_norm.weight": "width",
        "self_attn_layer_norm.bias": "width",
        "self_attn.q_proj.weight": "group.dim width",
        "self_attn.k_proj.weight": "group.dim width",
        "self_attn.v_proj.weight": "group.dim width",
        "self_attn.out_proj.weight": "width group.dim",
        "final_layer_norm.weight": "width",
        "final_layer_norm.bias": "width",
        "fc1.weight": "ffn width",
        "fc2.weight": "width ffn",
    }
    if config.enable_bias:
        tensors |= {f"self_attn.{name}_proj.bias": "group.dim" for name in "qkv"}
        tensors |= {"self_attn.out_proj.bias": "width", "fc1.bias": "ffn", "fc2.bias": "width"}
    return tensors


def _sizes(config: Any) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "position": config.max_position_embeddings + _POSITION_OFFSET,
        "width": config.hidden_size,
        "ffn": config.ffn_dim,
        "group": config.num_attention_heads,
        "query": 1,
        "dim": _WIDTH.head_size(config.hidden_size, config.num_attention_heads),
    }


def _assign(config: Any, sizes: Mapping[str, int]) -> None:
    _WIDTH.check(sizes)
    config.hidden_size = config.word_embed_proj_dim = sizes["width"]
    config.ffn_dim = sizes["ffn"]
    config.num_attention_heads = sizes["group"]


def _check(config: Any) -> None:
    if not config.do_layer_norm_before:
        raise ValueError(
            "OPT with do_layer_norm_before=False (opt-350m) is not supported: its norms sit on the stream itself, so "
            "the stream is no sum of what the layers write, and no layer can be added or moved without changing what "
            "all others compute. Supported: do_layer_norm_before=True."
        )
    if config.word_embed_proj_dim != config.hidden_size:
        raise ValueError(
            f"OPT with word_embed_proj_dim={config.word_embed_proj_dim} and hidden_size={config.hidden_size} is not "
            "supported: projections stand between the stream and both the embedding and the head, which are then not "
            "in the stream's coordinates, and those are what is sorted, cut and grown. Supported: equal values."
        )
    if not config.layer_norm_elementwise_affine:
        raise ValueError(
            "OPT with layer_norm_elementwise_affine=False is not supported: where the width changes, the gains take "
            "up what the norms divide by, and these norms have none. Supported: layer_norm_elementwise_affine=True."
        )
    if config._remove_final_layer_norm:
        raise ValueError(
            "OPT with _remove_final_layer_norm=True is not supported: the head then reads the stream itself, whose "
            "scale no gain could take up where the width changes. Supported: _remove_final_layer_norm=False."
        )


OPT = Family(
    model_types=("opt",),
    layers="model.decoder.layers",
    depth_field="num_hidden_layers",
    tensors=_tensors,
    layer_tensors=_layer_tensors,
    sites=(
        Site(
            "self_attn_layer_norm",
            ("width",),
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            norm=True,
        ),
        Site("self_attn.out_proj", ("group", "dim"), ("self_attn.out_proj",), norm=False),
        Site("final_layer_norm", ("width",), ("fc1",), norm=True),
        Site("fc2", ("ffn",), ("fc2",), norm=False),
    ),
    final_site=Site("model.decoder.final_layer_norm", ("width",), ("lm_head",), norm=True),
    embedding="model.decoder.embed_tokens",
    head="lm_head",
    sizes=_sizes,
    assign=_assign,
    shape_fields={
        "num_hidden_layers": "layer",
        "hidden_size": "width",
        "ffn_dim": "ffn",
        "num_attention_heads": "heads",
    },
    resolve=_WIDTH.resolve,
    norm_type="layer",
    eps_field=None,
    check=_check,
)
