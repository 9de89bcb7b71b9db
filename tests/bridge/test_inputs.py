"""Which states belong to which tokens, on real tokenizations, and where a micro-batch may be cut."""

import pytest
import torch

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.bridge import Bridge, StudentRows
from cbd_trl.bridge.objectives.inputs import AlignedStates, chunked_cross_entropy, group_starts
from tests.bridge.objective_helpers import STUDENT, V, randn
from tests.bridge.tokenizers_of_kinds import corpus, make_tokenizer


def states(groups: list[int]) -> AlignedStates:
    n = len(groups)
    zeros = torch.zeros(n, dtype=torch.int64)
    return AlignedStates(
        randn(n, STUDENT, seed=0), Head(randn(V, STUDENT, seed=1)), zeros, zeros, torch.tensor(groups), zeros, zeros
    )


def test_a_part_begins_where_no_group_is_open() -> None:
    assert states([0, 0, 1, -1, -1, 2, -1, 2, -1]).chunk_starts() == [0, 2, 3, 4, 5, 8]
    assert states([-1, -1]).chunk_starts() == [0, 1]
    assert states([0, 0]).chunk_starts() == [0]
    assert group_starts(torch.tensor([-1, 0, 0, -1, 1, -1, 1, 2])).tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
    empty = states([0])
    empty = AlignedStates(empty.hidden_ND[:0], empty.head, *[empty.group_N[:0]] * 5)
    assert empty.chunk_starts() == [] and empty.group_log_probs().shape == (0,)


def test_the_state_of_a_token_is_the_one_before_it_and_after_the_same_bytes() -> None:
    one, other = make_tokenizer("byte_level", 300), make_tokenizer("byte_fallback", 500)
    texts = corpus(texts=4)
    ids = [one(text)["input_ids"] for text in texts]
    # Two rows, the second of two texts.
    rows = [ids[0], [*ids[1], *ids[2]]]
    length = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    positions_BT = torch.arange(length).repeat(2, 1)
    positions_BT[1, len(ids[1]) :] -= len(ids[1])
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    student_rows = StudentRows.of(ids_BT, labels_BT, mask_BT, positions_BT)
    bridge = Bridge(one, other)
    read = bridge.read(student_rows)
    # The value of each state is its index.
    places_BT1 = torch.arange(ids_BT.numel()).view(*ids_BT.shape, 1).float()
    places_RU1 = torch.arange(read.ids_RU.numel()).view(*read.ids_RU.shape, 1).float()
    head = Head(torch.zeros(1, 1))
    labels_BT = labels_BT.masked_fill(~student_rows.scored_BT, -100)
    student = AlignedStates.of_student(
        places_BT1, head, ids_BT, labels_BT, read.alignment.student_BT, student_rows.text_BT
    )
    teacher = AlignedStates.of_teacher(places_RU1, head, read.ids_RU, read.alignment.teacher_RU)
    groups = read.alignment.groups
    assert groups > 20 and student.group_start_N.sum() == teacher.group_start_N.sum() == groups
    assert len(student.targets_N) == read.scored and (teacher.group_N != NOWHERE).all()
    for found, tokens, texts_BT in ((student, ids_BT, student_rows.text_BT), (teacher, read.ids_RU, None)):
        at = found.hidden_ND[:, 0].long()
        assert torch.equal(tokens.flatten()[at], found.inputs_N)
        assert torch.equal(tokens.flatten()[at + 1], found.targets_N)
        rows_N = at // tokens.shape[1] if texts_BT is None else texts_BT.flatten()[at]
        assert torch.equal(found.text_N, rows_N)
    # What each model has read of the text when a group begins.
    texts_of_group = student.text_N[student.group_start_N], teacher.text_N[teacher.group_start_N]
    assert torch.equal(*texts_of_group)
    for number in (groups // 3, groups // 2, groups - 1):
        ours = int(student.hidden_ND[student.group_start_N][number, 0])
        theirs = int(teacher.hidden_ND[teacher.group_start_N][number, 0])
        text = int(texts_of_group[0][number])
        first = int((student_rows.text_BT.flatten() == text).nonzero()[0])
        read_by_student = one.decode(ids_BT.flatten()[first : ours + 1])
        read_by_teacher = other.decode(read.ids_RU.flatten()[text * read.ids_RU.shape[1] : theirs + 1])
        assert read_by_student and read_by_teacher.strip() == read_by_student.strip()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_of_the_cross_entropy_are_the_whole(chunk: int) -> None:
    targets = torch.randint(V, (9,), generator=torch.Generator().manual_seed(0))
    leaves = [randn(9, STUDENT, seed=2).requires_grad_(), randn(V, STUDENT, seed=3).requires_grad_()]
    slopes = torch.linspace(-1.0, 2.0, 9)
    whole = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="none")
    found = chunked_cross_entropy(leaves[0], Head(leaves[1]), targets, chunk)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, slopes), torch.autograd.grad(whole, leaves, slopes))
