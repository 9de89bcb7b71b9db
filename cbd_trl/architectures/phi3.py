"""Phi-3 and Phi-4: Llama with q, k, v and gate, up stored as one tensor each.

Described as the Llama it is; the fused tensors are split when weights are read and joined when they are written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cbd_trl.architectures.base import WidthOfHeads
from cbd_trl.architectures.llama import LLAMA

_WIDTH = WidthOfHeads("Phi-3 with longrope", "hidden_size", "num_attention_heads")


def _is_longrope(config: Any) -> bool:
    return bool(config.rope_parameters["rope_type"] == "longrope")


def _assign_longrope(config: Any, sizes: Mapping[str, int]) -> None:
    _WIDTH.check(sizes)
    LLAMA.assign(config, sizes)


def _resolve_longrope(sizes: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    return _WIDTH.with_width(LLAMA.resolve(sizes, _WIDTH.with_heads(sizes, given)), given)


PHI3 = dataclasses.replace(
    LLAMA,
    model_types=("phi3",),
    fused={
        "self_attn.qkv_proj.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
        "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    },
)

# One factor a rotary frequency, whose number transformers checks against width / heads, not against the head size.
PHI3_LONGROPE = dataclasses.replace(PHI3, when=_is_longrope, assign=_assign_longrope, resolve=_resolve_longrope)
