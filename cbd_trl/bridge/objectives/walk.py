"""What objectives that read the student's logits have in common: one walk over them, beside the cross-entropy.

Shapes: N positions of the student, of which n are a part; V its vocabulary rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cbd_trl.bridge.objectives.inputs import Side
from cbd_trl.losses.fused import default_chunk, fused_terms
from cbd_trl.losses.objective import LogitObjective, Weights
from cbd_trl.losses.reduction import cross_entropy
from cbd_trl.losses.teacher_outputs import AnySignal


def walk(
    student: Side,
    teacher: Side,
    ask: Callable[[int], AnySignal],
    objective: LogitObjective,
    weights: Weights,
    chunk: int | None = None,
    starts: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compare the two on a micro-batch, of which only a chunk of both models' logits is held at a time.

    Args:
        student: its scored positions.
        teacher: of the same texts.
        ask: what the teacher says, asked so many positions at a time.
        objective: the terms.
        weights: of the terms at this step.
        chunk: positions at a time; None to choose by the larger vocabulary.
        starts: where a chunk may begin, see `fused_terms`.

    Returns:
        as `fused_terms`.
    """
    chunk = common_chunk(student, teacher, chunk)
    return fused_terms(
        student.hidden_ND, student.head, student.targets_N, ask(chunk), objective, weights, chunk, starts
    )


def common_chunk(student: Side, teacher: Side, chunk: int | None = None) -> int:
    """Positions whose logits are held at a time: those asked for, or as many as suit the larger vocabulary."""
    return chunk or default_chunk(max(student.head.rows, teacher.head.rows), student.hidden_ND.device)


def compared_terms(
    student_nV: Tensor,
    targets_n: Tensor,
    teacher_ce_n: Tensor,
    weights: Weights,
    compare: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The terms of a part, see `cbd_trl.losses.objective.LogitObjective`.

    A term of weight 0 is computed without gradient, because it is logged all the same.

    Args:
        student_nV: the student's logits, (n, V) float32.
        targets_n: token ids.
        teacher_ce_n: what the tokens cost the teacher, nats.
        weights: of this step.
        compare: "kd" at each position from the student's log-probabilities of its tokens, (n,) both.

    Returns:
        {"kd", "ce", "teacher_ce"}: (n,) float32 each.
    """
    grad = torch.is_grad_enabled()
    with torch.set_grad_enabled(grad and (weights.kd > 0 or weights.ce > 0)):
        ce_n = cross_entropy(student_nV, targets_n)
    with torch.set_grad_enabled(grad and weights.kd > 0):
        kd_n = compare(-ce_n)
    return {"kd": kd_n, "ce": ce_n, "teacher_ce": teacher_ce_n}
