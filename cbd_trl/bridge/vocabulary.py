"""Where the tokens of a new vocabulary come from in an old one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.token_bytes import Vocabulary, token_bytes, tokenize_bytes

# Which of the old roles a new one may stand for. A text begins after the end of another where there is no begin mark.
_ROLES = {
    "eos_token_id": ("eos_token_id",),
    "bos_token_id": ("bos_token_id", "eos_token_id"),
    "pad_token_id": ("pad_token_id",),
    "unk_token_id": ("unk_token_id",),
    "sep_token_id": ("sep_token_id",),
    "cls_token_id": ("cls_token_id",),
    "mask_token_id": ("mask_token_id",),
}
# The others are never what a model should say: they take no row that stands for more.
_GENERATED_ROLES = ("eos_token_id", "bos_token_id")


@dataclass(frozen=True)
class VocabularyMatch:
    """What each id of a new vocabulary is in the old one. Every id is in one of the four.

    Args:
        size: the highest new id plus one.
        copied: {new id: old id} of the same bytes.
        by_role: {new id: old id} of special tokens: the same role (end, begin, padding, unknown), or marks of the
            same text.
        built: {new id: its pieces}, old ids that have the same bytes when joined.
        neutral: what the old tokenizer cannot read or has nothing like, and ids that nothing has.
    """

    size: int
    copied: Mapping[int, int]
    by_role: Mapping[int, int]
    built: Mapping[int, tuple[int, ...]]
    neutral: tuple[int, ...]

    @property
    def source(self) -> dict[int, int]:
        """{new id: old id} of all that is taken over as it is."""
        return {**self.copied, **self.by_role}

    def __str__(self) -> str:
        return (
            f"{self.size} tokens: {len(self.copied)} with the bytes of an old one, {len(self.by_role)} with its role, "
            f"{len(self.built)} built from pieces, {len(self.neutral)} neutral"
        )


def match_vocabularies(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> VocabularyMatch:
    """Find for each token of a vocabulary what it is in another.

    Special tokens first: by role, then by text. Padding and the unknown token take only what has no other role: a
    padding token with the row of the end would be as likely as the end. Then tokens of the same bytes, the one of the
    same spelling where there are two; then pieces of the same bytes.

    Args:
        old: the tokenizer that a model has.
        new: the one it shall have.

    Raises:
        ValueError: a tokenizer that does not tell its bytes (see `token_bytes`), or nothing in common.
    """
    return match_loaded(Vocabulary.of(old), Vocabulary.of(new))


def match_loaded(old: Vocabulary, new: Vocabulary) -> VocabularyMatch:
    """`match_vocabularies` of two that are read already.

    Args:
        old, new: as there.

    Raises:
        ValueError: nothing in common.
    """
    by_role, lost = _match_roles(old.tokenizer, new.tokenizer)
    exact = _ExactTokens(old)
    copied: dict[int, int] = {}
    rest: dict[int, bytes] = {}
    for token, index in sorted(new.ids.items(), key=itemgetter(1)):
        if index in by_role:
            continue
        data, mark = new.bytes[index], old.ids.get(token) if index in new.added else None
        if mark in old.added and (data is None or old.bytes[mark] is None):
            by_role[index] = mark
        elif data is not None and (same := exact.find(token, data)) is not None:
            copied[index] = same
        elif index not in lost:
            rest[index] = token.encode() if data is None else data
    if not copied:
        raise ValueError(
            f"The two tokenizers ({len(old.bytes)} and {len(new.bytes)} tokens) have no token of the same bytes: "
            "there is nothing to carry over. Check that both are the ones that are meant; else train a new embedding."
        )
    built = {index: found for index, found in zip(rest, tokenize_bytes(old, rest.values()), strict=True) if found}
    placed = {**copied, **by_role, **built}
    others = tuple(index for index in range(len(new.bytes)) if index not in placed)
    return VocabularyMatch(len(new.bytes), copied, by_role, built, others)


def counterpart(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, index: int) -> int | None:
    """The new id that takes over an old special token, as `match_vocabularies` says.

    Args:
        old: the tokenizer that a model has.
        new: the one it shall have.
        index: of the old one.

    Returns:
        that of the same role where there are several; None for none.
    """
    matched = _match_roles(old, new)[0]
    same = [getattr(new, role) for role in _ROLES if getattr(old, role) == index]
    by_role = next((found for found in [*same, *matched] if matched.get(found) == index), None)
    if by_role is not None:
        return by_role
    by_text: int | None = new.added_tokens_encoder.get(old.convert_ids_to_tokens(index))
    return None if by_text in matched else by_text


def covered_share(match: VocabularyMatch, new: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """The share of the bytes of texts that stand in tokens taken over as they are.

    Args:
        match: of two vocabularies.
        new: the new tokenizer.
        texts: any.

    Returns:
        0 to 1.

    Raises:
        ValueError: no text.
    """
    table, covered, total = token_bytes(new), 0, 0
    for text in texts:
        for index in new(text, add_special_tokens=False)["input_ids"]:
            length = len(table[index] or b"")
            total += length
            covered += length if index in match.copied else 0
    if not total:
        raise ValueError("The share of covered bytes is that of a text, got no text. Give some that is not empty.")
    return covered / total


class _ExactTokens:
    """Old tokens by their bytes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids, self._table = vocabulary.ids, vocabulary.bytes
        self._first: dict[bytes, int] = {}
        last = []
        for token, index in sorted(self._ids.items(), key=itemgetter(1)):
            # "A" is what a text is made of, <0x41> is not.
            if vocabulary.spelling.is_byte_token(token):
                last.append(index)
            elif data := self._table[index]:
                self._first.setdefault(data, index)
        for index in last:
            if data := self._table[index]:
                self._first.setdefault(data, index)

    def find(self, token: str, data: bytes) -> int | None:
        same = self._ids.get(token)
        return same if same is not None and self._table[same] == data else self._first.get(data)


def _match_roles(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> tuple[dict[int, int], set[int]]:
    """{new id: old id} by role, and new ids of a role that the old tokenizer has nothing for."""
    matched: dict[int, int] = {}
    lost: set[int] = set()
    for role, counterparts in _ROLES.items():
        index = getattr(new, role)
        if index is None or index in matched:
            continue
        candidates = [found for name in counterparts if (found := getattr(old, name)) is not None]
        if role not in _GENERATED_ROLES:
            candidates = [found for found in candidates if found not in matched.values()]
        if candidates:
            matched[index] = candidates[0]
        elif role not in _GENERATED_ROLES:
            lost.add(index)
    return matched, lost


_CONFIG_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
# Settings of generation that name old ids, whose words need not be single tokens now.
_DROPPED = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "suppress_tokens",
)


def config_token_ids(model: Any) -> set[int]:
    """The ids that a model's configs name: begin, end (there may be several) and padding.

    Args:
        model: of transformers.
    """
    configs = (model.config.get_text_config(), model.generation_config)
    found = [getattr(config, role, None) for config in configs if config is not None for role in _CONFIG_ROLES]
    return {index for ids in found if ids is not None for index in (ids if isinstance(ids, list) else [ids])}


def move_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase, match: VocabularyMatch) -> None:
    """Have the configs of a model name the ids of its new tokenizer.

    Args:
        model: its config and generation config are changed in place. What its generation settings say about single
            old tokens (suppressed ones, forced ones) is dropped.
        tokenizer: the new one. Of several ends of a text, those it has not itself are kept where they were taken over.
        match: from the old vocabulary to the new one.
    """
    new_ids: dict[int, int] = {}
    for new, old in sorted(match.source.items()):
        new_ids.setdefault(old, new)
    for config in (model.config.get_text_config(), model.generation_config):
        if config is None:
            continue
        for role in _CONFIG_ROLES:
            before = getattr(config, role, None)
            listed = before if isinstance(before, list) else [before]
            kept = [new_ids[old] for old in listed if old in new_ids]
            own = getattr(tokenizer, role)
            if own is not None:
                kept = [own, *(index for index in kept if index != own and isinstance(before, list))]
            setattr(config, role, kept if isinstance(before, list) and len(kept) > 1 else next(iter(kept), None))
    for name in _DROPPED:
        if getattr(model.generation_config, name, None) is not None:
            setattr(model.generation_config, name, None)
