"""Two vocabularies: aligning their tokens for distillation, and giving a model another vocabulary.

`bridge` and `chats` tokenize the student's batch for a teacher with another tokenizer and align both, and `objectives`
compare the two models on it. `transplant` and `reduce` change the vocabulary of a model.
"""

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
