"""StableLM (3B, 2 1.6B, Zephyr): Llama with LayerNorms and partial rotary attention, and biases of q, k, v or none.

Where `use_parallel_residual` is set, attention and FFN read one norm and are added to the stream together. The width
is heads x head size.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.llama import LLAMA, PARALLEL_SITES, QKV_BIASES, layer_tensors, with_width_of_heads


def _tensors(config: Any) -> dict[str, str]:
    return {**LLAMA.tensors(config), "model.norm.bias": "width"}


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = layer_tensors(config)
    tensors |= {"input_layernorm.bias": "width", "post_attention_layernorm.bias": "width"}
    if config.use_parallel_residual:
        del tensors["post_attention_layernorm.weight"], tensors["post_attention_layernorm.bias"]
    return tensors | QKV_BIASES if config.use_qkv_bias else tensors


def _check(config: Any) -> None:
    if config.qk_layernorm:
        raise ValueError(
            "stablelm with qk_layernorm=True (StableLM 2 12B) is not supported: each head has a LayerNorm of its own, "
            "a module for each, and heads are moved and dropped as rows of one tensor. Supported: qk_layernorm=False."
        )


STABLELM = replace(
    with_width_of_heads(LLAMA, "StableLM"),
    model_types=("stablelm",),
    tensors=_tensors,
    layer_tensors=_layer_tensors,
    norm_type="layer",
    eps_field="layer_norm_eps",
    check=_check,
)

STABLELM_PARALLEL = replace(STABLELM, when=lambda config: config.use_parallel_residual, sites=PARALLEL_SITES)
