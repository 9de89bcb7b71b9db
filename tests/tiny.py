"""Tiny models of every family: one row of `ROWS` gives a family its tests in all folders.

Gains, biases and norms are random: freshly initialized ones (gains 1, biases 0) hide bugs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    Lfm2Config,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    NanoChatConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from cbd_trl.architectures.base import Family
from cbd_trl.architectures.registry import family_of, supported_model_types

# The common names of the fields of a shape, and the dimension that each sets.
_DIMENSIONS = {
    "hidden_size": "width",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layer",
    "num_attention_heads": "heads",
    "num_key_value_heads": "group",
}
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
# Phi-3's, for a head size of 8: positions past 16 take the other factors.
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
    "original_max_position_embeddings": 16,
}
# Sliding and full layers in turn, a window shorter than the tests' rows, and caps that the logits feel.
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 6, "final_logit_softcapping": 3.0}
# Another base in windowed layers, and positions that are stretched in full ones alone.
_OLMO3_ROTARY = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
# As published, save the number of positions: they are stretched, and from the 8th on the queries grow.
_MINISTRAL3_ROTARY = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.1,
}
_BIASES: dict[str, Any] = {"attention_bias": True}
_ALL_BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}


@dataclass(frozen=True)
class Row:
    """A family in the tests.

    Attributes:
        config: its config class.
        fields: config fields of the tiny model beside its shape.
        biases: config fields that give it every bias that it can have.
        options: further config fields, each set of them with tensors of its own to be described.
        gguf: what `gguf.MODEL_ARCH` calls it; None where llama.cpp does not have it.
        whole_heads: whether transformers wants a width that is a multiple of the number of heads.
        writers: in a layer, what computes the neurons and what the values of the attention.
        smooth: config fields without dead or clamped neurons, which statistics cannot tell apart (as under a ReLU).
        like: a family whose end-to-end tests stand for its own, which are `slow`.
        sdpa: whether transformers runs it with SDPA; it has no soft-capping of attention scores there.
        row_bounds: whether its layers tell attention where packed rows begin; else the dense mask keeps them apart.
        packs: whether packed rows can be kept apart without packages that are not installed for the tests.
        ties: whether its head can be tied; what asks for a tied one gets an untied one where it cannot.
    """

    config: Any
    fields: dict[str, Any] = field(default_factory=dict)
    biases: dict[str, Any] = field(default_factory=dict)
    options: tuple[dict[str, Any], ...] = ()
    gguf: str | None = None
    whole_heads: bool = False
    writers: tuple[str, str] = ("mlp.up_proj", "self_attn.v_proj")
    smooth: dict[str, Any] = field(default_factory=dict)
    like: str | None = None
    sdpa: bool = True
    row_bounds: bool = True
    packs: bool = True
    ties: bool = True


ROWS: dict[str, Row] = {
    "llama": Row(
        LlamaConfig,
        {"head_dim": 8},
        _ALL_BIASES,
        (
            *({"attention_bias": a, "mlp_bias": not a} for a in (False, True)),
            {"num_key_value_heads": 4},
            {"num_key_value_heads": 1, "head_dim": 16},
            {"head_dim": None},
        ),
        gguf="LLAMA",
        whole_heads=True,
    ),
    "mistral": Row(
        MistralConfig,
        {"head_dim": 8, "sliding_window": 6},
        options=({"head_dim": None, "sliding_window": 8},),
        gguf="LLAMA",
        like="llama",
    ),
    "ministral": Row(
        MinistralConfig,
        {"head_dim": 8, "sliding_window": 6},
        options=({"layer_types": ["sliding_attention", "full_attention"] * 2},),
        like="llama",
    ),
    "ministral3": Row(
        Ministral3Config,
        {"head_dim": 8, "rope_parameters": _MINISTRAL3_ROTARY},
        options=({"sliding_window": 8},),
        gguf="MISTRAL3",
        like="llama",
    ),
    "qwen2": Row(Qwen2Config, gguf="QWEN2", like="llama"),
    "qwen3": Row(Qwen3Config, {"head_dim": 8}, _BIASES, gguf="QWEN3", like="gemma3_text"),
    "qwen3_moe": Row(
        Qwen3MoeConfig,
        {
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.0,
        },
        _BIASES,
        ({"norm_topk_prob": False},),
        gguf="QWEN3MOE",
        writers=("mlp.experts.up_proj", "self_attn.v_proj"),
    ),
    "gpt_oss": Row(
        GptOssConfig,
        {
            "head_dim": 8,
            "num_local_experts": 6,
            "router_aux_loss_coef": 0.0,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "swiglu_limit": 0.5,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
        _BIASES,
        gguf="GPT_OSS",
        writers=("mlp.experts.up_proj", "self_attn.v_proj"),
        smooth={"swiglu_limit": 1000.0},
        sdpa=False,
        like="qwen3_moe",
    ),
    "qwen3_5_text": Row(
        Qwen3_5TextConfig,
        {
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 4,
            "full_attention_interval": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        },
        _BIASES,
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, {"linear_num_value_heads": 2}),
        gguf="QWEN35",
        packs=False,
    ),
    "lfm2": Row(
        Lfm2Config,
        # Every second layer, whatever the depth.
        {"full_attn_idxs": list(range(1, 24, 2)), "block_auto_adjust_ff_dim": False, "head_dim": 8},
        {"conv_bias": True},
        (
            {"block_auto_adjust_ff_dim": True, "block_multiple_of": 20, "block_ffn_dim_multiplier": 1.1},
            {"layer_types": ["conv", "conv", "full_attention", "conv"], "conv_L_cache": 4},
        ),
        gguf="LFM2",
        packs=False,
        writers=("feed_forward.w3", "self_attn.v_proj"),
    ),
    "phi": Row(
        PhiConfig,
        options=({"num_key_value_heads": 2}, {"partial_rotary_factor": 0.25}),
        gguf="PHI2",
        whole_heads=True,
        writers=("mlp.fc1", "self_attn.v_proj"),
        like="gpt_neox",
    ),
    "phi3": Row(
        Phi3Config,
        {"head_dim": 8},
        options=({"num_key_value_heads": 4, "sliding_window": 8}, {"rope_parameters": LONGROPE}),
        gguf="PHI3",
    ),
    "smollm3": Row(
        SmolLM3Config,
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
        _ALL_BIASES,
        ({"attention_bias": True}, {"mlp_bias": True}),
        gguf="SMOLLM3",
        like="gemma3_text",
    ),
    "gemma2": Row(
        Gemma2Config,
        {**_GEMMA, "attn_logit_softcapping": 1.0},
        _BIASES,
        gguf="GEMMA2",
        whole_heads=True,
        sdpa=False,
        like="gemma3_text",
    ),
    "gemma3_text": Row(
        Gemma3TextConfig, {**_GEMMA, "sliding_window_pattern": 3}, _BIASES, gguf="GEMMA3", whole_heads=True
    ),
    "granite": Row(
        GraniteConfig,
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.5,
        },
        _ALL_BIASES,
        ({"attention_bias": True}, {"mlp_bias": True}),
        gguf="GRANITE",
        like="llama",
    ),
    "ernie4_5": Row(
        Ernie4_5Config,
        {"head_dim": 8},
        {"use_bias": True},
        ({"use_bias": True}, {"head_dim": None}),
        gguf="ERNIE4_5",
        like="llama",
    ),
    "arcee": Row(
        ArceeConfig,
        {"head_dim": 8},
        _ALL_BIASES,
        ({"attention_bias": True}, {"mlp_bias": True}, {"head_dim": None}),
        gguf="ARCEE",
        whole_heads=True,
        smooth={"hidden_act": "gelu"},
        like="llama",
    ),
    "seed_oss": Row(
        SeedOssConfig,
        {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
        {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
        ({"attention_bias": False}, {"attention_out_bias": True}, {"mlp_bias": True}, {"head_dim": None}),
        gguf="SEED_OSS",
        like="llama",
    ),
    "helium": Row(
        HeliumConfig,
        {"head_dim": 8, "num_key_value_heads": 4},
        _ALL_BIASES,
        ({"attention_bias": True}, {"mlp_bias": True}, {"num_key_value_heads": 2}),
        whole_heads=True,
        like="llama",
    ),
    "hunyuan_v1_dense": Row(
        HunYuanDenseV1Config,
        {"head_dim": 8},
        _BIASES,
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0}},),
        gguf="HUNYUAN_DENSE",
        like="gemma3_text",
    ),
    "apertus": Row(
        ApertusConfig,
        {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        _BIASES,
        ({"hidden_act": "silu"},),
        gguf="APERTUS",
        like="gemma3_text",
    ),
    "nanochat": Row(
        NanoChatConfig,
        {"head_dim": 8, "final_logit_softcapping": 3.0},
        _BIASES,
        ({"num_key_value_heads": 4},),
        writers=("mlp.fc1", "self_attn.v_proj"),
        smooth={"hidden_act": "gelu"},
        like="llama",
        ties=False,
    ),
    "cohere2": Row(
        Cohere2Config,
        {"sliding_window": 6, "sliding_window_pattern": 3, "logit_scale": 2.0},
        _BIASES,
        ({"num_key_value_heads": 2},),
        gguf="COHERE2",
        whole_heads=True,
        like="gemma3_text",
    ),
    "olmo2": Row(Olmo2Config, {}, _BIASES, ({"num_key_value_heads": None},), gguf="OLMO2"),
    "olmo3": Row(
        Olmo3Config,
        {"sliding_window": 6, "rope_parameters": _OLMO3_ROTARY},
        _BIASES,
        ({"num_key_value_heads": None},),
        gguf="OLMO2",
        like="olmo2",
    ),
    "exaone4": Row(
        Exaone4Config,
        {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2},
        options=({"sliding_window": None, "layer_types": ["full_attention"] * 4},),
        gguf="EXAONE4",
        like="olmo2",
    ),
    "stablelm": Row(
        StableLmConfig,
        {"partial_rotary_factor": 0.5},
        {"use_qkv_bias": True},
        (
            {"num_key_value_heads": 2},
            *({"use_parallel_residual": True, "use_qkv_bias": bias} for bias in (False, True)),
        ),
        gguf="STABLELM",
        whole_heads=True,
        row_bounds=False,
        like="gpt_neox",
    ),
    "starcoder2": Row(
        Starcoder2Config,
        {"sliding_window": 6},
        {"use_bias": True},
        ({"use_bias": False}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}),
        gguf="STARCODER2",
        writers=("mlp.c_fc", "self_attn.v_proj"),
        like="gpt_neox",
    ),
    "gpt2": Row(
        GPT2Config,
        {"n_inner": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        options=({"n_inner": 40},),
        gguf="GPT2",
        whole_heads=True,
        writers=("mlp.c_fc", "attn.c_attn"),
    ),
    "gpt_neox": Row(
        GPTNeoXConfig,
        {"rotary_pct": 0.5},
        _BIASES,
        tuple({"attention_bias": b, "use_parallel_residual": p} for b in (False, True) for p in (False, True)),
        gguf="GPTNEOX",
        whole_heads=True,
        writers=("mlp.dense_h_to_4h", "attention.query_key_value"),
    ),
    "opt": Row(
        OPTConfig,
        {"dropout": 0.0},
        {"enable_bias": True},
        ({"enable_bias": False},),
        whole_heads=True,
        writers=("fc1", "self_attn.v_proj"),
        smooth={"activation_function": "gelu"},
        like="gpt2",
    ),
}
FAMILIES = list(ROWS)
# A family and whether its head is tied; those that can tie it.
HEADS = [(family, tied) for family, row in ROWS.items() for tied in (True, False) if row.ties or not tied]
TYING = [family for family, tied in HEADS if tied]


def _ties_width(family: Family) -> bool:
    """Whether half the width means half the heads."""
    sizes = {"width": 32, "ffn": 48, "group": 4, "query": 1, "dim": 8}
    return family.resolve(sizes, {"width": 16})["group"] == 2


# A family of each kind. It stands for the others where a test goes from end to end; theirs are in `make test-slow`.
# Tests of single operations run in every family.
KINDS = tuple(family for family, row in ROWS.items() if row.like is None)
PACKING_FAMILIES = [family for family in FAMILIES if ROWS[family].packs]
SDPA_FAMILIES = [family for family in FAMILIES if ROWS[family].sdpa]
# Those whose norms are LayerNorms, and those whose width is heads x head size.
LAYER_NORM = tuple(family for family in FAMILIES if family_of(family).norm_type == "layer")
WIDTH_OF_HEADS = tuple(family for family in FAMILIES if _ties_width(family_of(family)))
# Those with mixtures of experts.
MIXTURES = tuple(family for family in FAMILIES if family_of(family).experts is not None)


def by_kind(families: Sequence[str] = FAMILIES) -> list[Any]:
    """Parameters for a test from end to end: one family of a kind, and the others marked `slow`."""
    return [pytest.param(family, marks=() if family in KINDS else pytest.mark.slow) for family in families]


def published(family: str, tied: bool) -> bool:
    """Whether the config of the family has that head by default, or can have no other."""
    row = ROWS[family]
    return not row.ties or tied is row.config.tie_word_embeddings


def head_marks(family: str, tied: bool) -> Any:
    """Marks of a test of a single operation: `slow` for a relative's head that it is not published with.

    Its own tensors are proved beside the other head, and what the two heads differ in by the family of its kind.
    """
    return () if family in KINDS or published(family, tied) else pytest.mark.slow


def by_head() -> list[Any]:
    """Parameters (family, tied) for a test of a single operation, with `head_marks`."""
    return [
        pytest.param(family, tied, id=f"{family}-{'tied' if tied else 'untied'}", marks=head_marks(family, tied))
        for family, tied in HEADS
    ]


def by_head_in(*ways: Any) -> list[Any]:
    """Parameters (family, tied, way), a way that is a tuple being several, with `head_marks`.

    Relatives run the last way, in which all that their tensors can do is done at once, and the others in `slow`.
    """
    return [
        pytest.param(
            family,
            tied,
            *(way if isinstance(way, tuple) else (way,)),
            marks=head_marks(family, tied) if family in KINDS or way == ways[-1] else pytest.mark.slow,
        )
        for family, tied in HEADS
        for way in ways
    ]


def own_names(family: str, **fields: Any) -> dict[str, Any]:
    """Config fields by the names that the family has for them; those it does not have are left out.

    Where a width is that of the heads, every head gets a key and value of its own: so a width means one shape.
    """
    if "num_key_value_heads" in fields and family in WIDTH_OF_HEADS:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    own = {dimension: name for name, dimension in family_of(family).shape_fields.items()}
    aliases = ROWS[family].config.attribute_map
    named: dict[str | None, Any] = {}
    for name, value in fields.items():
        dimension = _DIMENSIONS.get(name)
        named[aliases.get(name, name) if dimension is None else own.get(dimension)] = value
    named.pop(None, None)
    return {name: value for name, value in named.items() if name is not None}


def tiny_model(family: str, *, seed: int = 0, attn_implementation: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """Make a causal LM of 4 layers, width 32 and 64 vocabulary rows, the same for the same seed.

    Args:
        family: one of `FAMILIES`.
        seed: of the weights: standard deviation 0.2, gains around 1.
        attn_implementation: sdpa (where the family has it) or eager.
        overrides: config fields, by the family's own names.

    Returns:
        the model, float32, in eval mode.
    """
    row = ROWS[family]
    untied = {} if row.ties else {"tie_word_embeddings": False}
    config = row.config(**{**own_names(family, **_SHAPE), **row.fields, **overrides, **untied})
    how = attn_implementation if row.sdpa else "eager"
    # The kernel that experts have by default computes nothing in float64.
    experts = {} if family_of(family).experts is None else {"experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, attn_implementation=how, **experts)
    randomize(model, seed)
    return model.eval()


def randomize(model: Any, seed: int = 0) -> None:
    """Draw every parameter anew: gains around 1 (Gemma stores them less 1), the rest around 0, deviation 0.2.

    Args:
        model: changed in place.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    model_type = model.config.model_type
    gain = 1.0 - (family_of(model_type).gain_offset if model_type in supported_model_types() else 0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = gain if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
