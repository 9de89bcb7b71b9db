"""GPT-2: LayerNorm, learned positions, full attention with a transposed, fused qkv, plain FFN."""

from collections.abc import Mapping
from typing import Any

from cbd_trl.architectures.base import Family, Site, WidthOfHeads

_WIDTH = WidthOfHeads("GPT-2", "n_embd", "n_head")


def _tensors(config: Any) -> dict[str, str]:
    return {
        "transformer.wte.weight": "vocab width",
        "transformer.wpe.weight": "position width",
        "transformer.ln_f.weight": "width",
        "transformer.ln_f.bias": "width",
        "lm_head.weight": "vocab width",
    }


def _layer_tensors(config: Any) -> dict[str, str]:
    # Conv1D stores (in, out); c_attn holds q, k and v one after the other ("part").
    return {
        "ln_1.weight": "width",
        "ln_1.bias": "width",
        "attn.c_attn.weight": "width part.group.dim",
        "attn.c_attn.bias": "part.group.dim",
        "attn.c_proj.weight": "group.dim width",
        "attn.c_proj.bias": "width",
        "ln_2.weight": "width",
        "ln_2.bias": "width",
        "mlp.c_fc.weight": "width ffn",
        "mlp.c_fc.bias": "ffn",
        "mlp.c_proj.weight": "ffn width",
        "mlp.c_proj.bias": "width",
    }


def _sizes(config: Any) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "position": config.n_positions,
        "width": config.n_embd,
        "ffn": config.n_inner if config.n_inner is not None else 4 * config.n_embd,
        "group": config.n_head,
        "query": 1,
        "dim": _WIDTH.head_size(config.n_embd, config.n_head),
        "part": 3,
    }


def _assign(config: Any, sizes: Mapping[str, int]) -> None:
    _WIDTH.check(sizes)
    config.n_embd = sizes["width"]
    config.n_head = sizes["group"]
    config.n_inner = sizes["ffn"]


def _resolve(sizes: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    resolved = _WIDTH.resolve(sizes, given)
    # A plain GPT-2 has an FFN four times its width; keep that ratio unless the FFN width is given.
    if "ffn" not in given and sizes["ffn"] == 4 * sizes["width"]:
        resolved["ffn"] = 4 * resolved["width"]
    return resolved


def _check(config: Any) -> None:
    for option in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        if getattr(config, option, False):
            raise ValueError(
                f"GPT-2 with {option}=True is not supported: its layers cannot be moved or cut without changing what "
                f"they compute. Supported: {option}=False."
            )


GPT2 = Family(
    model_types=("gpt2",),
    layers="transformer.h",
    depth_field="n_layer",
    tensors=_tensors,
    layer_tensors=_layer_tensors,
    sites=(
        Site("ln_1", ("width",), ("attn.c_attn",), norm=True),
        Site("attn.c_proj", ("group", "dim"), ("attn.c_proj",), norm=False),
        Site("ln_2", ("width",), ("mlp.c_fc",), norm=True),
        Site("mlp.c_proj", ("ffn",), ("mlp.c_proj",), norm=False),
    ),
    final_site=Site("transformer.ln_f", ("width",), ("lm_head",), norm=True),
    embedding="transformer.wte",
    head="lm_head",
    sizes=_sizes,
    assign=_assign,
    shape_fields={"n_layer": "layer", "n_embd": "width", "n_inner": "ffn", "n_head": "heads"},
    resolve=_resolve,
    norm_type="layer",
    eps_field="layer_norm_epsilon",
    check=_check,
)
