"""Ministral 3: Mistral whose queries grow with the position.

That growth (`llama_4_scaling_beta` in `rope_parameters`) and the rotary settings are constants of the config.
"""

from dataclasses import replace

from cbd_trl.architectures.llama import LLAMA

MINISTRAL3 = replace(LLAMA, model_types=("ministral3",), per_layer_fields=(), engine_patterns={})
