"""Tiny models with random gains, biases and norms: freshly initialised ones (gains 1, biases 0) hide bugs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a family calls its fields, where its config class does not take the common names; None: it has no such field.
_OWN_NAMES: dict[str, dict[str, str | None]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": None,
        "max_position_embeddings": "n_positions",
    },
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"intermediate_size": "ffn_dim", "num_key_value_heads": None},
}
# Phi-3's, for a head size of 8: positions past 16 take the other factors.
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
    "original_max_position_embeddings": 16,
}
# Their width is heads x head size, and their norms are LayerNorms.
WIDTH_OF_HEADS = tuple(_OWN_NAMES)
# Sliding and full layers in turn, a window shorter than the tests' rows, and caps that the logits feel.
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 6, "final_logit_softcapping": 3.0}
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 8, "sliding_window": 6}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"head_dim": 8}),
    "smollm3": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {**_GEMMA, "attn_logit_softcapping": 1.0}),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, {**_GEMMA, "sliding_window_pattern": 3}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "gpt2": (
        GPT2Config,
        GPT2LMHeadModel,
        {"n_inner": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"rotary_pct": 0.5}),
    "opt": (OPTConfig, OPTForCausalLM, {"dropout": 0.0}),
}
FAMILIES = list(_FAMILIES)
# Families that surgery treats alike, by the one that stands for them where a test goes from end to end; the others
# have their turn in `make test-slow`. Tests of single operations run in every family.
KINDS: dict[str, tuple[str, ...]] = {
    "llama": ("mistral", "qwen2"),  # RMSNorm before, grouped heads, biases or none
    "phi3": (),  # projections that are stored as one tensor
    "gemma3_text": ("gemma2", "qwen3", "smollm3"),  # layers of several types, gains of heads, scaled embeddings
    "olmo2": (),  # norms after, and over all heads
    "gpt2": ("opt",),  # LayerNorm, learned positions
    "gpt_neox": (),  # LayerNorm, parallel layers, heads stored in turn
}
assert sorted([*KINDS, *sum(KINDS.values(), ())]) == sorted(FAMILIES), "every family is of one kind"
# transformers has no soft-capping of attention scores in SDPA.
SDPA_FAMILIES = [family for family in FAMILIES if family != "gemma2"]


def by_kind(families: Sequence[str] = FAMILIES) -> list[Any]:
    """Parameters for a test from end to end: one family of a kind, and the others marked `slow`."""
    return [pytest.param(family, marks=() if family in KINDS else pytest.mark.slow) for family in families]


def own_names(family: str, **fields: Any) -> dict[str, Any]:
    """Config fields by the names that the family has for them; those it does not have are left out."""
    names = {field: _OWN_NAMES.get(family, {}).get(field, field) for field in fields}
    return {name: fields[field] for field, name in names.items() if name is not None}


def tiny_model(family: str, *, seed: int = 0, attn_implementation: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """A causal LM of 4 layers, width 32 and 64 vocabulary rows, the same for the same seed.

    Args:
        family: one of `FAMILIES`.
        seed: of the weights: standard deviation 0.2, gains around 1.
        attn_implementation: sdpa (where the family has it) or eager.
        overrides: config fields, by the family's own names.

    Returns:
        the model, float32, in eval mode.
    """
    config_class, model_class, own = _FAMILIES[family]
    if family not in SDPA_FAMILIES:
        attn_implementation = "eager"
    config = config_class(**{**own_names(family, **_SHAPE), **own, **overrides})
    model = model_class._from_config(config, attn_implementation=attn_implementation)
    randomise(model, seed)
    return model.eval()


def randomise(model: Any, seed: int = 0) -> None:
    """Draw every parameter anew: gains around 1 (Gemma stores them less 1), the rest around 0, deviation 0.2.

    Args:
        model: changed in place.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    gain = 0.0 if model.config.model_type in ("gemma2", "gemma3_text") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = gain if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
