"""Tiny models with random gains, biases and norms: freshly initialised ones (gains 1, biases 0) hide bugs."""

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
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
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 8, "sliding_window": 6}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"head_dim": 8}),
    "gpt2": (
        GPT2Config,
        GPT2LMHeadModel,
        {"n_inner": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"rotary_pct": 0.5}),
    "opt": (OPTConfig, OPTForCausalLM, {"dropout": 0.0}),
}
FAMILIES = list(_FAMILIES)


def own_names(family: str, **fields: Any) -> dict[str, Any]:
    """Config fields by the names that the family has for them; those it does not have are left out."""
    names = {field: _OWN_NAMES.get(family, {}).get(field, field) for field in fields}
    return {name: fields[field] for field, name in names.items() if name is not None}


def tiny_model(family: str, *, seed: int = 0, attn_implementation: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """A causal LM of 4 layers, width 32 and 64 vocabulary rows, the same for the same seed.

    Args:
        family: one of `FAMILIES`.
        seed: of the weights: standard deviation 0.2, gains around 1.
        attn_implementation: sdpa or eager.
        overrides: config fields, by the family's own names.

    Returns:
        the model, float32, in eval mode.
    """
    config_class, model_class, own = _FAMILIES[family]
    config = config_class(**{**own_names(family, **_SHAPE), **own, **overrides})
    model = model_class._from_config(config, attn_implementation=attn_implementation)
    randomise(model, seed)
    return model.eval()


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew: gains around 1, everything else around 0, standard deviation 0.2.

    Args:
        model: changed in place.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
