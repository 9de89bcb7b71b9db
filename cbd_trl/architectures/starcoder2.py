"""StarCoder2: Llama's grouped-query attention with LayerNorms, a plain FFN, and biases everywhere or nowhere."""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Site
from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA


def _tensors(config: Any) -> dict[str, str]:
    return {**LLAMA.tensors(config), "model.norm.bias": "width"}


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = {
        "input_layernorm.weight": "width",
        "input_layernorm.bias": "width",
        "self_attn.q_proj.weight": "group.query.dim width",
        "self_attn.k_proj.weight": "group.dim width",
        "self_attn.v_proj.weight": "group.dim width",
        "self_attn.o_proj.weight": "width group.query.dim",
        "post_attention_layernorm.weight": "width",
        "post_attention_layernorm.bias": "width",
        "mlp.c_fc.weight": "ffn width",
        "mlp.c_proj.weight": "width ffn",
    }
    if config.use_bias:
        tensors |= {**ATTENTION_BIASES, "mlp.c_fc.bias": "ffn", "mlp.c_proj.bias": "width"}
    return tensors


STARCODER2 = replace(
    LLAMA,
    model_types=("starcoder2",),
    tensors=_tensors,
    layer_tensors=_layer_tensors,
    sites=(
        *LLAMA.sites[:2],
        Site("post_attention_layernorm", ("width",), ("mlp.c_fc",), norm=True),
        Site("mlp.c_proj", ("ffn",), ("mlp.c_proj",), norm=False),
    ),
    norm_type="layer",
    eps_field="norm_epsilon",
)
