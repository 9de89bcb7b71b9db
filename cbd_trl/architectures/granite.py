"""Granite: Llama with multipliers on embeddings, attention scores, what is added to the stream, and logits.

The multipliers are constants of the config that no surgery changes. That of the embeddings is taken into the weights
(`embedding_scale`), as Gemma's is.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, MLP_BIASES, layer_tensors


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    if config.attention_bias:
        tensors |= ATTENTION_BIASES
    if config.mlp_bias:
        tensors |= MLP_BIASES
    return tensors


GRANITE = replace(
    LLAMA,
    model_types=("granite",),
    layer_tensors=_layer_tensors,
    embedding_scale=lambda config: float(config.embedding_multiplier),
)
