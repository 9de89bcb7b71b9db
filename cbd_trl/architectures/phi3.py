"""Phi-3 and Phi-4: Llama with q, k, v and gate, up stored as one tensor each.

Described as the Llama it is; the fused tensors are split when weights are read and joined when they are written.
"""

import dataclasses
from typing import Any

from cbd_trl.architectures.base import Fused
from cbd_trl.architectures.llama import LLAMA, with_width_of_heads


def _is_longrope(config: Any) -> bool:
    return bool(config.rope_parameters["rope_type"] == "longrope")


PHI3 = dataclasses.replace(
    LLAMA,
    model_types=("phi3",),
    fused={
        "self_attn.qkv_proj.weight": Fused(tuple(f"self_attn.{name}_proj.weight" for name in "qkv")),
        "mlp.gate_up_proj.weight": Fused(("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    },
)

# One factor a rotary frequency, whose number transformers checks against width / heads, not against the head size.
PHI3_LONGROPE = dataclasses.replace(with_width_of_heads(PHI3, "Phi-3 with longrope"), when=_is_longrope)
