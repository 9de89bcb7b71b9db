"""The exact bytes that each token of a vocabulary stands for, as the tokenizer's own tokenizer.json says."""

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import models
from transformers import PreTrainedTokenizerBase

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
