"""What every tensor axis of a model family means: data that the surgery works from."""

from cbd_trl.architectures.base import FREE, Architecture, Family, OutputNorm, Site, decoder_layers
from cbd_trl.architectures.registry import architecture_of, describe, is_tied, supported_model_types

__all__ = [
    "FREE",
    "Architecture",
    "Family",
    "OutputNorm",
    "Site",
    "architecture_of",
    "decoder_layers",
    "describe",
    "is_tied",
    "supported_model_types",
]
