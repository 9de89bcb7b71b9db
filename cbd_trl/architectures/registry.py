"""The table of families, one row each, and what is looked up in it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import logging

from cbd_trl.architectures.apertus import APERTUS
from cbd_trl.architectures.arcee import ARCEE
from cbd_trl.architectures.base import Architecture, Family
from cbd_trl.architectures.cohere2 import COHERE2
from cbd_trl.architectures.ernie4_5 import ERNIE4_5
from cbd_trl.architectures.exaone4 import EXAONE4, EXAONE4_WINDOWED
from cbd_trl.architectures.gemma import GEMMA
from cbd_trl.architectures.gpt2 import GPT2
from cbd_trl.architectures.gpt_neox import GPT_NEOX
from cbd_trl.architectures.gpt_oss import GPT_OSS
from cbd_trl.architectures.granite import GRANITE
from cbd_trl.architectures.helium import HELIUM
from cbd_trl.architectures.hunyuan import HUNYUAN
from cbd_trl.architectures.lfm2 import LFM2
from cbd_trl.architectures.llama import LLAMA
from cbd_trl.architectures.nanochat import NANOCHAT
from cbd_trl.architectures.olmo import OLMO
from cbd_trl.architectures.opt import OPT
from cbd_trl.architectures.phi import PHI
from cbd_trl.architectures.phi3 import PHI3, PHI3_LONGROPE
from cbd_trl.architectures.qwen3_5 import QWEN3_5
from cbd_trl.architectures.qwen3_moe import QWEN3_MOE
from cbd_trl.architectures.seed_oss import SEED_OSS
from cbd_trl.architectures.stablelm import STABLELM, STABLELM_PARALLEL
from cbd_trl.architectures.starcoder2 import STARCODER2

logger = logging.get_logger(__name__)

# The first that describes a config counts.
FAMILIES = (
    LLAMA,
    GEMMA,
    GRANITE,
    ERNIE4_5,
    ARCEE,
    SEED_OSS,
    HELIUM,
    HUNYUAN,
    APERTUS,
    NANOCHAT,
    COHERE2,
    OLMO,
    EXAONE4_WINDOWED,
    EXAONE4,
    GPT2,
    GPT_NEOX,
    OPT,
    PHI,
    PHI3_LONGROPE,
    PHI3,
    QWEN3_5,
    LFM2,
    QWEN3_MOE,
    GPT_OSS,
    STABLELM_PARALLEL,
    STABLELM,
    STARCODER2,
)


def supported_model_types() -> list[str]:
    """`config.model_type` values that chains can be built from."""
    return sorted({model_type for family in FAMILIES for model_type in family.model_types})


def family_of(model_type: str) -> Family:
    """Look up the family of a model type; of one with several descriptions the general one.

    Raises:
        KeyError: there is none.
    """
    return {name: family for family in FAMILIES for name in family.model_types}[model_type]


def describe(config: PretrainedConfig) -> Architecture:
    """Resolve the description of a model's family for its config.

    Raises:
        ValueError: the model type or one of its options is not supported, or the model is quantized; the message
            lists what is supported.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The model is quantized; weights are cut and mixed in floating point. Load it dequantized "
            "(for GGUF: `from_pretrained(..., gguf_file=..., dtype=torch.float32)` and remove the quantization marks)."
        )
    for family in FAMILIES:
        if config.model_type in family.model_types and family.when(config):
            family.check(config)
            return Architecture(family, config)
    raise ValueError(
        f"Model type {config.model_type!r} has no description of its tensors, so a chain cannot cut, grow or "
        f"interpolate it. Supported model types: {', '.join(supported_model_types())}. "
        "DistillTrainer itself takes any causal LM."
    )


def architecture_of(model: Any) -> Architecture:
    """Describe a model at hand: whether its head is tied is read from its weights, not from its config.

    transformers loads a head that differs from the table although `tie_word_embeddings` is set, as merged adapters and
    edited checkpoints have it, and a program may tie what the config has apart.

    Args:
        model: a causal LM with its weights; it is not changed.

    Raises:
        ValueError: as `describe`.
    """
    config, tied = model.config, is_tied(model)
    if bool(config.tie_word_embeddings) != tied:
        config = copy.deepcopy(config)
        config.tie_word_embeddings = tied
    return describe(config)


@torch.no_grad()
def is_tied(model: Any, one_tensor: bool = False) -> bool:
    """Whether a causal LM has one table for input and output: the same one, or by its config and with equal values.
    Where its config differs there is a warning.

    Args:
        model: a causal LM; of one whose weights are not here the config is believed.
        one_tensor: two tables of equal values count as two, as for a model that is going to be trained; no warning.
    """
    stated = bool(model.config.tie_word_embeddings)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tied = head is table
    if stated and not tied:
        here = not (head.is_meta or table.is_meta)
        equal = head.shape == table.shape and not one_tensor and torch.equal(head, table.to(head.device))
        tied = not here or equal
    if tied != stated and not one_tensor:
        logger.warning_once(
            f"The config of the {type(model).__name__} {model.name_or_path or 'made in memory'} says "
            f"tie_word_embeddings={stated}, but its head is {'the' if tied else 'not the'} table of its embeddings. "
            f"It is taken to be {'tied' if tied else 'untied'}, as its weights are."
        )
    return tied


# What a dimension is called in a description of a shape, in the order of the words.
_LABELS = {"layer": "layers", "width": "wide", "heads": "heads", "ffn": "ffn", "expert": "experts", "group": "kv"}
_LABEL_OF_FIELD = {field: _LABELS[dim] for family in FAMILIES for field, dim in family.shape_fields.items()}


def describe_shape(shape: Mapping[str, int], short: bool = False) -> str:
    """Describe a shape in a few words, such as `16 layers, 384 wide, 6/2 heads, ffn 1024`.

    Args:
        shape: config fields of any family.
        short: `16×384, 6/2 heads, ffn 1024`.
    """
    parts = {_LABEL_OF_FIELD.get(name, name): value for name, value in shape.items()}
    groups = parts.pop("kv", None)
    parts = {name: parts[name] for name in sorted(parts, key=lambda name: (*_LABELS.values(), name).index(name))}
    if short and "layers" in parts and "wide" in parts:
        words = [f"{parts.pop('layers')}×{parts.pop('wide')}"]
    else:
        words = []
    for name, value in parts.items():
        if name == "ffn":
            words.append(f"ffn {value}")
        elif name == "heads" and groups not in (None, value):
            words.append(f"{value}/{groups} heads")
        else:
            words.append(f"{value} {name}")
    return ", ".join(words)
