"""A small model's vocabulary made smaller: a BPE trained on its text, and the model given it."""

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

# Without held-out texts every tenth one is kept from training.
HELD_OUT_EVERY = 10
# What a tokenizer remembers of the files that it was made from.
_OF_LOADING = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "name_or_path")
# A special token that only holds a place for one to come.
_PLACEHOLDER = re.compile(r"(?i)[^a-z]*(unused|reserved|extra|dummy|placeholder)([^a-z]|special|token|id)*\d+[^a-z]*")


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
    """How many bytes of texts (UTF-8) a token holds on average, special tokens aside.

    Args:
        tokenizer: any.
        texts: at least one that is not empty.
    """
    lengths = [(len(text.encode()), len(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]
    return sum(size for size, _ in lengths) / sum(tokens for _, tokens in lengths)


def train_smaller_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int, *, keep: Collection[int] = ()
) -> PreTrainedTokenizerBase:
    """A BPE of the same kind and with the same rules, special tokens, chat template and byte tokens.

    Left out are special tokens that only hold a place, such as `<unused12>` (Gemma has 6,242 of them), and added
    tokens that are not special, unless the texts contain them, or a role, the chat template, the rules or `keep` name
    them. Text is learned between the added tokens, as it is read.

    Args:
        tokenizer: a fast BPE; it is not changed.
        texts: to train on.
        size: tokens at most.
        keep: ids of further added tokens that stay.

    Raises:
        ValueError: as `reduce_vocabulary`.
    """
    old: Any = tokenizer
    vocabulary, backend = Vocabulary.of(old), old.backend_tokenizer
    kind = type(backend.model).__name__
    if kind != "BPE":
        raise ValueError(
            f"A smaller BPE can be trained from a BPE, got a tokenizer whose model is {kind}. Train a smaller one of "
            "its kind yourself and pass both to transplant_vocabulary."
        )
    if not 0 < size < len(vocabulary.ids):
        raise ValueError(
            f"size must be less than the {len(vocabulary.ids)} tokens there are, and positive, got {size}."
        )
    description = json.loads(backend.to_str())
    special, ordinary = _kept_tokens(old, description, texts, keep)
    # Of the model itself, which no trainer knows of; as added tokens they would be looked for in texts.
    plain = [token for token in vocabulary.ids if vocabulary.spelling.is_byte_token(token)]
    plain = sorted([*plain, *filter(None, [description["model"]["unk_token"]])], key=vocabulary.ids.__getitem__)
    plain = [token for token in plain if token not in {added["content"] for added in special}]
    model = _learn(description, vocabulary.spelling, texts, special, ordinary, size - len(plain) - len(ordinary))
    ids = model["vocab"]
    for token in plain:
        ids.setdefault(token, len(ids))
    places = dict(ids)
    for added in ordinary:
        places.setdefault(added["content"], len(places))
    if len(places) > size:
        raise ValueError(
            f"size={size} is too small: {len(special)} special tokens, {len(ordinary)} other added tokens that the "
            f"texts or the rules contain, {len(plain)} byte tokens and the letters of the texts alone are "
            f"{len(places)}. Ask for {len(places)} or more."
        )
    description["model"] |= {"vocab": ids, "merges": model["merges"]}
    description["added_tokens"] = [{**added, "id": places[added["content"]]} for added in [*special, *ordinary]]
    renumber(description["post_processor"], places)
    return _with_backend(old, Tokenizer.from_str(json.dumps(description)), places)


def _kept_tokens(
    tokenizer: Any, description: dict[str, Any], texts: Sequence[str], keep: Collection[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The added tokens of a smaller tokenizer, special ones and others, as tokenizer.json has them."""
    templates = tokenizer.chat_template or ""
    template = templates if isinstance(templates, str) else "\n".join(templates.values())
    rules = json.dumps(description["post_processor"], ensure_ascii=False)
    roles = {*tokenizer.special_tokens_map.values(), description["model"]["unk_token"]}
    tokens = sorted(description["added_tokens"], key=lambda added: added["id"])
    asked = [
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
    pattern = _added_token_pattern(asked)
    found = {text for whole in texts for text in pattern.findall(whole)}
    # Some swallow the white space beside them.
    found |= {text.strip() for text in found}
    left_out = {added["id"] for added in asked if added["content"] not in found}
    kept = [added for added in tokens if added["id"] not in left_out]
    return [added for added in kept if added["special"]], [added for added in kept if not added["special"]]


def _added_token_pattern(added_tokens: Iterable[dict[str, Any]]) -> re.Pattern[str]:
    """Finds added tokens in texts, the longest first, as the `tokenizers` library does."""
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
    """A BPE of the texts between added tokens, as tokenizer.json has it."""
    empty = {**description["model"], "vocab": {}, "merges": []}
    learner = Tokenizer.from_str(
        json.dumps({**description, "model": empty, "added_tokens": [], "post_processor": None})
    )
    # Where the normaliser writes the spaces, nothing else would keep words apart.
    if spelling.space and learner.normalizer and spelling.space in learner.normalizer.normalize_str("a b"):
        learner.pre_tokenizer = pre_tokenizers.Split(spelling.space, "merged_with_next")
    trainer: Any = trainers.BpeTrainer(
        vocab_size=max(size, 0),
        special_tokens=[added["content"] for added in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if spelling.byte_level else [],
        show_progress=False,
    )
    cuts = _added_token_pattern([*special, *ordinary])
    shown = Progress("Learning a smaller vocabulary", texts, unit="texts")
    learner.train_from_iterator((part for text in shown for part in cuts.split(text)), trainer)
    return json.loads(learner.to_str())["model"]


def _with_backend(tokenizer: Any, backend: Tokenizer, ids: Mapping[str, int]) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with other tokens, of which special ones are left out that it no longer has."""
    made = copy.deepcopy(tokenizer, {id(tokenizer.backend_tokenizer): backend})
    made._tokenizer = backend
    made.extra_special_tokens = [token for token in made.extra_special_tokens if token in ids]
    # What it was loaded with: old ids, which saving would write again.
    made.init_kwargs = {key: value for key, value in made.init_kwargs.items() if key not in _OF_LOADING}
    made.name_or_path = ""
    return made
