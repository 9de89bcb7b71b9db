"""ERNIE 4.5 (dense): Llama with biases everywhere or nowhere, and rotary pairs of neighboring coordinates.

Heads are never cut inside, so how their coordinates are paired does not matter to the surgery.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, MLP_BIASES, layer_tensors


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    return {**tensors, **ATTENTION_BIASES, **MLP_BIASES} if config.use_bias else tensors


ERNIE4_5 = replace(LLAMA, model_types=("ernie4_5",), layer_tensors=_layer_tensors)
