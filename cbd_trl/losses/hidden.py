"""Distance between hidden states of a student and a teacher of one chain.

Shapes: N scored tokens, d student width, D teacher width, L student layers.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distance(student_Nd: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cosine similarity on the channels both models have, the first d of the teacher.

    A prefix is the right share because a chain sorts its channels (design section 4). Computed as half the squared
    distance of the two unit vectors, which is the same number and exactly 0 for equal states.

    Args:
        student_Nd: hidden states, (N, d), any float dtype.
        teacher_ND: hidden states, (N, D) with D >= d, any float dtype.

    Returns:
        (N,) float32, in [0, 2].

    Raises:
        ValueError: if the teacher is narrower than the student.
    """
    width = student_Nd.shape[-1]
    if teacher_ND.shape[-1] < width:
        raise ValueError(
            f"The student's hidden states have {width} channels and the teacher's {teacher_ND.shape[-1]}: the "
            "distance is taken on the student's channels, a prefix of the teacher's. Use a teacher that is at least "
            "as wide, or set hidden_weight=0."
        )
    student_unit_Nd = F.normalize(student_Nd.float(), dim=-1)
    teacher_unit_Nd = F.normalize(teacher_ND[..., :width].float(), dim=-1)
    return (student_unit_Nd - teacher_unit_Nd).square().sum(-1) / 2


def mean_cosine_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over layers of `cosine_distance`.

    Args:
        pairs: for each of L student layers its states (N, d) and those of the teacher layer it stands for (N, D).

    Returns:
        (N,) float32, in [0, 2].

    Raises:
        ValueError: if there is no layer, or the teacher is narrower than the student.
    """
    distances_LN = [cosine_distance(student_Nd, teacher_ND) for student_Nd, teacher_ND in pairs]
    if not distances_LN:
        raise ValueError("No layer to compare: the mean over layers needs at least one pair of hidden states.")
    return torch.stack(distances_LN).mean(0)
