"""EXAONE 4: OLMo 2 with norms of each head's queries and keys; the 32B has windowed and full layers in turn.

There the windowed layers have rotary positions and the full ones none: both by `layer_types`, which travel with their
layers. Where no window is set, every layer is full and rotary.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.llama import layer_tensors
from cbd_trl.architectures.olmo import OLMO


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    del tensors["input_layernorm.weight"]
    return tensors | {
        "post_feedforward_layernorm.weight": "width",
        "self_attn.q_norm.weight": "dim",
        "self_attn.k_norm.weight": "dim",
    }


EXAONE4 = replace(
    OLMO,
    model_types=("exaone4",),
    layer_tensors=_layer_tensors,
)

EXAONE4_WINDOWED = replace(
    EXAONE4,
    when=lambda config: config.sliding_window is not None,
    engine_patterns={"exaone4": {"layer_types": (*["sliding_attention"] * 3, "full_attention")}},
)
