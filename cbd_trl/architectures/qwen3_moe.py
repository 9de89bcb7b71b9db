"""Qwen3 with a mixture of experts for its FFN: a router sends each token to a few of many small FFNs.

The experts of a layer are one dimension, their neurons another. transformers keeps all of them in two tensors, and
writes every matrix of every expert by itself.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Experts, Fused, Site
from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA, QK_NORMS

EXPERT_SITES = (
    *LLAMA.sites[:2],
    Site(
        "post_attention_layernorm",
        ("width",),
        ("mlp.gate", "mlp.experts.gate_proj", "mlp.experts.up_proj"),
        norm=True,
    ),
    Site("mlp.experts", ("ffn",), ("mlp.experts.down_proj",), norm=False, routed=True),
)


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = {name: axes for name, axes in LLAMA.layer_tensors(config).items() if not name.startswith("mlp.")}
    tensors |= {
        "self_attn.q_norm.weight": "dim",
        "self_attn.k_norm.weight": "dim",
        "mlp.gate.weight": "expert width",
        "mlp.experts.gate_proj.weight": "expert ffn width",
        "mlp.experts.up_proj.weight": "expert ffn width",
        "mlp.experts.down_proj.weight": "expert width ffn",
    }
    return tensors | ATTENTION_BIASES if config.attention_bias else tensors


def _sizes(config: Any) -> dict[str, int]:
    return {**LLAMA.sizes(config), "ffn": config.moe_intermediate_size, "expert": config.num_experts}


def _assign(config: Any, sizes: Mapping[str, int]) -> None:
    check_used(config, sizes)
    dense = config.intermediate_size
    LLAMA.assign(config, sizes)
    config.intermediate_size, config.moe_intermediate_size = dense, sizes["ffn"]
    config.num_experts = sizes["expert"]


def check_used(config: Any, sizes: Mapping[str, int]) -> None:
    """Check that a token finds its experts.

    Raises:
        ValueError: there are fewer than it is sent to.
    """
    if sizes["expert"] < config.num_experts_per_tok:
        raise ValueError(
            f"num_experts={sizes['expert']} is less than num_experts_per_tok={config.num_experts_per_tok}: every "
            f"token is sent to that many experts. Keep at least {config.num_experts_per_tok}."
        )


def _check(config: Any) -> None:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise ValueError(
            f"qwen3_moe with mlp_only_layers={config.mlp_only_layers} and decoder_sparse_step="
            f"{config.decoder_sparse_step} is not supported: some layers then have one FFN instead of experts, and "
            "all layers must have the same tensors. Supported: mlp_only_layers=[] and decoder_sparse_step=1."
        )


QWEN3_MOE = replace(
    LLAMA,
    model_types=("qwen3_moe",),
    layer_tensors=_layer_tensors,
    sites=EXPERT_SITES,
    sizes=_sizes,
    assign=_assign,
    shape_fields={
        "num_hidden_layers": "layer",
        "hidden_size": "width",
        "moe_intermediate_size": "ffn",
        "num_experts": "expert",
        "num_attention_heads": "heads",
        "num_key_value_heads": "group",
    },
    check=_check,
    output_norms=lambda config: QK_NORMS,
    fused={
        "mlp.experts.gate_up_proj": Fused(("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight"), axis=1),
        "mlp.experts.down_proj": Fused(("mlp.experts.down_proj.weight",)),
    },
    experts=Experts("mlp.experts", "num_experts_per_tok", files=True),
)
