"""Across vocabularies: what tokens of two tokenizers have in common, and a model given another vocabulary."""

from cbd_trl.bridge.reduce import Reduction, reduce_vocabulary
from cbd_trl.bridge.special_tokens import carry_over_special_tokens
from cbd_trl.bridge.transplant import transplant_vocabulary
from cbd_trl.bridge.vocabulary import VocabularyMatch, match_vocabularies

__all__ = [
    "Reduction",
    "VocabularyMatch",
    "carry_over_special_tokens",
    "match_vocabularies",
    "reduce_vocabulary",
    "transplant_vocabulary",
]
