"""Phi-1, Phi-1.5 and Phi-2: LayerNorm, partial rotary attention and a plain FFN side by side, biases everywhere.

Attention and FFN read one norm, the sum of both is added to the stream, and the head has a bias. llama.cpp computes
the head size from width / heads, so the width is a number of whole heads.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Site
from cbd_trl.architectures.llama import LLAMA, QKV_BIASES, with_width_of_heads


def _tensors(config: Any) -> dict[str, str]:
    return {
        "model.embed_tokens.weight": "vocab width",
        "model.final_layernorm.weight": "width",
        "model.final_layernorm.bias": "width",
        "lm_head.weight": "vocab width",
        "lm_head.bias": "vocab",
    }


def _layer_tensors(config: Any) -> dict[str, str]:
    return {
        "input_layernorm.weight": "width",
        "input_layernorm.bias": "width",
        "self_attn.q_proj.weight": "group.query.dim width",
        "self_attn.k_proj.weight": "group.dim width",
        "self_attn.v_proj.weight": "group.dim width",
        **QKV_BIASES,
        "self_attn.dense.weight": "width group.query.dim",
        "self_attn.dense.bias": "width",
        "mlp.fc1.weight": "ffn width",
        "mlp.fc1.bias": "ffn",
        "mlp.fc2.weight": "width ffn",
        "mlp.fc2.bias": "width",
    }


def _check(config: Any) -> None:
    if config.qk_layernorm:
        raise ValueError(
            "phi with qk_layernorm=True is not supported: its queries and keys go through LayerNorms with biases, and "
            "norms over an output are RMSNorms here. Supported: qk_layernorm=False, as in Phi-1, Phi-1.5 and Phi-2."
        )


PHI = replace(
    with_width_of_heads(LLAMA, "Phi"),
    model_types=("phi",),
    tensors=_tensors,
    layer_tensors=_layer_tensors,
    sites=(
        Site(
            "input_layernorm",
            ("width",),
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
            norm=True,
        ),
        Site("self_attn.dense", ("group", "query", "dim"), ("self_attn.dense",), norm=False),
        Site("mlp.fc2", ("ffn",), ("mlp.fc2",), norm=False),
    ),
    final_site=Site("model.final_layernorm", ("width",), ("lm_head",), norm=True),
    norm_type="layer",
    eps_field="layer_norm_eps",
    check=_check,
)
