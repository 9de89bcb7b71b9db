"""GPT-2: LayerNorm, learned positions, full attention with a transposed, fused qkv, plain FFN."""

from collections.abc import Mapping
from typing import Any

from cbd_trl.architectures.family import Family, Site


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
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}: GPT-2 splits its width evenly into "
            "heads. Choose a multiple."
        )
    return {
        "vocab": config.vocab_size,
        "position": config.n_positions,
        "width": config.n_embd,
        "ffn": config.n_inner if config.n_inner is not None else 4 * config.n_embd,
        "group": config.n_head,
        "query": 1,
        "dim": config.n_embd // config.n_head,
        "part": 3,
    }


def _assign(config: Any, sizes: Mapping[str, int]) -> None:
    if sizes["width"] != sizes["group"] * sizes["dim"]:
        raise ValueError(
            f"GPT-2 ties its width to its heads: n_embd={sizes['width']} needs n_embd / {sizes['dim']} heads of size "
            f"{sizes['dim']}, got n_head={sizes['group']}. Choose n_embd = {sizes['dim']} x n_head."
        )
    config.n_embd = sizes["width"]
    config.n_head = sizes["group"]
    config.n_inner = sizes["ffn"]


def _resolve(sizes: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    width, dim = given.get("width"), sizes["dim"]
    heads = given.get("heads", sizes["group"] if width is None else width // dim)
    width = heads * dim if width is None else width
    if width != heads * dim:
        raise ValueError(
            f"GPT-2 ties its width to its heads (head size {dim}): got n_embd={width} with n_head={heads}. "
            f"Choose n_embd = {dim} x n_head."
        )
    # A plain GPT-2 has an FFN four times its width; keep that ratio unless told otherwise.
    ffn = given.get("ffn", 4 * width if sizes["ffn"] == 4 * sizes["width"] else sizes["ffn"])
    return {**sizes, "width": width, "group": heads, "ffn": ffn}


def _check(config: Any) -> None:
    for option in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        if getattr(config, option, False):
            raise ValueError(
                f"GPT-2 with {option}=True is not supported: its layers cannot be moved or cut without changing what "
                f"they compute. Supported: {option}=False."
            )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("The model is quantised; weights are cut and mixed in floating point. Load it dequantised.")


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
