"""A small model's vocabulary made smaller: a BPE trained on its text, and the model given it."""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.bridge.token_bytes import Spelling, spelling_of
from cbd_trl.bridge.transplant import transplant_vocabulary
from cbd_trl.bridge.vocabulary_match import VocabularyMatch, covered_share, match_vocabularies

# Without held-out texts every tenth one is kept from training.
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Reduction:
    """A model with a smaller vocabulary, and what that costs and saves.

    Args:
        model, tokenizer: the new ones.
        match: where the new tokens come from.
        parameters: of the model, before and after; a tied table counts once.
        bytes_per_token: of the held-out texts, before and after.
        covered: the share of the held-out bytes in tokens that are old ones too, 0 to 1.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    match: VocabularyMatch
    parameters: tuple[int, int]
    bytes_per_token: tuple[float, float]
    covered: float

    @property
    def saved(self) -> int:
        """Parameters that the new model has less."""
        return self.parameters[0] - self.parameters[1]

    def __str__(self) -> str:
        before, after = self.parameters
        return (
            f"{before:,} parameters -> {after:,} ({self.saved / before:.1%} saved), bytes per token "
            f"{self.bytes_per_token[0]:.2f} -> {self.bytes_per_token[1]:.2f}, {self.covered:.1%} of the bytes in "
            f"tokens kept; {self.match}"
        )


def reduce_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    size: int,
    *,
    held_out: Iterable[str] | None = None,
    **options: Any,
) -> Reduction:
    """Give a model a vocabulary of fewer tokens, those that some texts need.

    Args:
        model: a causal LM; it is not changed.
        tokenizer: its own, a fast BPE.
        texts: what the model is for, kept as a list; a BPE of the same kind is trained on them.
        size: tokens of the new vocabulary, special ones included; fewer where the texts have no more to merge.
        held_out: texts that are measured and not trained on; None for every tenth of `texts`.
        options: `method` and the rest of `transplant_vocabulary`.

    Returns:
        the new model and tokenizer with a report.

    Raises:
        ValueError: a size that is too large or too small, a tokenizer that is no BPE, no held-out text, and as
            `transplant_vocabulary`.
    """
    texts = list(texts)
    if held_out is not None:
        held_out = list(held_out)
    else:
        held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        texts = [text for number, text in enumerate(texts, start=1) if number % HELD_OUT_EVERY]
    if not any(held_out):
        raise ValueError(
            f"Bytes per token are measured on held-out texts, got none. Pass `held_out`, or {HELD_OUT_EVERY} texts or "
            "more, of which every tenth is kept for it."
        )
    smaller = train_smaller_tokenizer(tokenizer, texts, size)
    made = transplant_vocabulary(model, tokenizer, smaller, **options)
    match = match_vocabularies(tokenizer, smaller)
    return Reduction(
        model=made,
        tokenizer=smaller,
        match=match,
        parameters=(model.num_parameters(), made.num_parameters()),
        bytes_per_token=(bytes_per_token(tokenizer, held_out), bytes_per_token(smaller, held_out)),
        covered=covered_share(match, smaller, held_out),
    )


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """How many bytes of texts (UTF-8) a token holds on average, special tokens aside.

    Args:
        tokenizer: any.
        texts: at least one that is not empty.
    """
    lengths = [(len(text.encode()), len(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]
    return sum(size for size, _ in lengths) / sum(tokens for _, tokens in lengths)


def train_smaller_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int
) -> PreTrainedTokenizerBase:
    """A BPE of the same kind and with the same special tokens, chat template and byte tokens.

    Of the added tokens that are not special, those that the chat template writes are kept.

    Args:
        tokenizer: a fast BPE.
        texts: to train on.
        size: tokens at most.

    Raises:
        ValueError: as `reduce_vocabulary`.
    """
    spelling = spelling_of(tokenizer)
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind != "BPE":
        raise ValueError(
            f"A smaller BPE can be trained from a BPE, got a tokenizer whose model is {kind}. Train a smaller one of "
            "its kind yourself and pass both to transplant_vocabulary."
        )
    ids = tokenizer.get_vocab()
    if not 0 < size < len(ids):
        raise ValueError(f"size must be less than the {len(ids)} tokens there are, and positive, got {size}.")
    byte_tokens = sorted(filter(spelling.is_byte_token, ids), key=ids.__getitem__)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    marks = [
        added for added in tokenizer.added_tokens_decoder.values() if not added.special and added.content in template
    ]
    learner = _cutting_at_spaces(tokenizer, spelling)
    trained: Any = learner.train_new_from_iterator(
        texts, max(size - len(byte_tokens) - len(marks), 0), show_progress=False
    )
    trained.backend_tokenizer.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    if byte_tokens:
        _append(trained, byte_tokens)
    trained.add_tokens(marks)
    trained.chat_template = tokenizer.chat_template
    trained.name_or_path = ""
    if len(trained) > size:
        raise ValueError(
            f"size={size} is too small: letters, bytes and special tokens alone are {len(trained)}. Ask for more."
        )
    return trained


def _cutting_at_spaces(tokenizer: PreTrainedTokenizerBase, spelling: Spelling) -> Any:
    """A copy to train with: where the normaliser writes the spaces, nothing else would keep words apart."""
    learner: Any = copy.deepcopy(tokenizer)
    backend = learner.backend_tokenizer
    if spelling.space and backend.normalizer and spelling.space in backend.normalizer.normalize_str("a b"):
        backend.pre_tokenizer = pre_tokenizers.Split(spelling.space, "merged_with_next")
    return learner


def _append(tokenizer: Any, byte_tokens: list[str]) -> None:
    """Add byte tokens to the model, which no trainer knows of; as added tokens they would be looked for in texts."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary, merges = fields.pop("vocab"), [tuple(merge) for merge in fields.pop("merges")]
    options = {name: value for name, value in fields.items() if name != "type" and value is not None}
    further = [token for token in byte_tokens if token not in vocabulary]
    vocabulary.update({token: len(vocabulary) + place for place, token in enumerate(further)})
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=merges, **options)
