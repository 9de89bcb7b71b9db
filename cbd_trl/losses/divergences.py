"""Divergences between the next-token distributions of a student and a teacher.

Shapes: N scored tokens, V vocabulary rows. Every function takes raw logits of both models and returns nats per token.
A new divergence is one function and one row of `DIVERGENCES`.
"""

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, beta: float = 0.0) -> Tensor:
    """KL(teacher || student): the student covers everything the teacher finds likely.

    Args:
        student_NV: logits, (N, V), any float dtype.
        teacher_NV: logits, (N, V), any float dtype.
        temperature: divides both logits; the result is scaled by its square (see `_tempered`).
        beta: unused; here so that every divergence is called alike.

    Returns:
        (N,) float32, nats per token, >= 0 and exactly 0 for equal logits.
    """
    return _tempered(_kl_to_student, student_NV, teacher_NV, temperature)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, beta: float = 1.0) -> Tensor:
    """KL(student || teacher): the student keeps to what the teacher finds likely (Gu et al. 2023, arXiv 2306.08543).

    Args:
        student_NV: logits, (N, V), any float dtype.
        teacher_NV: logits, (N, V), any float dtype.
        temperature: divides both logits; the result is scaled by its square (see `_tempered`).
        beta: unused; here so that every divergence is called alike.

    Returns:
        (N,) float32, nats per token, >= 0 and exactly 0 for equal logits.
    """
    return _tempered(_kl_to_teacher, student_NV, teacher_NV, temperature)


def jsd(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence (Agarwal et al. 2023, arXiv 2306.13649, eq. 1), with TRL's `beta`.

    beta * KL(teacher || M) + (1 - beta) * KL(student || M) with M = beta * teacher + (1 - beta) * student. The formula
    is 0 at both ends; as in TRL, beta 0 means forward KL and beta 1 reverse KL instead.

    Args:
        student_NV: logits, (N, V), any float dtype.
        teacher_NV: logits, (N, V), any float dtype.
        temperature: divides both logits; the result is scaled by its square (see `_tempered`).
        beta: the teacher's share of the mixture, in [0, 1].

    Returns:
        (N,) float32, nats per token, >= 0 and exactly 0 for equal logits.
    """
    if beta == 0.0:
        return forward_kl(student_NV, teacher_NV, temperature)
    if beta == 1.0:
        return reverse_kl(student_NV, teacher_NV, temperature)

    def inner(student_log_NV: Tensor, teacher_log_NV: Tensor) -> Tensor:
        gap_NV = teacher_log_NV - student_log_NV
        from_student_NV = student_log_NV.exp() * _log_mixture_ratio(gap_NV, beta)
        from_teacher_NV = teacher_log_NV.exp() * _log_mixture_ratio(-gap_NV, 1.0 - beta)
        return -(beta * from_teacher_NV + (1.0 - beta) * from_student_NV).sum(-1)

    return _tempered(inner, student_NV, teacher_NV, temperature)


Divergence = Callable[[Tensor, Tensor, float, float], Tensor]
DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def get_divergence(name: str) -> Divergence:
    """Look up a divergence of `DIVERGENCES`.

    Args:
        name: a key of the table.

    Returns:
        a function of (student_NV, teacher_NV, temperature, beta).

    Raises:
        ValueError: for an unknown name; the message lists those that exist.
    """
    if name not in DIVERGENCES:
        close = difflib.get_close_matches(str(name), DIVERGENCES, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"Unknown divergence {name!r}: there are {', '.join(DIVERGENCES)}.{hint}")
    return DIVERGENCES[name]


def _tempered(
    divergence: Callable[[Tensor, Tensor], Tensor], student_NV: Tensor, teacher_NV: Tensor, temperature: float
) -> Tensor:
    # The only place where temperature acts. Gradients with respect to the logits shrink as 1 / T^2, so the result is
    # multiplied by T^2 to keep its weight beside the cross-entropy (Hinton et al. 2015, arXiv 1503.02531, section 2).
    student_log_NV = F.log_softmax(student_NV.float() / temperature, dim=-1)
    teacher_log_NV = F.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return divergence(student_log_NV, teacher_log_NV) * temperature**2


def _kl_to_student(student_log_NV: Tensor, teacher_log_NV: Tensor) -> Tensor:
    return F.kl_div(student_log_NV, teacher_log_NV, reduction="none", log_target=True).sum(-1)


def _kl_to_teacher(student_log_NV: Tensor, teacher_log_NV: Tensor) -> Tensor:
    return F.kl_div(teacher_log_NV, student_log_NV, reduction="none", log_target=True).sum(-1)


def _log_mixture_ratio(gap: Tensor, share: float) -> Tensor:
    # log((1 - share) + share * exp(gap)): exactly 0 at gap 0, and no overflow on either side.
    above = gap + torch.log1p((1.0 - share) * torch.expm1(-gap.clamp(min=0)))
    below = torch.log1p(share * torch.expm1(gap.clamp(max=0)))
    return torch.where(gap > 0, above, below)
