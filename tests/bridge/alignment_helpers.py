"""Helpers of the alignment tests: tokenizers that normalize, random texts, padded rows, and a naive twin."""

import random
from collections.abc import Sequence

import torch
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cbd_trl.bridge.bridge import Bridge, StudentRows, TeacherRows
from cbd_trl.bridge.token_bytes import token_bytes
from tests.bridge.tokenizers_of_kinds import corpus, make_tokenizer

_ALPHABETS = [
    "abcdefghij klmno pqrst uvwxyz",
    "ABC DEF 0123456789.,;:!?-_'\"",
    "éàüñçøßœÆı",
    "e\u0301a\u0308o\u0302\u0323n\u0303",
    "数学漢字かなカナ한국어",
    "👩\u200d🔬🇮🇸😀𝔘𝒏",
    "ﬁﬀ①½ＡＢｃ！，ﷺ",
    " \t\n\r\u00a0\u3000\u200b",
    "\x00\x07\x7f",
]

Groups = list[tuple[list[int], list[int]]]


def random_texts(seed: int, texts: int) -> list[str]:
    """Make texts of corpus words, letters of many scripts (with accents to compose and letters to normalize), and any
    code points of UTF-8, assigned or not."""
    draw = random.Random(seed)
    words = corpus(texts=8)
    made = []
    for _ in range(texts):
        parts = []
        for _ in range(draw.randint(1, 12)):
            kind = draw.random()
            if kind < 0.4:
                text = draw.choice(words)
                start = draw.randrange(len(text))
                parts.append(text[start : start + draw.randint(1, 12)])
            elif kind < 0.7:
                parts.append("".join(draw.choices(draw.choice(_ALPHABETS), k=draw.randint(1, 6))))
            else:
                parts.append("".join(_any_character(draw) for _ in range(draw.randint(1, 4))))
        made.append("".join(parts))
    return made


def _any_character(draw: random.Random) -> str:
    """Draw a character of one to four bytes, each as likely, never half of a surrogate pair."""
    low, high = draw.choice([(0, 0x80), (0x80, 0x800), (0x800, 0x10000), (0x10000, 0x110000)])
    point = draw.randrange(low, high)
    return chr(point) if not 0xD800 <= point < 0xE000 else "\ufffd"


def normalizing(kind: str, normalizer: normalizers.Normalizer, size: int = 400) -> PreTrainedTokenizerFast:
    """Make a tokenizer of that kind with a normalizer before its own."""
    tokenizer = make_tokenizer(kind, size)
    own = tokenizer.backend_tokenizer.normalizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizer, own]) if own else normalizer
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Make a tokenizer put BOS before every text; it is changed and returned."""
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def padded(rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None = None) -> StudentRows:
    """Pad rows on the right; every token is scored unless `labels` has -100 for it."""
    length = max(map(len, rows))

    def batch(values: Sequence[Sequence[int]], filling: int) -> torch.Tensor:
        filled = [[*row, *[filling] * (length - len(row))] for row in values]
        return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), length)

    mask = batch([[1] * len(row) for row in rows], 0)
    return StudentRows.of(batch(rows, 0), batch(rows if labels is None else labels, -100), mask)


def read(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, texts: list[str]) -> TeacherRows:
    """Read texts across the bridge, tokenized by the student with what its tokenizer puts before them."""
    return Bridge(student, teacher).read(padded(student(texts)["input_ids"]))


def groups_of(rows: TeacherRows, row: int) -> Groups:
    """List the groups of a row, each as indices of the student's tokens and of the teacher's."""
    both = [rows.alignment.student_BT[row].tolist(), rows.alignment.teacher_RU[row].tolist()]
    numbers = sorted({number for group in both for number in group} - {-1})
    return [tuple([i for i, n in enumerate(group) if n == number] for group in both) for number in numbers]  # type: ignore[misc]


def spelled(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[bytes]:
    """Spell each token, without the spaces that the tokenizer puts before a text and after special tokens."""
    table = token_bytes(tokenizer)
    adds = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
    pieces: list[bytes] = []
    begins = adds
    for index in ids:
        piece = table[index] or b""
        pieces.append(piece[1:] if begins and piece.startswith(b" ") else piece)
        begins = adds and table[index] is None and index != tokenizer.unk_token_id
    return pieces


def naive_groups(ours: Sequence[bytes], theirs: Sequence[bytes]) -> Groups:
    """Group the tokens of two tokenizations of the same bytes, byte by byte."""
    text = b"".join(ours)
    assert text == b"".join(theirs)
    groups: Groups = []
    one: list[int] = []
    other: list[int] = []
    i = j = our_end = their_end = 0
    for offset in range(len(text) + 1):
        while i < len(ours) and our_end + len(ours[i]) <= offset:
            our_end += len(ours[i])
            one.append(i)
            i += 1
        while j < len(theirs) and their_end + len(theirs[j]) <= offset:
            their_end += len(theirs[j])
            other.append(j)
            j += 1
        if our_end == their_end == offset and one and other:
            groups.append((one, other))
            one, other = [], []
    assert not one and not other
    return groups
