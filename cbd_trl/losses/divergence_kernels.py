"""Value and derivative of the divergences, in one go.

Shapes: N scored tokens, E events; n of the tokens are a block. A kernel takes log-probabilities of student and teacher
and a third tensor to fill with the derivative to the student's log-probabilities, and returns the value (N,). The
formulas are in the docstrings of `cbd_trl.losses.divergences`; p is the teacher, q the student.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

# The smallest positive float32. An event that the teacher rules out altogether would make the reverse KL infinite.
TEACHER_LOG_FLOOR = math.log(2.0**-149)
_LOWEST = torch.finfo(torch.float32).min
# About what the caches of a CPU hold. The passes of a kernel over one block then cost half of what memory would.
_BLOCK_ELEMENTS = 2**19
# Past this log-ratio of two probabilities the smaller one is lost in their float32 sum.
_MIXTURE_GAP = 40.0


def per_token(kernel: Kernel, student_log_NE: Tensor, teacher_log_NE: Tensor) -> Tensor:
    """Apply a kernel, differentiable once with respect to the student.

    Args:
        kernel: of this module.
        student_log_NE: log-probabilities, (N, E), any float dtype.
        teacher_log_NE: likewise.

    Returns:
        (N,) float32, nats per token.

    Raises:
        ValueError: for different shapes.
    """
    if student_log_NE.shape != teacher_log_NE.shape:
        raise ValueError(
            f"The student has log-probabilities of shape {tuple(student_log_NE.shape)} and the teacher of "
            f"{tuple(teacher_log_NE.shape)}: "
            "a divergence is between the same events of the same tokens. Give both as (N, E)."
        )
    return _WithDerivative.apply(student_log_NE.float(), teacher_log_NE.float(), kernel)


class _WithDerivative(torch.autograd.Function):
    # A kernel knows its derivative once it has the value. Autograd would keep a block of (N, E) for every step of the
    # formula and pass over each again; this keeps one, and lets the kernels work in place.
    @staticmethod
    def forward(ctx: Any, student_log_NE: Tensor, teacher_log_NE: Tensor, kernel: Kernel) -> Tensor:
        derivative_NE = torch.empty_like(student_log_NE)
        tokens, events = student_log_NE.shape
        block = max(1, _BLOCK_ELEMENTS // events if student_log_NE.device.type == "cpu" else tokens)
        blocks = zip(*(x.split(block) for x in (student_log_NE, teacher_log_NE, derivative_NE)), strict=True)
        value_N = torch.cat([kernel(*block_nE) for block_nE in blocks])
        ctx.derivative_NE = derivative_NE
        # A sum of rounded numbers may fall a hair below 0.
        return value_N.clamp_(min=0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        if ctx.derivative_NE is None:
            raise RuntimeError(
                "A divergence was differentiated twice: its derivative is kept for one backward pass. Compute the "
                "divergence again instead of using retain_graph=True."
            )
        derivative_NE, ctx.derivative_NE = ctx.derivative_NE, None
        return derivative_NE.mul_(gradients[0].unsqueeze(-1)), None, None


def forward_kl_kernel(student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor) -> Tensor:
    # Finite, because an event of probability 0 then adds 0; a NaN stays one, as it should for a model that diverged.
    possible_NE = torch.clamp(student_log_NE, min=_LOWEST, out=derivative_NE)
    gap_NE = (teacher_log_NE - possible_NE).clamp_(min=_LOWEST)
    teacher_NE = torch.exp(teacher_log_NE, out=derivative_NE)
    value_N = gap_NE.mul_(teacher_NE).sum(-1)
    derivative_NE.neg_()
    return value_N


def reverse_kl_kernel(student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor) -> Tensor:
    floored_NE = torch.clamp(teacher_log_NE, min=TEACHER_LOG_FLOOR, out=derivative_NE)
    gap_NE = (student_log_NE - floored_NE).clamp_(min=_LOWEST)
    student_NE = torch.exp(student_log_NE, out=derivative_NE)
    value_NE = gap_NE.mul_(student_NE)
    derivative_NE.add_(value_NE)
    return value_NE.sum(-1)


def mixture_kernel(
    student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor, share: float, forward: float, reverse: float
) -> Tensor:
    # forward * KL(p || m) + reverse * KL(q || m) with m = share * p + (1 - share) * q. All of it follows from the gap
    # log p - log q: m / q = 1 + share * expm1(gap), exactly 1 where p = q.
    gap_NE = (teacher_log_NE - student_log_NE.clamp(min=_LOWEST)).clamp_(-_MIXTURE_GAP, _MIXTURE_GAP)
    excess_NE = gap_NE.expm1().mul_(share)
    log_ratio_NE = excess_NE.log1p()
    pull_NE = excess_NE.add_(1.0).reciprocal_().mul_(1.0 - share)
    teacher_NE = teacher_log_NE.exp()
    value_N = gap_NE.sub_(log_ratio_NE).mul_(teacher_NE).sum(-1).mul_(forward)
    from_teacher_NE = teacher_NE.mul_(pull_NE).mul_(forward)
    student_NE = torch.exp(student_log_NE, out=derivative_NE)
    value_N -= (log_ratio_NE * student_NE).sum(-1).mul_(reverse)
    derivative_NE.mul_(pull_NE.add_(log_ratio_NE).neg_().add_(1.0)).mul_(reverse).sub_(from_teacher_NE)
    return value_N


def adaptive_kl_kernel(
    student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor, head_share: float
) -> Tensor:
    forward_N = forward_kl_kernel(student_log_NE, teacher_log_NE, derivative_NE)
    off_NE = student_log_NE.exp().add_(derivative_NE).abs_()
    head_N, total_N = _head_sum(off_NE, teacher_log_NE, head_share), off_NE.sum(-1)
    # Where nothing is off both weights are 0, as are both divergences.
    forward_weight_N = (head_N / total_N).nan_to_num_(nan=0.0).clamp_(max=1.0)
    reverse_weight_N = (total_N > 0) * (1.0 - forward_weight_N)
    reverse_derivative_NE = off_NE
    reverse_N = reverse_kl_kernel(student_log_NE, teacher_log_NE, reverse_derivative_NE)
    derivative_NE.mul_(forward_weight_N.unsqueeze(-1))
    derivative_NE.addcmul_(reverse_derivative_NE, reverse_weight_N.unsqueeze(-1))
    return forward_weight_N * forward_N + reverse_weight_N * reverse_N


def _head_sum(values_NE: Tensor, teacher_log_NE: Tensor, head_share: float, kept: int = 64) -> Tensor:
    # The head of nearly every token is small: look at a few events, and only where they fall short at more of them.
    sums_N = torch.zeros_like(values_NE[:, 0])
    open_n = torch.arange(len(sums_N), device=sums_N.device)
    while len(open_n):
        kept = min(kept, teacher_log_NE.shape[-1])
        top_log_nK, indices_nK = teacher_log_NE[open_n].topk(kept, dim=-1)
        top_nK = top_log_nK.exp()
        mass_nK = top_nK.cumsum(-1)
        in_head_nK = mass_nK - top_nK < head_share
        sums_N[open_n] = (values_NE[open_n].gather(-1, indices_nK) * in_head_nK).sum(-1)
        if kept == teacher_log_NE.shape[-1]:
            break
        open_n = open_n[mass_nK[:, -1] < head_share]
        kept *= 4
    return sums_N


def total_variation_kernel(student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor) -> Tensor:
    student_NE = torch.exp(student_log_NE, out=derivative_NE)
    gap_NE = student_NE - teacher_log_NE.exp()
    derivative_NE.mul_(gap_NE.sign()).mul_(0.5)
    return gap_NE.abs_().sum(-1).mul_(0.5)
