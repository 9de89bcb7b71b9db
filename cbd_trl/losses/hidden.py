"""Distances between hidden states of a student and a teacher.

Shapes: N scored tokens, d student width, D teacher width, L student layers.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_trl.utils.formatting import did_you_mean

# Below this mean square a teacher's state counts as all zero: the residual streams of trained models lie far above.
_FLOOR = 1e-6


def cosine_distance(student_Nd: Tensor, teacher_ND: Tensor) -> Tensor:
    """Compute 1 - cosine similarity on the channels both models have, the first d of the teacher.

    A prefix is the right share because a chain sorts its channels by importance (`cbd_trl.surgery.reorder`). Computed
    as half the squared distance of the two unit vectors, the same number, and exactly 0 for equal states.

    Args:
        student_Nd: hidden states, (N, d), any float dtype.
        teacher_ND: hidden states, (N, D) with D >= d, any float dtype.

    Returns:
        (N,) float32, in [0, 2].

    Raises:
        ValueError: if the teacher is narrower than the student.
    """
    student_unit_Nd = F.normalize(student_Nd.float(), dim=-1)
    teacher_unit_Nd = F.normalize(_prefix(student_Nd, teacher_ND), dim=-1)
    return (student_unit_Nd - teacher_unit_Nd).square().sum(-1) / 2


def normalized_mse(student_Nd: Tensor, teacher_ND: Tensor) -> Tensor:
    """Compute the mean squared difference on the channels both models have, over the teacher's mean square there.

    The hidden-state loss of TinyBERT (Jiao et al. 2020, arXiv 1909.10351, equation 8), here divided by the mean square
    of the teacher's state of the same token: 0 for equal states, 1 for a student's state of zeros, and no token weighs
    more because its state is large, as an attention sink's is. Unlike the cosine it sees the size of the state.

    Args:
        student_Nd: hidden states, (N, d), any float dtype.
        teacher_ND: hidden states, (N, D) with D >= d, any float dtype.

    Returns:
        (N,) float32, at least 0.

    Raises:
        ValueError: if the teacher is narrower than the student.
    """
    teacher_Nd = _prefix(student_Nd, teacher_ND)
    size_N = teacher_Nd.square().mean(-1).clamp(min=_FLOOR)
    return (student_Nd.float() - teacher_Nd).square().mean(-1) / size_N


HiddenLoss = Callable[[Tensor, Tensor], Tensor]
HIDDEN_LOSSES: dict[str, HiddenLoss] = {"cosine": cosine_distance, "mse": normalized_mse}
# The default of the trainers.
HIDDEN_LOSS = "cosine"


def get_hidden_loss(name: str) -> HiddenLoss:
    """Look up a distance of `HIDDEN_LOSSES`.

    Args:
        name: a key of the table.

    Returns:
        a function of (student_Nd, teacher_ND).

    Raises:
        ValueError: for an unknown name; the message lists those that exist.
    """
    if name not in HIDDEN_LOSSES:
        hint = did_you_mean(name, HIDDEN_LOSSES)
        raise ValueError(f"Unknown hidden loss {name!r}: there are {', '.join(HIDDEN_LOSSES)}.{hint}")
    return HIDDEN_LOSSES[name]


def mean_hidden_distance(pairs: Iterable[tuple[Tensor, Tensor]], loss: str = "cosine") -> Tensor:
    """Average a distance over layers.

    Args:
        pairs: for each of L student layers its states (N, d) and those of the teacher layer it stands for (N, D).
        loss: a key of `HIDDEN_LOSSES`.

    Returns:
        (N,) float32, at least 0.

    Raises:
        ValueError: if there is no layer, the teacher is narrower than the student, or the loss is unknown.
    """
    distance = get_hidden_loss(loss)
    distances_LN = [distance(student_Nd, teacher_ND) for student_Nd, teacher_ND in pairs]
    if not distances_LN:
        raise ValueError("No layer to compare: the mean over layers needs at least one pair of hidden states.")
    return torch.stack(distances_LN).mean(0)


def _prefix(student_Nd: Tensor, teacher_ND: Tensor) -> Tensor:
    width = student_Nd.shape[-1]
    if teacher_ND.shape[-1] < width:
        raise ValueError(
            f"The student's hidden states have {width} channels and the teacher's {teacher_ND.shape[-1]}: the "
            "distance is taken on the student's channels, a prefix of the teacher's. Use a teacher that is at least "
            "as wide, or set hidden_weight=0."
        )
    return teacher_ND[..., :width].float()
