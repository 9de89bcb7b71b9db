"""The exact bytes that each token of a vocabulary stands for, as the tokenizer's own tokenizer.json says."""

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
# What Python decodes a byte to that is no UTF-8.
_NO_UTF8 = re.compile("([\udc80-\udcff])")
# Any pre-tokenizer that drops text drops a space, a line break, a digit or a punctuation mark.
_PROBE = "a b  c,\n1 2. d"


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with: printable Latin-1 as it is, the rest from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_alphabet()
_LETTER_OF_BYTE = {byte: letter for letter, byte in _BYTE_OF_LETTER.items()}


@dataclass(frozen=True)
class Spelling:
    """How the tokens of a vocabulary are written.

    Args:
        byte_level: in the alphabet of byte-level BPE, a letter for a byte.
        space: what stands for a space, such as "▁"; None where a space is a space.
        byte_tokens: whether `<0x0A>` is the byte 10.
    """

    byte_level: bool = False
    space: str | None = None
    byte_tokens: bool = False

    def is_byte_token(self, token: str) -> bool:
        """Whether it is one of those like `<0x0A>`."""
        return self.byte_tokens and _BYTE_TOKEN.fullmatch(token) is not None

    def read(self, token: str) -> bytes:
        """The bytes of a token of the model (not of an added one)."""
        if self.byte_level and all(letter in _BYTE_OF_LETTER for letter in token):
            return bytes(_BYTE_OF_LETTER[letter] for letter in token)
        if self.is_byte_token(token):
            return bytes.fromhex(token[3:5])
        return (token.replace(self.space, " ") if self.space else token).encode()

    def write(self, data: bytes) -> list[str]:
        """The same bytes as the model reads them: words to be split into tokens, and byte tokens.

        Bytes that are no UTF-8 become byte tokens, whether the vocabulary has them or not, save at the byte level.
        """
        if self.byte_level:
            return ["".join(_LETTER_OF_BYTE[byte] for byte in data)]
        text = data.decode(errors="surrogateescape")
        text = text.replace(" ", self.space) if self.space else text
        parts = _NO_UTF8.split(text)
        return [f"<0x{ord(part) & 0xFF:02X}>" if _NO_UTF8.match(part) else part for part in parts if part]


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's tokens are, read once: where there are 262,144 of them each reading takes a second.

    Args:
        tokenizer: it was read from.
        spelling: how its tokens are written.
        ids: {token: id} of all, added ones included.
        added: ids of the added ones.
        bytes: of every id, see `token_bytes`.
    """

    tokenizer: Any
    spelling: Spelling
    ids: dict[str, int]
    added: frozenset[int]
    bytes: list[bytes | None]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """Read a tokenizer.

        Raises:
            ValueError: as `token_bytes`.
        """
        spelling = spelling_of(tokenizer)
        backend: Any = _backend(tokenizer)
        ids = backend.get_vocab(with_added_tokens=False)
        added_tokens = backend.get_added_tokens_decoder()
        table: list[bytes | None] = [None] * (max([*ids.values(), *added_tokens], default=-1) + 1)
        for token, index in ids.items():
            table[index] = spelling.read(token)
        for index, added in added_tokens.items():
            if added.special or added.lstrip or added.rstrip:
                table[index] = None
            elif added.content not in ids:
                # Byte-level BPE finds it in the text before there are any letters for bytes.
                table[index] = added.content.encode() if spelling.byte_level else spelling.read(added.content)
        unknown = _unknown(backend)
        for index in [*tokenizer.all_special_ids, *([] if unknown is None else [unknown])]:
            table[index] = None
        ids.update((added.content, index) for index, added in added_tokens.items())
        return cls(tokenizer, spelling, ids, frozenset(added_tokens), table)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes of every id of a tokenizer, in the order of the ids.

    Joined, the bytes of a tokenised text are the text as the tokenizer's normaliser leaves it, save that some
    tokenizers put a space before it.

    Args:
        tokenizer: a fast one (of the `tokenizers` library) that keeps every byte: byte-level BPE, or BPE and Unigram
            of the SentencePiece kind, with byte tokens or without.

    Returns:
        as many entries as the highest id plus one. None for what stands for no text of its own: special tokens, the
        unknown token, ids that nothing has, and added tokens that swallow the white space beside them.

    Raises:
        ValueError: the tokenizer has no tokenizer.json, or its tokens do not tell their bytes exactly.
    """
    return Vocabulary.of(tokenizer).bytes


def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """How a tokenizer writes its tokens, read from the decoder of its tokenizer.json.

    Args:
        tokenizer: as for `token_bytes`.

    Raises:
        ValueError: as for `token_bytes`.
    """
    backend = _backend(tokenizer)
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        if letters := getattr(backend.model, mark, None):
            raise _inexact(tokenizer, f"its tokens carry marks ({mark} {letters!r})")
    _check_keeps_text(tokenizer)
    decoder = description_of(backend.decoder)
    if decoder is None:
        raise _inexact(tokenizer, "it has no decoder, which says what its tokens are in a text")
    fields: dict[str, Any] = {}
    joined = False
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        kind = step["type"]
        # What strips after the tokens are joined does so at the two ends of a text.
        if kind == "Strip" and joined:
            continue
        if joined or not _understood(step):
            raise _inexact(tokenizer, f"its decoder has a step that is not understood there ({json.dumps(step)})")
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


def _understood(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return "String" in step["pattern"] and step["content"] == " "
    return step["type"] in ("ByteLevel", "ByteFallback", "Metaspace", "Fuse")


def description_of(part: Any) -> dict[str, Any] | None:
    """What tokenizer.json says of a part of a tokenizer, such as its decoder; None where there is no such part.

    The file as a whole (`to_str`) takes seconds where a vocabulary is large.

    Args:
        part: of the `tokenizers` library.
    """
    return None if part is None else json.loads(part.__getstate__())


def _unknown(backend: Any) -> int | None:
    """The id of what stands for unknown text."""
    unknown = getattr(backend.model, "unk_token", None)
    if unknown is not None:
        return backend.model.token_to_id(unknown)
    # Unigram tells in the file alone.
    return json.loads(backend.model.__getstate__())["unk_id"] if isinstance(backend.model, models.Unigram) else None


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{_name(tokenizer)} is not a fast tokenizer: it has no tokenizer.json, which says what bytes its tokens "
            "stand for. Load it with AutoTokenizer.from_pretrained(...) from a folder that has one, or convert it."
        )
    return backend


def _check_keeps_text(tokenizer: Any) -> None:
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    if pre_tokenizer is None:
        return
    covered = {place for _, (start, end) in pre_tokenizer.pre_tokenize_str(_PROBE) for place in range(start, end)}
    lost = sorted({letter for place, letter in enumerate(_PROBE) if place not in covered})
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


@dataclass(frozen=True)
class ByteTable:
    """What every id stands for.

    Attributes:
        pool_X: the bytes of all ids end to end, uint8.
        starts_V: where those of an id begin, int64.
        lengths_V: how many they are, int64.
        marks_V: ids that are no text, such as special tokens, bool. Their bytes are how they are written in a text
            that a tokenizer reads; none where they cannot be.
    """

    pool_X: Tensor
    starts_V: Tensor
    lengths_V: Tensor
    marks_V: Tensor

    @classmethod
    def of(cls, texts: Sequence[bytes | None], marks: Mapping[int, bytes]) -> "ByteTable":
        """Make a table.

        Args:
            texts: the bytes of each id, None for marks (see `token_bytes`).
            marks: how a mark is written; those that are not named have no bytes.
        """
        pieces = [marks.get(index, b"") if text is None else text for index, text in enumerate(texts)]
        lengths_V = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
        joined = bytearray(b"".join(pieces))
        pool_X = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        marks_V = torch.tensor([text is None for text in texts], dtype=torch.bool)
        return cls(pool_X, lengths_V.cumsum(0) - lengths_V, lengths_V, marks_V)

    def check(self, ids_N: Tensor) -> None:
        """Refuse rows with ids that the student's tokenizer does not have.

        Args:
            ids_N: token ids.

        Raises:
            ValueError: if an id is negative or has no entry.
        """
        known = self.lengths_V.numel()
        wrong_N = ids_N[(ids_N < 0) | (ids_N >= known)]
        if wrong_N.numel():
            raise ValueError(
                f"The rows have token id {wrong_N[0].item()}, but the student's tokenizer knows only 0 to "
                f"{known - 1}: they were made by another tokenizer, so what text they are is not known. Pass the "
                "tokenizer that made them as `processing_class`."
            )

    def spell(self, ids_N: Tensor, skip_N: Tensor) -> Tensor:
        """The text of tokens.

        Args:
            ids_N: token ids.
            skip_N: how many bytes to leave out at the beginning of each, at most as many as it has, int64.

        Returns:
            (X,) uint8, their bytes end to end.
        """
        return self.pool_X[places_of_bytes(self.starts_V[ids_N] + skip_N, self.lengths_V[ids_N] - skip_N)]

    def begins_with_space(self, ids_N: Tensor) -> Tensor:
        """Which tokens are text whose first byte is a space.

        Args:
            ids_N: token ids.

        Returns:
            (N,) bool.
        """
        text_N = (self.lengths_V[ids_N] > 0) & ~self.marks_V[ids_N]
        first_N = self.starts_V[ids_N].clamp(max=max(self.pool_X.numel() - 1, 0))
        return text_N & (self.pool_X[first_N] == ord(" ")) if self.pool_X.numel() else text_N


def places_of_bytes(starts_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Where each byte of some runs of bytes is.

    Args:
        starts_N: where the runs begin, int64.
        lengths_N: how long they are, int64.

    Returns:
        (X,) int64, run by run.
    """
    shifts_N = starts_N - (lengths_N.cumsum(0) - lengths_N)
    places_X = shifts_N.repeat_interleave(lengths_N)
    return places_X + torch.arange(places_X.numel())


def any_byte(flags_X: Tensor, lengths_N: Tensor) -> Tensor:
    """For each token, is one of its bytes flagged?

    Args:
        flags_X: bool, of all bytes, those of the tokens end to end.
        lengths_N: bytes of each token, int64.

    Returns:
        (N,) bool; False for a token of no bytes.
    """
    before_X = torch.cat([torch.zeros(1, dtype=torch.int64), flags_X.cumsum(0)])
    ends_N = lengths_N.cumsum(0)
    return before_X[ends_N] > before_X[ends_N - lengths_N]


def pieces_of(vocabulary: Vocabulary, chunks: Iterable[bytes]) -> list[tuple[int, ...]]:
    """The tokens of each chunk of bytes, read as the inside of a text.

    The tokenizer's model reads them alone: no normaliser, nothing put before a text, no cut between words. So the
    bytes of the pieces are those of the chunk, and a chunk that is one of the model's tokens is mostly that one.

    Args:
        vocabulary: of the tokenizer.
        chunks: the bytes.

    Returns:
        ids for each chunk. Bytes that the vocabulary cannot write are left out.
    """
    spelling, table, ids = vocabulary.spelling, vocabulary.bytes, vocabulary.ids
    model = vocabulary.tokenizer.backend_tokenizer.model

    def read(word: str) -> list[int]:
        if spelling.is_byte_token(word):
            return [ids[word]] if word in ids else []
        return [token.id for token in model.tokenize(word)]

    found = ([index for word in spelling.write(chunk) for index in read(word)] for chunk in chunks)
    return [tuple(index for index in pieces if table[index] is not None) for pieces in found]


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts, end to end.

    Attributes:
        ids_N: token ids, int64.
        text_N: the number of the text that each is from, int64.
        encodings: of each text, by the `tokenizers` library.
    """

    ids_N: Tensor
    text_N: Tensor
    encodings: Sequence[Any]

    def spans_of(self, texts: Sequence[int]) -> Tensor:
        """The spans (start, end) of all tokens of some texts, as the tokenizer tells them.

        Args:
            texts: their numbers.

        Returns:
            (N, 2) int64, in characters of each text.
        """
        spans = [span for text in texts for span in self.encodings[text].offsets]
        return torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)


class Reader:
    """Reads texts, and knows what each token stands for.

    Args:
        tokenizer: one that `token_bytes` takes.

    Attributes:
        texts: the bytes of every id, None for marks.
        unknown: the id that stands for text that is not known, if there is one and it has no other role.
        written: how the other marks are written in a text that is read: the content of special tokens.
        table: both, as tensors.
        prefix: ids that the tokenizer puts before a text by itself, such as BOS.
        space_at_start: whether it puts a space before a text.
        space_after_mark: and before what follows a mark.

    Raises:
        ValueError: as `token_bytes`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self.texts = token_bytes(tokenizer)
        added = self.tokenizer.added_tokens_decoder
        roles = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        self.unknown = None if self.tokenizer.unk_token_id in roles else self.tokenizer.unk_token_id
        self.written = {
            index: token.content.encode()
            for index, token in added.items()
            if self.texts[index] is None and index != self.unknown
        }
        self.table = ByteTable.of(self.texts, self.written)
        self._marks = {content.decode() for content in self.written.values()}
        # Gemma has 6,000 marks of 20 lengths.
        self._mark_lengths = sorted({len(mark) for mark in self._marks}, reverse=True)
        self.prefix = prefix_ids(tokenizer)
        # A mark that swallows the white space beside it would hide what we look for.
        plain = [index for index in self.written if not (added[index].lstrip or added[index].rstrip)]
        after_mark = self._ids(added[plain[0]].content + "a")[1:] if plain else []
        self.space_at_start = self._begin_with_space(self._ids("a"))
        self.space_after_mark = self._begin_with_space(after_mark)

    def encode(self, texts: list[str]) -> Encoded:
        """Tokenise texts as they are: nothing is added but what the tokenizer adds to any text, no token is cut off.

        Args:
            texts: any; special tokens that are written out in them are read as such.
        """
        # verbose: no warning of rows that are longer than the model's context; they are cut afterwards.
        rows = self.tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        lengths = torch.tensor([len(ids) for ids in rows["input_ids"]], dtype=torch.int64)
        ids_N = torch.tensor([token for ids in rows["input_ids"] for token in ids], dtype=torch.int64)
        return Encoded(ids_N, torch.arange(len(texts)).repeat_interleave(lengths), rows.encodings)

    def leading_mark(self, text: str) -> str:
        """The longest mark that a text begins with, "" for none.

        Args:
            text: any.
        """
        return next((text[:size] for size in self._mark_lengths if text[:size] in self._marks), "")

    def added_spaces(self, ids_N: Tensor, first_N: Tensor) -> Tensor:
        """Which tokens begin with a space that is not in the text.

        Where a tokenizer adds a space only if there is none, this cannot be told from its tokens; then one is taken
        for added.

        Args:
            ids_N: token ids.
            first_N: which are the first of their text, bool.

        Returns:
            (N,) int64, 1 or 0.
        """
        cuts_N = self.table.marks_V[ids_N] & (self.table.lengths_V[ids_N] > 0)
        added_N = first_N & self.space_at_start
        if self.space_after_mark:
            added_N |= cuts_N.roll(1) & ~first_N
        return (added_N & self.table.begins_with_space(ids_N)).long()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _begin_with_space(self, ids: list[int]) -> bool:
        return bool(ids) and bool(self.table.begins_with_space(torch.tensor(ids[:1])))
