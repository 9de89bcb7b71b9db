"""gpt-oss: windowed and full layers in turn, a learned sink for every query head, and a mixture of experts.

Router, experts and attention have biases. Of each expert, gate and up take turns in one transposed tensor; its
activation is clamped, the same for all neurons, so they can be moved and cut. Published weights are quantized (MXFP4):
a chain starts from the dequantized model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Experts, Fused, Site
from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA
from cbd_trl.architectures.qwen3_moe import EXPERT_SITES, QWEN3_MOE, check_used


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = {name: axes for name, axes in LLAMA.layer_tensors(config).items() if not name.startswith("mlp.")}
    if config.attention_bias:
        tensors |= ATTENTION_BIASES
    return tensors | {
        "self_attn.sinks": "group.query",
        "mlp.router.weight": "expert width",
        "mlp.router.bias": "expert",
        "mlp.experts.gate_proj.weight": "expert width ffn",
        "mlp.experts.up_proj.weight": "expert width ffn",
        "mlp.experts.gate_proj.bias": "expert ffn",
        "mlp.experts.up_proj.bias": "expert ffn",
        "mlp.experts.down_proj.weight": "expert ffn width",
        "mlp.experts.down_proj.bias": "expert width",
    }


def _assign(config: Any, sizes: Mapping[str, int]) -> None:
    check_used(config, sizes)
    LLAMA.assign(config, sizes)
    config.num_experts = sizes["expert"]


GPT_OSS = replace(
    QWEN3_MOE,
    model_types=("gpt_oss",),
    layer_tensors=_layer_tensors,
    sites=(
        *LLAMA.sites[:2],
        Site(
            "post_attention_layernorm",
            ("width",),
            ("mlp.router", "mlp.experts.gate_proj", "mlp.experts.up_proj"),
            norm=True,
        ),
        EXPERT_SITES[-1],
    ),
    sizes=lambda config: {**LLAMA.sizes(config), "expert": config.num_experts},
    assign=_assign,
    shape_fields={**LLAMA.shape_fields, "num_experts": "expert"},
    check=lambda config: None,
    output_norms=lambda config: {},
    engine_patterns={"gpt_oss": {"layer_types": ("sliding_attention", "full_attention")}},
    fused={
        "mlp.experts.gate_up_proj": Fused(
            ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight"), axis=2, interleaved=True
        ),
        "mlp.experts.gate_up_proj_bias": Fused(
            ("mlp.experts.gate_proj.bias", "mlp.experts.up_proj.bias"), axis=1, interleaved=True
        ),
        "mlp.experts.down_proj": Fused(("mlp.experts.down_proj.weight",)),
        "mlp.experts.down_proj_bias": Fused(("mlp.experts.down_proj.bias",)),
    },
    experts=Experts("mlp.experts", "num_experts_per_tok", files=False),
)
