"""Ministral (8B, 2410): Mistral whose windowed and full layers are listed in `layer_types`, which travel with them."""

from dataclasses import replace

from cbd_trl.architectures.llama import LLAMA

MINISTRAL = replace(LLAMA, model_types=("ministral",), per_layer_fields=("layer_types",), engine_patterns={})
