"""Apertus: Qwen3's attention, a plain FFN, and an activation (xIELU) with two learned numbers a layer.

The activation is the same for all neurons of a layer, so they can be moved and cut; its numbers are mixed as weights
are.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Site
from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, QK_NORMS


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = {
        "attention_layernorm.weight": "width",
        "self_attn.q_proj.weight": "group.query.dim width",
        "self_attn.k_proj.weight": "group.dim width",
        "self_attn.v_proj.weight": "group.dim width",
        "self_attn.o_proj.weight": "width group.query.dim",
        "self_attn.q_norm.weight": "dim",
        "self_attn.k_norm.weight": "dim",
        "feedforward_layernorm.weight": "width",
        "mlp.up_proj.weight": "ffn width",
        "mlp.down_proj.weight": "width ffn",
    }
    if config.attention_bias:
        tensors |= ATTENTION_BIASES
    if config.hidden_act == "xielu":
        tensors |= {"mlp.act_fn.alpha_p": "one", "mlp.act_fn.alpha_n": "one"}
    return tensors


APERTUS = replace(
    LLAMA,
    model_types=("apertus",),
    layer_tensors=_layer_tensors,
    # Of no config: transformers and llama.cpp read them from the weights.
    layer_constants=lambda config: (
        {"mlp.act_fn.beta": 0.5, "mlp.act_fn.eps": -1e-6} if config.hidden_act == "xielu" else {}
    ),
    sites=(
        Site(
            "attention_layernorm", ("width",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm=True
        ),
        LLAMA.sites[1],
        Site("feedforward_layernorm", ("width",), ("mlp.up_proj",), norm=True),
        LLAMA.sites[3],
    ),
    sizes=lambda config: {**LLAMA.sizes(config), "one": 1},
    output_norms=lambda config: QK_NORMS,
)
