"""OLMo 3: OLMo 2 with windowed and full layers, each type with rotary settings of its own.

`layer_types` travel with their layers; llama.cpp counts instead.
"""

from dataclasses import replace

from cbd_trl.architectures.olmo2 import OLMO2

OLMO3 = replace(
    OLMO2,
    model_types=("olmo3",),
    per_layer_fields=("layer_types",),
    engine_patterns={"olmo3": {"layer_types": (*["sliding_attention"] * 3, "full_attention")}},
)
