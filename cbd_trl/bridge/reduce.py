"""Give a model a smaller vocabulary: train a BPE on its texts, and transplant it.

`reduce_vocabulary` does both and reports what that saves and costs; `train_smaller_tokenizer` is the first half.
"""

import copy
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.bridge.special_tokens import renumber
from cbd_trl.bridge.token_bytes import Spelling, Vocabulary
from cbd_trl.bridge.transplant import transplant_vocabulary
from cbd_trl.bridge.vocabulary import VocabularyMatch, config_token_ids, covered_share, match_vocabularies
from cbd_trl.utils.progress import Progress

# Without held-out texts, every tenth text is kept out of training.
HELD_OUT_EVERY = 10
# What a tokenizer keeps of the files that it was loaded from.
_LOADING_KWARGS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "name_or_path")
# A special token that is reserved for later use.
_PLACEHOLDER = re.compile(r"(?i)[^a-z]*(unused|reserved|extra|dummy|placeholder)([^a-z]|special|token|id)*\d+[^a-z]*")


@dataclass(frozen=True)
class Reduction:
    """A model with a smaller vocabulary, and what that costs and saves.

    Args:
        model, tokenizer: the new ones.
        match: where the new tokens come from.
        parameters: of the model, before and after; a tied table counts once.
        bytes_per_token: of the held-out texts, before and after.
        covered: the share of the held-out bytes in tokens that the old vocabulary has too, 0 to 1.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    match: VocabularyMatch
    parameters: tuple[int, int]
    bytes_per_token: tuple[float, float]
    covered: float

    @property
    def saved(self) -> int:
        """Number of parameters saved."""
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
    """Give a copy of a model a vocabulary of fewer tokens, trained on the texts that it is for.

    Args:
        model: a causal LM; it is not changed.
        tokenizer: its own, a fast BPE.
        texts: texts of the kind that the model is for, kept in memory; a BPE of the same kind is trained on them.
        size: tokens of the new vocabulary, special ones included; fewer if the texts have nothing more to merge.
        held_out: texts to measure on, not trained on; None for every tenth of `texts`.
        options: `method` and the rest of `transplant_vocabulary`.

    Returns:
        the new model and tokenizer with a report.

    Raises:
        ValueError: a size that is too large or too small, a tokenizer that is not a BPE, no held-out text, and as
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
            f"Got no held-out text, and bytes per token are measured on it. Pass `held_out`, or {HELD_OUT_EVERY} "
            "texts or more, of which every tenth is held out."
        )
    smaller = train_smaller_tokenizer(tokenizer, texts, size, keep=config_token_ids(model))
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
    """Compute the mean number of UTF-8 bytes per token of some texts, without special tokens.

    Args:
        tokenizer: any.
        texts: at least one that is not empty.
    """
    lengths = [(len(text.encode()), len(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]
    return sum(size for size, _ in lengths) / sum(tokens for _, tokens in lengths)


def train_smaller_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int, *, keep: Collection[int] = ()
) -> PreTrainedTokenizerBase:
    """Train a BPE of the same kind, with the same rules, special tokens, chat template and byte tokens.

    Reserved special tokens, such as `<unused12>` (Gemma has 6,242 of them), and added tokens that are not special are
    left out, unless the texts contain them, or a role, the chat template, the rules or `keep` name them. As in
    tokenization, merges are learned between added tokens, not across them.

    Args:
        tokenizer: a fast BPE; it is not changed.
        texts: to train on.
        size: tokens at most.
        keep: ids of further added tokens to keep.

    Raises:
        ValueError: as `reduce_vocabulary`.
    """
    old: Any = tokenizer
    vocabulary, backend = Vocabulary.of(old), old.backend_tokenizer
    kind = type(backend.model).__name__
    if kind != "BPE":
        raise ValueError(
            f"The tokenizer's model is {kind}, and a smaller one can be trained for BPE alone. Train a smaller "
            "tokenizer of its kind yourself and pass both to transplant_vocabulary."
        )
    if not 0 < size < len(vocabulary.ids):
        raise ValueError(
            f"size must be positive and less than the {len(vocabulary.ids)} tokens of the tokenizer, got {size}."
        )
    description = json.loads(backend.to_str())
    special, ordinary = _kept_tokens(old, description, texts, keep)
    # Byte and unknown tokens of the model itself, which the trainer lacks; as added tokens they would match in texts.
    plain = [token for token in vocabulary.ids if vocabulary.spelling.is_byte_token(token)]
    plain = sorted([*plain, *filter(None, [description["model"]["unk_token"]])], key=vocabulary.ids.__getitem__)
    plain = [token for token in plain if token not in {added["content"] for added in special}]
    model = _learn(description, vocabulary.spelling, texts, special, ordinary, size - len(plain) - len(ordinary))
    ids = model["vocab"]
    for token in plain:
        ids.setdefault(token, len(ids))
    token_ids = dict(ids)
    for added in ordinary:
        token_ids.setdefault(added["content"], len(token_ids))
    if len(token_ids) > size:
        raise ValueError(
            f"size={size} is too small: {len(special)} special tokens, {len(ordinary)} other added tokens that the "
            f"texts or the rules contain, {len(plain)} byte tokens and the letters of the texts alone are "
            f"{len(token_ids)}. Use {len(token_ids)} or more."
        )
    description["model"] |= {"vocab": ids, "merges": model["merges"]}
    description["added_tokens"] = [{**added, "id": token_ids[added["content"]]} for added in [*special, *ordinary]]
    renumber(description["post_processor"], token_ids)
    return _with_backend(old, Tokenizer.from_str(json.dumps(description)), token_ids)


def _kept_tokens(
    tokenizer: Any, description: dict[str, Any], texts: Sequence[str], keep: Collection[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Select the added tokens of a smaller tokenizer, special ones and others, as in tokenizer.json."""
    templates = tokenizer.chat_template or ""
    template = templates if isinstance(templates, str) else "\n".join(templates.values())
    rules = json.dumps(description["post_processor"], ensure_ascii=False)
    roles = {*tokenizer.special_tokens_map.values(), description["model"]["unk_token"]}
    tokens = sorted(description["added_tokens"], key=lambda added: added["id"])
    optional = [
        added
        for added in tokens
        if not (
            added["content"] in roles
            or added["id"] in keep
            or added["content"] in template
            or json.dumps(added["content"], ensure_ascii=False) in rules
            or (added["special"] and not _PLACEHOLDER.fullmatch(added["content"]))
        )
    ]
    pattern = _added_token_pattern(optional)
    found = {text for whole in texts for text in pattern.findall(whole)}
    # Some strip the white space beside them.
    found |= {text.strip() for text in found}
    left_out = {added["id"] for added in optional if added["content"] not in found}
    kept = [added for added in tokens if added["id"] not in left_out]
    return [added for added in kept if added["special"]], [added for added in kept if not added["special"]]


def _added_token_pattern(added_tokens: Iterable[dict[str, Any]]) -> re.Pattern[str]:
    """Compile a pattern that finds added tokens in texts, the longest first, as the `tokenizers` library does."""
    ways = []
    for added in sorted(added_tokens, key=lambda added: -len(added["content"])):
        way = re.escape(added["content"])
        way = rf"(?<!\w){way}(?!\w)" if added["single_word"] else way
        ways.append(r"\s*" * added["lstrip"] + way + r"\s*" * added["rstrip"])
    return re.compile("|".join(ways) or "(?!)")


def _learn(
    description: dict[str, Any],
    spelling: Spelling,
    texts: Iterable[str],
    special: list[dict[str, Any]],
    ordinary: list[dict[str, Any]],
    size: int,
) -> dict[str, Any]:
    """Train a BPE on the texts between added tokens, and return the model as in tokenizer.json."""
    empty = {**description["model"], "vocab": {}, "merges": []}
    learner = Tokenizer.from_str(
        json.dumps({**description, "model": empty, "added_tokens": [], "post_processor": None})
    )
    # Where the normalizer replaces spaces, nothing else would keep words apart.
    if spelling.space and learner.normalizer and spelling.space in learner.normalizer.normalize_str("a b"):
        learner.pre_tokenizer = pre_tokenizers.Split(spelling.space, "merged_with_next")
    trainer: Any = trainers.BpeTrainer(
        vocab_size=max(size, 0),
        special_tokens=[added["content"] for added in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if spelling.byte_level else [],
        show_progress=False,
    )
    pattern = _added_token_pattern([*special, *ordinary])
    shown = Progress("Learning a smaller vocabulary", texts, unit="texts")
    learner.train_from_iterator((part for text in shown for part in pattern.split(text)), trainer)
    return json.loads(learner.to_str())["model"]


def _with_backend(tokenizer: Any, backend: Tokenizer, ids: Mapping[str, int]) -> PreTrainedTokenizerBase:
    """Copy a tokenizer with another backend, without the special tokens that this one lacks."""
    made = copy.deepcopy(tokenizer, {id(tokenizer.backend_tokenizer): backend})
    made._tokenizer = backend
    made.extra_special_tokens = [token for token in made.extra_special_tokens if token in ids]
    # Saving would write these again, with old ids.
    made.init_kwargs = {key: value for key, value in made.init_kwargs.items() if key not in _LOADING_KWARGS}
    made.name_or_path = ""
    return made
