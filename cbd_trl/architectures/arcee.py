"""Arcee (AFM): Llama with a plain FFN, two matrices around a squared ReLU."""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Site
from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, MLP_BIASES, layer_tensors


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    if config.attention_bias:
        tensors |= ATTENTION_BIASES
    if config.mlp_bias:
        tensors |= MLP_BIASES
    return {name: axes for name, axes in tensors.items() if not name.startswith("mlp.gate_proj.")}


ARCEE = replace(
    LLAMA,
    model_types=("arcee",),
    layer_tensors=_layer_tensors,
    sites=(
        *LLAMA.sites[:2],
        Site("post_attention_layernorm", ("width",), ("mlp.up_proj",), norm=True),
        LLAMA.sites[3],
    ),
)
