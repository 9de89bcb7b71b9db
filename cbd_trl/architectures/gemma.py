"""Gemma 2 and 3 (text): gains stored as 1 + w, scaled embeddings, norms before and after attention and FFN.

Their head size, attention scale (`query_pre_attn_scalar`) and soft-caps are constants of the config that no surgery
changes; sliding and full layers alternate by `layer_types`, which travel with their layers (llama.cpp counts instead).
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Site
from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, QK_NORMS, layer_tensors


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    tensors |= {"pre_feedforward_layernorm.weight": "width", "post_feedforward_layernorm.weight": "width"}
    if config.attention_bias:
        tensors |= ATTENTION_BIASES
    if config.model_type == "gemma3_text":
        tensors |= {"self_attn.q_norm.weight": "dim", "self_attn.k_norm.weight": "dim"}
    return tensors


def _output_norms(config: Any) -> dict[str, str]:
    norms = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"}
    return {**norms, **QK_NORMS} if config.model_type == "gemma3_text" else norms


def _check(config: Any) -> None:
    if config.use_bidirectional_attention:
        raise ValueError(
            f"{config.model_type} with use_bidirectional_attention=True attends to later tokens, so it is an encoder "
            "and no language model to distill next-token predictions from. Supported: use_bidirectional_attention="
            "False."
        )


GEMMA = replace(
    LLAMA,
    model_types=("gemma2", "gemma3_text"),
    layer_tensors=_layer_tensors,
    sites=(
        Site("input_layernorm", ("width",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm=True),
        Site("self_attn.o_proj", ("group", "query", "dim"), ("self_attn.o_proj",), norm=False),
        Site("pre_feedforward_layernorm", ("width",), ("mlp.gate_proj", "mlp.up_proj"), norm=True),
        Site("mlp.down_proj", ("ffn",), ("mlp.down_proj",), norm=False),
    ),
    check=_check,
    output_norms=_output_norms,
    gain_offset=1.0,
    embedding_scale=lambda config: float(config.hidden_size**0.5),
    engine_patterns={
        "gemma2": {"layer_types": ("sliding_attention", "full_attention")},
        "gemma3_text": {"layer_types": (*["sliding_attention"] * 5, "full_attention")},
    },
)
