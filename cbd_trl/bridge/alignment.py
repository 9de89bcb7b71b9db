"""Which tokens of two tokenisations of one text stand for the same bytes.

All texts of a batch lie end to end on one line, a place for a byte. Two tokens end at the same place, or they do not:
where both sides have an end, a group ends. This is the finest partition into groups of the same bytes, and unlike
matching token strings (MinED, arXiv 2401.10491) it cannot be wrong.

Shapes: B x T the student's batch, R x U the teacher's (a row for each text), N placed tokens, G groups, P pieces.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NOWHERE = -1


@dataclass(frozen=True)
class Placed:
    """Tokens of one side of a batch, on the line of bytes.

    Attributes:
        ends: the place where each token ends, never decreasing, int64; `NOWHERE` for a token outside of all pieces
            (padding, a template, a special token that the other side lacks). Tokens of no bytes have places of their
            own, between two bytes.
        usable: whether it stands for exactly the bytes between its place and the one before, and whether its model
            says something about it that counts, bool.
        marks: special tokens, bool: the same bytes as text are something else.
    """

    ends: Tensor
    usable: Tensor
    marks: Tensor


@dataclass(frozen=True)
class Alignment:
    """Groups of tokens of both sides that are the same bytes; numbered in order, over the whole batch.

    Attributes:
        student_BT: the group of each of the student's tokens, int64; `NOWHERE` for those in none.
        teacher_RU: likewise the teacher's.
        groups: how many groups there are, G. Each has a token on both sides at least.
    """

    student_BT: Tensor
    teacher_RU: Tensor
    groups: int

    def sizes(self) -> tuple[Tensor, Tensor]:
        """How many tokens each group has, of the student and of the teacher, (G,) int64 each."""
        return self._count(self.student_BT), self._count(self.teacher_RU)

    def last_tokens(self) -> tuple[Tensor, Tensor]:
        """Where each group's last token is, in the flattened batches of the student and the teacher, (G,) int64 each.

        The same text lies behind both models there, so their hidden states can be compared.
        """
        return self._last(self.student_BT), self._last(self.teacher_RU)

    def _count(self, side: Tensor) -> Tensor:
        return torch.bincount(side[side != NOWHERE], minlength=self.groups)

    def _last(self, side: Tensor) -> Tensor:
        places_N = (side.flatten() != NOWHERE).nonzero().flatten()
        return places_N[self._count(side).cumsum(0) - 1]


def align(student: Placed, teacher: Placed, piece_ends_P: Tensor) -> Alignment:
    """The finest groups of tokens of the same bytes, without those in which anything cannot be compared.

    Args:
        student: (B, T).
        teacher: (R, U).
        piece_ends_P: where the pieces of text end that both sides have, increasing, int64. No group reaches over such
            an end.

    Returns:
        the groups in which every token of both sides is usable and either no token is a mark, or there are marks on
        both sides.
    """
    sides = (student, teacher)
    placed = [side.ends != NOWHERE for side in sides]
    ends = [side.ends[where] for side, where in zip(sides, placed, strict=True)]
    common = _in_both(*ends)
    # What is left over at the end of a piece must not fall into the next one's first group.
    borders = torch.cat([common, piece_ends_P]).unique()
    closed = torch.isin(borders, common)
    numbers = [torch.searchsorted(borders, side) for side in ends]
    count = borders.numel()

    def some(index: int, flags: Tensor) -> Tensor:
        return torch.bincount(numbers[index][flags[placed[index]]], minlength=count) > 0

    whole = ~some(0, ~student.usable) & ~some(1, ~teacher.usable)
    present = some(0, student.usable) & some(1, teacher.usable)
    alike = some(0, student.marks) == some(1, teacher.marks)
    kept = closed & whole & present & alike
    renumbered = torch.where(kept, kept.cumsum(0) - 1, NOWHERE)
    groups = [torch.full_like(side.ends, NOWHERE) for side in sides]
    for index, number in enumerate(numbers):
        groups[index][placed[index]] = renumbered[number]
    return Alignment(groups[0], groups[1], int(kept.sum()))


def _in_both(one_N: Tensor, other_N: Tensor) -> Tensor:
    """The values that two sorted lists share, sorted, once each."""
    if not one_N.numel() or not other_N.numel():
        return one_N[:0]
    found_N = torch.searchsorted(other_N, one_N).clamp(max=other_N.numel() - 1)
    return one_N[other_N[found_N] == one_N].unique_consecutive()
