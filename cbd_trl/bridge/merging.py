"""Two readings of a batch as one, each of some of its texts.

Shapes: B x T the student's batch, R x U the teacher's, G groups.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from cbd_trl.bridge.alignment import NOWHERE, Alignment
from cbd_trl.bridge.bridge import TeacherRows


def merge(one: TeacherRows, other: TeacherRows, first_R: Tensor) -> TeacherRows:
    """Take each text from one of two readings of the same batch.

    Args:
        one: has nothing of the other's texts in its groups.
        other: likewise.
        first_R: which texts are taken from `one`, bool.

    Returns:
        the teacher's rows, their groups numbered in the order of the texts.
    """
    width = max(one.ids_RU.shape[1], other.ids_RU.shape[1])

    def chosen(ours_RU: Tensor, theirs_RU: Tensor, filling: int) -> Tensor:
        ours_RU, theirs_RU = (pad(x_RU, (0, width - x_RU.shape[1]), value=filling) for x_RU in (ours_RU, theirs_RU))
        return torch.where(first_R[:, None], ours_RU, theirs_RU)

    behind = one.alignment.groups
    theirs_BT, theirs_RU = (
        torch.where(side == NOWHERE, NOWHERE, side + behind)
        for side in (other.alignment.student_BT, other.alignment.teacher_RU)
    )
    student_BT = torch.maximum(one.alignment.student_BT, theirs_BT)
    teacher_RU = chosen(one.alignment.teacher_RU, theirs_RU, NOWHERE)
    groups = behind + other.alignment.groups
    number_G = torch.empty(groups, dtype=torch.int64)
    number_G[student_BT[student_BT != NOWHERE].unique_consecutive()] = torch.arange(groups)
    for side in (student_BT, teacher_RU):
        side[side != NOWHERE] = number_G[side[side != NOWHERE]]
    return TeacherRows(
        chosen(one.ids_RU, other.ids_RU, 0),
        chosen(one.mask_RU, other.mask_RU, 0),
        Alignment(student_BT, teacher_RU, groups),
        one.scored + other.scored,
        one.unaligned + other.unaligned,
    )
