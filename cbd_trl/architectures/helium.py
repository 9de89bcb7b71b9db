"""Helium: Llama whose width is heads x head size; its attention's output projection has no bias."""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.llama import LLAMA, MLP_BIASES, QKV_BIASES, layer_tensors, with_width_of_heads


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    if config.attention_bias:
        tensors |= QKV_BIASES
    if config.mlp_bias:
        tensors |= MLP_BIASES
    return tensors


HELIUM = replace(
    with_width_of_heads(LLAMA, "Helium"),
    model_types=("helium",),
    layer_tensors=_layer_tensors,
)
