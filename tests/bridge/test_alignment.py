"""The finest groups of the same bytes, over random Unicode and by hand."""

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from cbd_trl.bridge.alignment import NOWHERE, TokenOffsets, align
from tests.bridge.alignment_helpers import groups_of, naive_groups, normalizing, random_texts, read, spelled, with_bos
from tests.bridge.tokenizers_of_kinds import make_tokenizer

TEXTS = [text for seed in range(4) for text in random_texts(seed, 15)]


def _tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "byte_level": make_tokenizer("byte_level", 400),
        "byte_level, larger": make_tokenizer("byte_level", 700, seed=1),
        "byte_fallback": make_tokenizer("byte_fallback", 500),
        "bos": with_bos(make_tokenizer("byte_fallback", 450, seed=1)),
        "unigram": make_tokenizer("unigram", 400),
        "nfc": normalizing("byte_level", normalizers.NFC()),
        "nfkc": normalizing("byte_fallback", normalizers.NFKC(), 450),
        "nfkc unigram": normalizing("unigram", normalizers.NFKC()),
        "lower": normalizing("byte_level", normalizers.Lowercase()),
    }


TOKENIZERS = _tokenizers()
KEEPING = ["byte_level", "byte_level, larger", "byte_fallback", "bos"]


@pytest.mark.parametrize("teacher", KEEPING)
@pytest.mark.parametrize("student", KEEPING)
def test_groups_are_those_of_a_naive_twin(student: str, teacher: str) -> None:
    one, other = TOKENIZERS[student], TOKENIZERS[teacher]
    rows = read(one, other, TEXTS)
    unaligned = 0
    for row, text in enumerate(TEXTS):
        ours = one(text)["input_ids"]
        theirs = rows.ids_RU[row][rows.mask_RU[row].bool()].tolist()
        assert theirs == other(text)["input_ids"]
        # BOS has no bytes here and is in no group of its own.
        skip, their_skip = student == "bos", teacher == "bos"
        found = naive_groups(spelled(one, ours)[skip:], spelled(other, theirs)[their_skip:])
        groups = [([i + skip for i in pair[0]], [j + their_skip for j in pair[1]]) for pair in found]
        # What stands first in a row is predicted by nothing.
        groups = [(mine, yours) for mine, yours in groups if 0 not in mine and 0 not in yours]
        assert groups_of(rows, row) == groups
        unaligned += len(ours) - 1 - sum(len(mine) for mine, _ in groups)
    assert rows.unaligned == unaligned
    assert rows.alignment.groups > len(TEXTS)


@pytest.mark.parametrize("teacher", TOKENIZERS)
@pytest.mark.parametrize("student", TOKENIZERS)
def test_groups_are_in_order_the_same_bytes_and_as_fine_as_can_be(student: str, teacher: str) -> None:
    one, other = TOKENIZERS[student], TOKENIZERS[teacher]
    texts = TEXTS[::4]
    rows = read(one, other, texts)
    for row, text in enumerate(texts):
        ours = spelled(one, one(text)["input_ids"])
        theirs = spelled(other, rows.ids_RU[row].tolist())
        groups = groups_of(rows, row)
        for model in (0, 1):
            order = [token for pair in groups for token in pair[model]]
            assert order == sorted(order)
        for mine, yours in groups:
            assert mine == list(range(mine[0], mine[-1] + 1)) and yours == list(range(yours[0], yours[-1] + 1))
            left, right = [ours[i] for i in mine], [theirs[j] for j in yours]
            # A space that the teacher puts after a special token is not in the text.
            assert b"".join(left) == b"".join(right)
            ends = [{sum(map(len, side[:n])) for n in range(1, len(side))} for side in (left, right)]
            assert not ends[0] & ends[1]
    tokens = [(side != NOWHERE).sum() for side in (rows.alignment.student_BT, rows.alignment.teacher_RU)]
    assert [int(size.sum()) for size in rows.alignment.sizes()] == tokens
    assert rows.unaligned == rows.scored - tokens[0]
    assert rows.alignment.groups > 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_with_the_same_tokenizer_every_token_is_a_group(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    # Of two spaces at the start one is taken for added (`ByteAwareTokenizer.added_spaces`).
    texts = [text for text in TEXTS if not text[:2].isspace()]
    assert len(texts) > 50
    rows = read(tokenizer, tokenizer, texts)
    sizes = rows.alignment.sizes()
    assert sizes[0].tolist() == sizes[1].tolist() == [1] * rows.alignment.groups
    torch.testing.assert_close(rows.alignment.student_BT, rows.alignment.teacher_RU)
    # Unknown tokens are no text.
    ids = tokenizer(texts)["input_ids"]
    assert rows.unaligned == sum(row[1:].count(tokenizer.unk_token_id) for row in ids)


def _offsets(ends: list[int], usable: list[int] | None = None, special: list[int] | None = None) -> TokenOffsets:
    flags = [[1] * len(ends) if usable is None else usable, [0] * len(ends) if special is None else special]
    return TokenOffsets(torch.tensor([ends]), *(torch.tensor([flag]).bool() for flag in flags))


def test_groups_by_hand() -> None:
    found = align(_offsets([2, 3, 5, 9]), _offsets([1, 3, 4, 5, 6, 9]), torch.tensor([9]))
    assert found.student_BT.tolist() == [[0, 0, 1, 2]]
    assert found.teacher_RU.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert [side.tolist() for side in found.sizes()] == [[2, 1, 1], [2, 2, 2]]
    assert [side.tolist() for side in found.last_tokens()] == [[1, 2, 3], [1, 3, 5]]


@pytest.mark.parametrize("side", [0, 1])
def test_a_token_that_cannot_be_used_spoils_its_group_only(side: int) -> None:
    good, bad = _offsets([1, 3, 4, 6]), _offsets([1, 2, 3, 6], [1, 1, 0, 1])
    pair = (bad, good) if side == 0 else (good, bad)
    found = align(*pair, torch.tensor([6]))
    groups = (found.student_BT, found.teacher_RU)
    assert groups[side].tolist() == [[0, -1, -1, 1]] and groups[1 - side].tolist() == [[0, -1, 1, 1]]


def test_a_special_token_is_aligned_with_a_special_token_alone() -> None:
    found = align(_offsets([2, 4, 6], special=[1, 0, 1]), _offsets([2, 4, 6], special=[1, 1, 0]), torch.tensor([6]))
    assert found.student_BT.tolist() == found.teacher_RU.tolist() == [[0, -1, -1]]


def test_what_is_left_over_in_one_piece_does_not_reach_into_the_next() -> None:
    # The teacher's first text was cut after 2 of its 5 bytes.
    found = align(_offsets([2, 4, 5, 8, 9]), _offsets([2, 8, 9]), torch.tensor([5, 9]))
    assert found.student_BT.tolist() == [[0, -1, -1, 1, 2]]
    assert found.teacher_RU.tolist() == [[0, 1, 2]]


def test_tokens_outside_of_pieces_are_in_no_group() -> None:
    found = align(_offsets([-1, 2, -1, 4]), _offsets([2, -1, 4, -1]), torch.tensor([4]))
    assert found.student_BT.tolist() == [[-1, 0, -1, 1]]
    assert found.teacher_RU.tolist() == [[0, -1, 1, -1]]


@pytest.mark.parametrize("empty", [0, 1])
def test_a_side_without_tokens_has_no_groups(empty: int) -> None:
    sides = [_offsets([1, 2]), _offsets([1, 2])]
    sides[empty] = _offsets([-1, -1])
    found = align(sides[0], sides[1], torch.tensor([2]))
    assert found.groups == 0
    assert (found.student_BT == NOWHERE).all() and (found.teacher_RU == NOWHERE).all()
    assert [side.tolist() for side in found.last_tokens()] == [[], []]
