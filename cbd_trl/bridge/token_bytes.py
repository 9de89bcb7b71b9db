"""The exact bytes that each token of a tokenizer stands for, read from its tokenizer.json.

`token_bytes` lists them, `Vocabulary` keeps them with what else is read once, `tokenize_bytes` goes from bytes to
tokens. `ByteTable` holds the bytes as tensors, and `ByteAwareTokenizer` tokenizes texts with such a table at hand.

Shapes: V vocabulary rows, N tokens end to end, X bytes of all of them.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import models
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_trl.utils.blocks import prefix_ids

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# What Python decodes a byte to that is not UTF-8.
_NOT_UTF8 = re.compile("([\udc80-\udcff])")
# Any pre-tokenizer that drops text drops a space, a line break, a digit or a punctuation mark.
_PROBE = "a b  c,\n1 2. d"


def _byte_alphabet() -> dict[str, int]:
    """Map the characters of byte-level BPE to bytes: printable Latin-1 stands for itself, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_alphabet()
_LETTER_OF_BYTE = {byte: letter for letter, byte in _BYTE_OF_LETTER.items()}


@dataclass(frozen=True)
class Spelling:
    """How the tokens of a vocabulary are written in tokenizer.json.

    Args:
        byte_level: in the alphabet of byte-level BPE, one character for each byte.
        space: what stands for a space, such as "▁"; None where a space is written as such.
        byte_tokens: whether `<0x0A>` stands for the byte 10.
    """

    byte_level: bool = False
    space: str | None = None
    byte_tokens: bool = False

    def is_byte_token(self, token: str) -> bool:
        """Tell whether a token is written like `<0x0A>`."""
        return self.byte_tokens and _BYTE_TOKEN.fullmatch(token) is not None

    def to_bytes(self, token: str) -> bytes:
        """Convert a token of the model (not an added one) to its bytes."""
        if self.byte_level and all(letter in _BYTE_OF_LETTER for letter in token):
            return bytes(_BYTE_OF_LETTER[letter] for letter in token)
        if self.is_byte_token(token):
            return bytes.fromhex(token[3:5])
        return (token.replace(self.space, " ") if self.space else token).encode()

    def from_bytes(self, data: bytes) -> list[str]:
        """Convert bytes to what the model reads: words to be split into tokens, and byte tokens.

        Bytes that are not UTF-8 become byte tokens, in the vocabulary or not, except in byte-level BPE.
        """
        if self.byte_level:
            return ["".join(_LETTER_OF_BYTE[byte] for byte in data)]
        text = data.decode(errors="surrogateescape")
        text = text.replace(" ", self.space) if self.space else text
        parts = _NOT_UTF8.split(text)
        return [f"<0x{ord(part) & 0xFF:02X}>" if _NOT_UTF8.match(part) else part for part in parts if part]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer, read once: reading 262,144 of them takes a second.

    Args:
        tokenizer: the one they are from.
        spelling: how its tokens are written.
        ids: {token: id} of all tokens, added ones included.
        added: ids of the added tokens.
        bytes: of every id, see `token_bytes`.
    """

    tokenizer: Any
    spelling: Spelling
    ids: dict[str, int]
    added: frozenset[int]
    bytes: list[bytes | None]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """Read the tokens of a tokenizer.

        Raises:
            ValueError: as `token_bytes`.
        """
        spelling = spelling_of(tokenizer)
        backend: Any = _backend(tokenizer)
        ids = backend.get_vocab(with_added_tokens=False)
        added_tokens = backend.get_added_tokens_decoder()
        table: list[bytes | None] = [None] * (max([*ids.values(), *added_tokens], default=-1) + 1)
        for token, index in ids.items():
            table[index] = spelling.to_bytes(token)
        for index, added in added_tokens.items():
            if added.special or added.lstrip or added.rstrip:
                table[index] = None
            elif added.content not in ids:
                # Byte-level BPE finds added tokens in the text before it maps bytes to characters.
                table[index] = added.content.encode() if spelling.byte_level else spelling.to_bytes(added.content)
        unknown = _unknown(backend)
        for index in [*tokenizer.all_special_ids, *([] if unknown is None else [unknown])]:
            table[index] = None
        ids.update((added.content, index) for index, added in added_tokens.items())
        return cls(tokenizer, spelling, ids, frozenset(added_tokens), table)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """List the bytes of every id of a tokenizer, in the order of the ids.

    Joined, the bytes of a tokenized text are the text as the tokenizer's normalizer leaves it, except that some
    tokenizers put a space before it.

    Args:
        tokenizer: a fast one (of the `tokenizers` library) that keeps every byte: byte-level BPE, or BPE and Unigram
            of the SentencePiece kind, with byte tokens or without.

    Returns:
        as many entries as the highest id plus one. None for ids without text of their own: special tokens, the unknown
        token, unused ids, and added tokens that strip the white space beside them.

    Raises:
        ValueError: the tokenizer has no tokenizer.json, or its tokens cannot be turned into exact bytes.
    """
    return Vocabulary.of(tokenizer).bytes


def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """Find how a tokenizer writes its tokens, from the decoder of its tokenizer.json.

    Args:
        tokenizer: as for `token_bytes`.

    Raises:
        ValueError: as for `token_bytes`.
    """
    backend = _backend(tokenizer)
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if letters := getattr(backend.model, affix, None):
            raise _inexact(tokenizer, f"its tokens have an affix ({affix} {letters!r})")
    _check_keeps_text(tokenizer)
    decoder = component_json(backend.decoder)
    if decoder is None:
        raise _inexact(tokenizer, "it has no decoder, which maps its tokens to text")
    fields: dict[str, Any] = {}
    joined = False
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        kind = step["type"]
        # A strip after the tokens are joined works at the two ends of a text alone.
        if kind == "Strip" and joined:
            continue
        if joined or not _is_understood(step):
            raise _inexact(tokenizer, f"its decoder has a step that is not supported there ({json.dumps(step)})")
        if kind == "ByteLevel":
            fields["byte_level"] = True
        elif kind == "ByteFallback":
            fields["byte_tokens"] = True
        elif kind == "Metaspace":
            fields["space"] = step["replacement"]
        elif kind == "Replace":
            fields["space"] = step["pattern"]["String"]
        joined = kind in ("ByteLevel", "Fuse")
    return Spelling(**fields)


def component_json(part: Any) -> dict[str, Any] | None:
    """Read the entry of tokenizer.json for a part of a tokenizer, such as its decoder; None where it has none.

    Writing the whole file (`to_str`) takes seconds for a large vocabulary.

    Args:
        part: an object of the `tokenizers` library.
    """
    return None if part is None else json.loads(part.__getstate__())


def tokenize_bytes(vocabulary: Vocabulary, chunks: Iterable[bytes]) -> list[tuple[int, ...]]:
    """Tokenize chunks of bytes, each as if inside a text.

    The tokenizer's model alone is used: no normalizer, no prefix, no split into words. So the tokens have the bytes of
    the chunk, and a chunk that is one of the model's tokens mostly becomes that token.

    Args:
        vocabulary: of the tokenizer.
        chunks: bytes, UTF-8 or not.

    Returns:
        ids for each chunk. Bytes that no token has are left out.
    """
    spelling, table, ids = vocabulary.spelling, vocabulary.bytes, vocabulary.ids
    model = vocabulary.tokenizer.backend_tokenizer.model

    def tokens_of(word: str) -> list[int]:
        if spelling.is_byte_token(word):
            return [ids[word]] if word in ids else []
        return [token.id for token in model.tokenize(word)]

    found = ([index for word in spelling.from_bytes(chunk) for index in tokens_of(word)] for chunk in chunks)
    return [tuple(index for index in pieces if table[index] is not None) for pieces in found]


@dataclass(frozen=True)
class ByteTable:
    """The bytes of every id, as tensors.

    Attributes:
        pool_X: the bytes of all ids end to end, uint8.
        starts_V: the first byte of each id in `pool_X`, int64.
        lengths_V: number of bytes of each id, int64.
        special_V: ids without text of their own, such as special tokens, bool. Their bytes are how they are written
            in a text that a tokenizer reads; none where they cannot be.
    """

    pool_X: Tensor
    starts_V: Tensor
    lengths_V: Tensor
    special_V: Tensor

    @classmethod
    def of(cls, texts: Sequence[bytes | None], special: Mapping[int, bytes]) -> "ByteTable":
        """Make a table.

        Args:
            texts: the bytes of each id, None for special tokens (see `token_bytes`).
            special: {id: how a special token is written}; those left out have no bytes.
        """
        pieces = [special.get(index, b"") if text is None else text for index, text in enumerate(texts)]
        lengths_V = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
        joined = bytearray(b"".join(pieces))
        pool_X = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        special_V = torch.tensor([text is None for text in texts], dtype=torch.bool)
        return cls(pool_X, lengths_V.cumsum(0) - lengths_V, lengths_V, special_V)

    def check(self, ids_N: Tensor) -> None:
        """Check that the student's tokenizer has all ids of a batch.

        Args:
            ids_N: token ids, int64.

        Raises:
            ValueError: if an id is negative or has no entry.
        """
        known = self.lengths_V.numel()
        wrong_N = ids_N[(ids_N < 0) | (ids_N >= known)]
        if wrong_N.numel():
            raise ValueError(
                f"The rows have token id {wrong_N[0].item()}, but the student's tokenizer has only 0 to {known - 1}: "
                "another tokenizer made them, so their text is unknown. Pass the tokenizer that made them as "
                "`processing_class`."
            )

    def spell(self, ids_N: Tensor, skip_N: Tensor) -> Tensor:
        """Join the bytes of tokens.

        Args:
            ids_N: token ids.
            skip_N: bytes to leave out at the beginning of each, at most as many as it has, int64.

        Returns:
            (X,) uint8.
        """
        return self.pool_X[byte_indices(self.starts_V[ids_N] + skip_N, self.lengths_V[ids_N] - skip_N)]

    def begins_with_space(self, ids_N: Tensor) -> Tensor:
        """Flag the tokens that are text whose first byte is a space.

        Args:
            ids_N: token ids.

        Returns:
            (N,) bool.
        """
        text_N = (self.lengths_V[ids_N] > 0) & ~self.special_V[ids_N]
        first_N = self.starts_V[ids_N].clamp(max=max(self.pool_X.numel() - 1, 0))
        return text_N & (self.pool_X[first_N] == ord(" ")) if self.pool_X.numel() else text_N


@dataclass(frozen=True)
class EncodedTexts:
    """Tokenized texts, end to end.

    Attributes:
        ids_N: token ids, int64.
        text_N: the index of the text that each is from, int64.
        encodings: of each text, by the `tokenizers` library.
    """

    ids_N: Tensor
    text_N: Tensor
    encodings: Sequence[Any]

    def character_offsets(self, texts: Sequence[int]) -> Tensor:
        """Collect the offsets (start, end) that the tokenizer gives for all tokens of some texts.

        Args:
            texts: their indices.

        Returns:
            (N, 2) int64, in characters of each text.
        """
        spans = [span for text in texts for span in self.encodings[text].offsets]
        return torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)


class ByteAwareTokenizer:
    """A tokenizer together with the bytes of its tokens.

    Args:
        tokenizer: as for `token_bytes`.

    Attributes:
        bytes: the bytes of every id, None for special tokens (see `token_bytes`).
        unknown: id of the unknown token, if there is one without another role.
        special_bytes: {id: bytes} of the other special tokens as they are written in a text.
        table: both, as tensors.
        prefix: ids that the tokenizer puts before a text by itself, such as BOS.
        space_at_start: whether it puts a space before a text.
        space_after_special_token: whether it puts a space before what follows a special token.

    Raises:
        ValueError: as `token_bytes`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self.bytes = token_bytes(tokenizer)
        added = self.tokenizer.added_tokens_decoder
        roles = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        self.unknown = None if self.tokenizer.unk_token_id in roles else self.tokenizer.unk_token_id
        self.special_bytes = {
            index: token.content.encode()
            for index, token in added.items()
            if self.bytes[index] is None and index != self.unknown
        }
        self.table = ByteTable.of(self.bytes, self.special_bytes)
        self._special_texts = {content.decode() for content in self.special_bytes.values()}
        # Gemma has 6,000 special tokens of 20 lengths.
        self._special_lengths = sorted({len(text) for text in self._special_texts}, reverse=True)
        self.prefix = prefix_ids(tokenizer)
        # A special token that strips the white space beside it would hide the added space.
        plain = [index for index in self.special_bytes if not (added[index].lstrip or added[index].rstrip)]
        after_special = self._ids(added[plain[0]].content + "a")[1:] if plain else []
        self.space_at_start = self._begin_with_space(self._ids("a"))
        self.space_after_special_token = self._begin_with_space(after_special)

    def encode(self, texts: list[str]) -> EncodedTexts:
        """Tokenize texts without special tokens around them and without truncation.

        Args:
            texts: any; special tokens that are written out in them are read as such.
        """
        # verbose: no warning of rows that are longer than the model's context; they are cut afterwards.
        rows = self.tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        lengths = torch.tensor([len(ids) for ids in rows["input_ids"]], dtype=torch.int64)
        ids_N = torch.tensor([token for ids in rows["input_ids"] for token in ids], dtype=torch.int64)
        return EncodedTexts(ids_N, torch.arange(len(texts)).repeat_interleave(lengths), rows.encodings)

    def leading_special_token(self, text: str) -> str:
        """Find the longest special token that a text begins with, "" for none.

        Args:
            text: any.
        """
        return next((text[:size] for size in self._special_lengths if text[:size] in self._special_texts), "")

    def added_spaces(self, ids_N: Tensor, first_N: Tensor) -> Tensor:
        """Flag the tokens that begin with a space that is not in the text.

        Where a tokenizer adds a space only if there is none, its tokens do not show it; a space then counts as added.

        Args:
            ids_N: token ids.
            first_N: the first tokens of their texts, bool.

        Returns:
            (N,) int64, 1 or 0.
        """
        special_N = self.table.special_V[ids_N] & (self.table.lengths_V[ids_N] > 0)
        added_N = first_N & self.space_at_start
        if self.space_after_special_token:
            added_N |= special_N.roll(1) & ~first_N
        return (added_N & self.table.begins_with_space(ids_N)).long()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _begin_with_space(self, ids: list[int]) -> bool:
        return bool(ids) and bool(self.table.begins_with_space(torch.tensor(ids[:1])))


def byte_indices(starts_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Index every byte of some runs of bytes, run by run.

    Args:
        starts_N: first index of each run, int64.
        lengths_N: bytes of each run, int64.

    Returns:
        (X,) int64.
    """
    shifts_N = starts_N - (lengths_N.cumsum(0) - lengths_N)
    shifts_X = shifts_N.repeat_interleave(lengths_N)
    return shifts_X + torch.arange(shifts_X.numel())


def any_flagged(flags_X: Tensor, lengths_N: Tensor) -> Tensor:
    """Flag the tokens of which a byte is flagged.

    Args:
        flags_X: of the tokens' bytes end to end, bool.
        lengths_N: bytes of each token, int64.

    Returns:
        (N,) bool; False for a token without bytes.
    """
    before_X = torch.cat([torch.zeros(1, dtype=torch.int64), flags_X.cumsum(0)])
    ends_N = lengths_N.cumsum(0)
    return before_X[ends_N] > before_X[ends_N - lengths_N]


def _is_understood(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return "String" in step["pattern"] and step["content"] == " "
    return step["type"] in ("ByteLevel", "ByteFallback", "Metaspace", "Fuse")


def _unknown(backend: Any) -> int | None:
    """Find the id of the unknown token."""
    unknown = getattr(backend.model, "unk_token", None)
    if unknown is not None:
        return backend.model.token_to_id(unknown)
    # Unigram has it in the file alone.
    return json.loads(backend.model.__getstate__())["unk_id"] if isinstance(backend.model, models.Unigram) else None


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{_name(tokenizer)} is not a fast tokenizer: it has no tokenizer.json, from which the bytes of its "
            "tokens are read. Load one with AutoTokenizer.from_pretrained(...) from a folder with one, or convert it."
        )
    return backend


def _check_keeps_text(tokenizer: Any) -> None:
    """Check that the pre-tokenizer drops no part of a text."""
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    if pre_tokenizer is None:
        return
    covered = {i for _, (start, end) in pre_tokenizer.pre_tokenize_str(_PROBE) for i in range(start, end)}
    lost = sorted({letter for i, letter in enumerate(_PROBE) if i not in covered})
    if lost:
        raise _inexact(tokenizer, f"its pre-tokenizer drops parts of the text, such as {lost[0]!r}")


def _inexact(tokenizer: Any, reason: str) -> ValueError:
    return ValueError(
        f"The tokens of {_name(tokenizer)} cannot be turned into the exact bytes of a text: {reason}. Use a tokenizer "
        "that keeps every byte: byte-level BPE (GPT-2, Llama 3, Qwen), or the SentencePiece kind (Llama 2, Gemma)."
    )


def _name(tokenizer: Any) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f"{type(tokenizer).__name__} {name!r}" if name else f"this {type(tokenizer).__name__}"
