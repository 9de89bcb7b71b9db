"""The loss the long way round: all logits of both models from their own forward, row by row."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


def forward_kl(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)


def jsd(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    middle_log = ((student_log.exp() + teacher_log.exp()) / 2).log()
    return (forward_kl(middle_log, teacher_log) + forward_kl(middle_log, student_log)) / 2


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "jsd": jsd}


def scored_logits(model: Any, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Tensor:
    """Logits at the positions that predict a scored token, of all rows end to end, (N, V)."""
    found = []
    for row, targets in zip(ids, labels, strict=True):
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
        found.append(logits[torch.tensor(targets[1:]) != -100])
    return torch.cat(found)


def dense_terms(
    student: Any,
    teachers: Sequence[Any],
    ids: Sequence[list[int]],
    labels: Sequence[list[int]] | None = None,
    divergence: Divergence = forward_kl,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Means over the scored tokens.

    Args:
        student: differentiated.
        teachers: whose distributions are averaged.
        ids: token ids of each row.
        labels: -100 where not scored; None for all.
        divergence: between log-probabilities.
        weights: of the teachers; None for equal ones.

    Returns:
        kd, ce and teacher_ce.
    """
    labels = ids if labels is None else labels
    targets = torch.tensor([t for row in labels for t in row[1:] if t != -100])[:, None]
    student_log = scored_logits(student, ids, labels).log_softmax(-1)
    weights = [1 / len(teachers)] * len(teachers) if weights is None else [w / sum(weights) for w in weights]
    with torch.no_grad():
        each = [w * scored_logits(t, ids, labels).softmax(-1) for w, t in zip(weights, teachers, strict=True)]
        teacher_log = torch.stack(each).sum(0).log()
    return {
        "kd": divergence(student_log, teacher_log).mean(),
        "ce": -student_log.gather(1, targets).mean(),
        "teacher_ce": -teacher_log.gather(1, targets).mean(),
    }


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of every parameter, zeros where the loss does not reach it."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
