"""The families there are: one row each."""

from transformers import PretrainedConfig

from cbd_trl.architectures.family import Architecture
from cbd_trl.architectures.gemma import GEMMA
from cbd_trl.architectures.gpt2 import GPT2
from cbd_trl.architectures.gpt_neox import GPT_NEOX
from cbd_trl.architectures.llama import LLAMA
from cbd_trl.architectures.olmo2 import OLMO2
from cbd_trl.architectures.opt import OPT
from cbd_trl.architectures.phi3 import PHI3, PHI3_LONGROPE

# The first that describes a config counts.
FAMILIES = (LLAMA, GEMMA, OLMO2, GPT2, GPT_NEOX, OPT, PHI3_LONGROPE, PHI3)


def supported_model_types() -> list[str]:
    """`config.model_type` values that chains can be built from."""
    return sorted({model_type for family in FAMILIES for model_type in family.model_types})


def describe(config: PretrainedConfig) -> Architecture:
    """Resolve the description of a model's family for its config.

    Raises:
        ValueError: the model type or one of its options is not supported, or the model is quantised; the message
            lists what is supported.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The model is quantised; weights are cut and mixed in floating point. Load it dequantised "
            "(for GGUF: `from_pretrained(..., gguf_file=..., dtype=torch.float32)` and remove the quantisation marks)."
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
