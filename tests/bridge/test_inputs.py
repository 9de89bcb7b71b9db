"""Which states belong to which tokens, on real tokenizations, and where a micro-batch may be cut."""

import pickle

import pytest
import torch

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.bridge import Bridge, StudentRows
from cbd_trl.bridge.objectives.inputs import (
    AlignedStates,
    Places,
    Vectors,
    chunked_cross_entropy,
    group_starts,
    group_sums,
)
from tests.bridge.objective_helpers import STUDENT, V, randn
from tests.bridge.tokenizers_of_kinds import corpus, make_tokenizer


def places(groups: list[int]) -> Places:
    """One row, of which all but the first token are scored."""
    group_BT = torch.tensor([[NOWHERE, *groups]])
    return Places.of_student(torch.zeros_like(group_BT), group_BT, torch.zeros_like(group_BT))


def test_a_part_begins_where_no_group_is_open() -> None:
    found = places([0, 0, 1, -1, -1, 2, -1, 2, -1])
    assert found.cuts == [0, 2, 3, 4, 5, 8] and found.starts == found.start_G.tolist() == [0, 2, 5]
    assert found.groups == 3 and found.groups_of(slice(2, 6)) == slice(1, 3)
    assert places([-1, -1]).cuts == [0, 1]
    assert places([0, 0]).cuts == [0]
    assert group_starts(torch.tensor([-1, 0, 0, -1, 1, -1, 1, 2])).tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    empty = AlignedStates.of(randn(1, 1, STUDENT, seed=0), Head(randn(V, STUDENT, seed=1)), nothing, places([]))
    assert empty.places.cuts == [] and empty.group_log_probs().shape == (0,)


def test_places_are_moved_and_pickled_as_they_are() -> None:
    found = places([0, 0, 1, -1])
    moved = found.to("meta")
    assert moved.group_N.device.type == moved.scored.index_N.device.type == "meta" and moved.starts == found.starts
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.vectors.packed_K, found.vectors.packed_K) and again.cuts == found.cuts
    vectors = Vectors.of(one=torch.tensor([3, 4]), other=torch.tensor([5]))
    assert vectors["one"].tolist() == [3, 4] and vectors["other"].tolist() == [5]


def test_sums_over_groups_leave_out_what_is_in_none() -> None:
    values, groups = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([3, -1, 3, 4, -1])
    assert group_sums(values, groups, slice(3, 5)).tolist() == [5.0, 8.0]
    assert group_sums(values[:0], groups[:0], slice(0, 0)).tolist() == []


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
    ours = Places.of_student(labels_BT, read.alignment.student_BT, student_rows.text_BT)
    student = AlignedStates.of(places_BT1, head, ids_BT, ours)
    teacher = AlignedStates.of(places_RU1, head, read.ids_RU, Places.of_teacher(read.alignment.teacher_RU))
    groups = read.alignment.groups
    assert groups > 20 and student.places.groups == teacher.places.groups == groups
    assert len(student.targets_N) == read.scored and (teacher.places.group_N != NOWHERE).all()
    for found, tokens, texts_BT in ((student, ids_BT, student_rows.text_BT), (teacher, read.ids_RU, None)):
        at = found.hidden_ND[:, 0].long()
        assert torch.equal(tokens.flatten()[at], found.inputs_N)
        assert torch.equal(tokens.flatten()[at + 1], found.targets_N)
        rows_N = at // tokens.shape[1] if texts_BT is None else texts_BT.flatten()[at]
        assert torch.equal(found.places.text_N, rows_N)
    # What each model has read of the text when a group begins.
    texts_of_group = student.places.text_N[student.places.start_G], teacher.places.text_N[teacher.places.start_G]
    assert torch.equal(*texts_of_group)
    for number in (groups // 3, groups // 2, groups - 1):
        ours = int(student.hidden_ND[student.places.start_G][number, 0])
        theirs = int(teacher.hidden_ND[teacher.places.start_G][number, 0])
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
