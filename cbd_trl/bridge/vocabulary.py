"""Match the tokens of a new vocabulary with those of an old one: by bytes, by role, or as several old tokens.

`match_vocabularies` makes the match, `covered_share` measures it on texts, and `move_token_ids` applies it to the
special tokens that a model's configs name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.token_bytes import Vocabulary, token_bytes, tokenize_bytes

# The old roles that a new role may take over. Without a BOS, a text begins after the EOS of another.
_ROLES = {
    "eos_token_id": ("eos_token_id",),
    "bos_token_id": ("bos_token_id", "eos_token_id"),
    "pad_token_id": ("pad_token_id",),
    "unk_token_id": ("unk_token_id",),
    "sep_token_id": ("sep_token_id",),
    "cls_token_id": ("cls_token_id",),
    "mask_token_id": ("mask_token_id",),
}
# A model never generates the others: they take no row that has another role.
_GENERATED_ROLES = ("eos_token_id", "bos_token_id")
_CONFIG_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
# Settings of generation that name old ids, whose text need not be a single token now.
_SETTINGS_OF_OLD_IDS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "suppress_tokens",
)


@dataclass(frozen=True)
class VocabularyMatch:
    """What each id of a new vocabulary is in the old one; each id is in exactly one of the last four fields.

    Args:
        size: the highest new id plus one.
        copied: {new id: old id} of tokens with the same bytes.
        by_role: {new id: old id} of special tokens with the same role (EOS, BOS, padding, unknown) or the same text.
        built: {new id: old ids} of tokens whose bytes are those of several old tokens joined.
        neutral: ids without a counterpart: text that the old tokenizer cannot read, other roles, unused ids.
    """

    size: int
    copied: Mapping[int, int]
    by_role: Mapping[int, int]
    built: Mapping[int, tuple[int, ...]]
    neutral: tuple[int, ...]

    @property
    def source(self) -> dict[int, int]:
        """{new id: old id} of all tokens that are kept as they are."""
        return {**self.copied, **self.by_role}

    def __str__(self) -> str:
        return (
            f"{self.size} tokens: {len(self.copied)} with the bytes of an old one, {len(self.by_role)} with its role, "
            f"{len(self.built)} built from pieces, {len(self.neutral)} neutral"
        )


def match_vocabularies(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> VocabularyMatch:
    """Find for each token of a new vocabulary what it is in an old one.

    Special tokens come first, by role, then by text. Padding and the unknown token take only tokens without another
    role: a padding token with the row of EOS would be as likely as EOS. Then come tokens of the same bytes, the one
    written in the same way if there are two, and then several old tokens with the bytes of a new one.

    Args:
        old: the tokenizer that a model has.
        new: the tokenizer that it is to have.

    Raises:
        ValueError: a tokenizer without exact bytes (see `token_bytes`), or two that have no token in common.
    """
    return match_loaded(Vocabulary.of(old), Vocabulary.of(new))


def match_loaded(old: Vocabulary, new: Vocabulary) -> VocabularyMatch:
    """Do the same as `match_vocabularies` for tokenizers that are read already.

    Args:
        old, new: as there.

    Raises:
        ValueError: no token in common.
    """
    by_role, lost = _match_roles(old.tokenizer, new.tokenizer)
    exact = _ExactTokens(old)
    copied: dict[int, int] = {}
    rest: dict[int, bytes] = {}
    for token, index in sorted(new.ids.items(), key=itemgetter(1)):
        if index in by_role:
            continue
        data, added = new.bytes[index], old.ids.get(token) if index in new.added else None
        if added in old.added and (data is None or old.bytes[added] is None):
            by_role[index] = added
        elif data is not None and (same := exact.find(token, data)) is not None:
            copied[index] = same
        elif index not in lost:
            rest[index] = token.encode() if data is None else data
    if not copied:
        raise ValueError(
            f"The two tokenizers ({len(old.bytes)} and {len(new.bytes)} tokens) have no token with the same bytes, "
            "so no row could be kept. Check that both are the right ones; if they are, train new embeddings instead."
        )
    built = {index: found for index, found in zip(rest, tokenize_bytes(old, rest.values()), strict=True) if found}
    matched = {**copied, **by_role, **built}
    others = tuple(index for index in range(len(new.bytes)) if index not in matched)
    return VocabularyMatch(len(new.bytes), copied, by_role, built, others)


def counterpart(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, index: int) -> int | None:
    """Find the new id that takes over an old special token in `match_vocabularies`.

    Args:
        old: the tokenizer that a model has.
        new: the tokenizer that it is to have.
        index: id of the old special token.

    Returns:
        the id of the same role where there are several; None if there is none.
    """
    matched = _match_roles(old, new)[0]
    same = [getattr(new, role) for role in _ROLES if getattr(old, role) == index]
    by_role = next((found for found in [*same, *matched] if matched.get(found) == index), None)
    if by_role is not None:
        return by_role
    by_text: int | None = new.added_tokens_encoder.get(old.convert_ids_to_tokens(index))
    return None if by_text in matched else by_text


def covered_share(match: VocabularyMatch, new: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """Compute the share of bytes of texts that are in tokens with the same bytes in the old vocabulary.

    Args:
        match: of two vocabularies.
        new: the new tokenizer.
        texts: at least one that is not empty.

    Returns:
        0 to 1.

    Raises:
        ValueError: there is no text.
    """
    table, covered, total = token_bytes(new), 0, 0
    for text in texts:
        for index in new(text, add_special_tokens=False)["input_ids"]:
            length = len(table[index] or b"")
            total += length
            covered += length if index in match.copied else 0
    if not total:
        raise ValueError(
            "Got no text, and the share of covered bytes is measured on texts. Pass at least one that is not empty."
        )
    return covered / total


def config_token_ids(model: Any) -> set[int]:
    """Collect the ids that a model's configs name: BOS, EOS (there may be several) and padding.

    Args:
        model: a transformers model.
    """
    configs = (model.config.get_text_config(), model.generation_config)
    found = [getattr(config, role, None) for config in configs if config is not None for role in _CONFIG_ROLES]
    return {index for ids in found if ids is not None for index in (ids if isinstance(ids, list) else [ids])}


def move_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase, match: VocabularyMatch) -> None:
    """Set the BOS, EOS and padding ids in the configs of a model to those of its new tokenizer.

    Args:
        model: its config and generation config are changed in place. Generation settings that name single old tokens
            (suppressed, forced) are dropped.
        tokenizer: the new one. Of several EOS ids in a config, those that the match keeps stay besides its own.
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
    for name in _SETTINGS_OF_OLD_IDS:
        if getattr(model.generation_config, name, None) is not None:
            setattr(model.generation_config, name, None)


class _ExactTokens:
    """Finds the old token with given bytes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids, self._table = vocabulary.ids, vocabulary.bytes
        self._first: dict[bytes, int] = {}
        byte_tokens = []
        for token, index in sorted(self._ids.items(), key=itemgetter(1)):
            # A text is tokenized to "A", not to <0x41>.
            if vocabulary.spelling.is_byte_token(token):
                byte_tokens.append(index)
            elif data := self._table[index]:
                self._first.setdefault(data, index)
        for index in byte_tokens:
            if data := self._table[index]:
                self._first.setdefault(data, index)

    def find(self, token: str, data: bytes) -> int | None:
        same = self._ids.get(token)
        return same if same is not None and self._table[same] == data else self._first.get(data)


def _match_roles(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> tuple[dict[int, int], set[int]]:
    """Match special tokens by role: {new id: old id}, and the new ids of roles without an old counterpart."""
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
