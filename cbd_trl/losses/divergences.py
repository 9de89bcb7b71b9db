"""Divergences between the next-token distributions of a student and a teacher, and their gradients.

Shapes: N scored tokens, V vocabulary rows, K draws, E events (all tokens, or the kept ones and a tail: see
`teacher_outputs.py`). Every divergence takes float log-probabilities of the same E events, which sum to one, and
returns nats per token that are >= 0 and exactly 0 for equal inputs. The teacher is a constant. In the formulas p is
the teacher, q the student.

A new divergence is one function and one row of `DIVERGENCES`: the arguments of the trainers, their checks, the command
line and the model card follow from the row. The function may be plain torch; a kernel, which computes value and
derivative in one go, saves memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cbd_trl.losses.divergence_table import divergence_option, divergence_row

# The smallest positive float32. An event that the teacher rules out altogether would make the reverse KL infinite.
TEACHER_LOG_FLOOR = math.log(2.0**-149)
_LOWEST = torch.finfo(torch.float32).min
# About what the caches of a CPU hold. The passes of a kernel over one block then cost half of what memory would.
_BLOCK_ELEMENTS = 2**19
# Past this log-ratio of two probabilities the smaller one is lost in their float32 sum.
_MIXTURE_GAP = 40.0
# Where one distribution has less than about this share of a mixture, float32 rounds the other's to 1 and the formula
# divides by 0. At that point the mixture is the other distribution.
_LEAST_SHARE = 1e-6
_BITS_OF_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Divergence:
    """A function of the log-probabilities of student and teacher, (N, E) each.

    Attributes:
        function: returns (N,) float32.
        temperature_power: its gradients with respect to the logits shrink as 1 / T to this power, where the two
            distributions are close: 2 where the divergence is of second order in their difference, 1 of first.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    temperature_power: int = 2

    def __call__(self, student_log_NE: Tensor, teacher_log_NE: Tensor) -> Tensor:
        """Compute the divergence of every token, (N,) float32."""
        return self.function(student_log_NE, teacher_log_NE)


def tempered_log_probs(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute log softmax(logits / T).

    Gradients with respect to the logits shrink with T. The objective, not the divergence, makes up for it, to keep
    its weight beside the cross-entropy (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        logits_NV: logits, (N, V), any float dtype.
        temperature: above 0.

    Returns:
        (N, V) float32, nats.
    """
    logits_NV = logits_NV.float()
    return F.log_softmax(logits_NV if temperature == 1.0 else logits_NV / temperature, dim=-1)


def forward_kl(student_log_NE: Tensor, teacher_log_NE: Tensor) -> Tensor:
    """KL(p || q): the student covers everything the teacher finds likely (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student_log_NE: log-probabilities, (N, E).
        teacher_log_NE: log-probabilities, (N, E); -inf for impossible events, which add nothing.

    Returns:
        (N,) float32, nats per token; the largest float32 stands for infinity, where only the student has -inf.
    """
    return per_token(_forward_kl_kernel, student_log_NE, teacher_log_NE)


def reverse_kl(student_log_NE: Tensor, teacher_log_NE: Tensor) -> Tensor:
    """KL(q || p): the student keeps to what the teacher finds likely (Gu et al. 2023, arXiv 2306.08543).

    Args:
        student_log_NE: log-probabilities, (N, E); -inf for impossible events, which add nothing.
        teacher_log_NE: log-probabilities, (N, E); raised to at least `TEACHER_LOG_FLOOR`, because an event that only
            the teacher rules out would make the value infinite.

    Returns:
        (N,) float32, nats per token.
    """
    return per_token(_reverse_kl_kernel, student_log_NE, teacher_log_NE)


def jsd(student_log_NE: Tensor, teacher_log_NE: Tensor, beta: float = 0.5) -> Tensor:
    """Generalized Jensen-Shannon divergence (Agarwal et al. 2023, arXiv 2306.13649, eq. 1), with TRL's `beta`.

    beta * KL(p || m) + (1 - beta) * KL(q || m) with m = beta * p + (1 - beta) * q. The formula is 0 at both ends; as
    in TRL, beta 0 means forward KL and beta 1 reverse KL instead.

    Args:
        student_log_NE: log-probabilities, (N, E), -inf allowed.
        teacher_log_NE: log-probabilities, (N, E), -inf allowed.
        beta: the teacher's share of the mixture, in [0, 1]; within 1e-6 of 1 it counts as 1.

    Returns:
        (N,) float32, nats per token.
    """
    if beta == 0.0:
        return forward_kl(student_log_NE, teacher_log_NE)
    if beta > 1.0 - _LEAST_SHARE:
        return reverse_kl(student_log_NE, teacher_log_NE)
    return per_token(
        partial(_mixture_kernel, share=beta, forward=beta, reverse=1.0 - beta), student_log_NE, teacher_log_NE
    )


def skew_kl(student_log_NE: Tensor, teacher_log_NE: Tensor, skew: float = 0.1) -> Tensor:
    """Skew KL, KL(p || skew * p + (1 - skew) * q): never above -log(skew) (Ko et al. 2024, arXiv 2402.03898, SKL).

    Args:
        student_log_NE: log-probabilities, (N, E), -inf allowed.
        teacher_log_NE: log-probabilities, (N, E), -inf allowed.
        skew: the teacher's share of the mixture, in [0, 1); 0 is the forward KL.

    Returns:
        (N,) float32, nats per token.
    """
    if skew == 0.0:
        return forward_kl(student_log_NE, teacher_log_NE)
    return per_token(partial(_mixture_kernel, share=skew, forward=1.0, reverse=0.0), student_log_NE, teacher_log_NE)


def skew_reverse_kl(student_log_NE: Tensor, teacher_log_NE: Tensor, skew: float = 0.1) -> Tensor:
    """Skew reverse KL, KL(q || (1 - skew) * p + skew * q): never above -log(skew) (Ko et al., arXiv 2402.03898, SRKL).

    Args:
        student_log_NE: log-probabilities, (N, E), -inf allowed.
        teacher_log_NE: log-probabilities, (N, E), -inf allowed.
        skew: the student's share of the mixture, in [0, 1); 0, as which all below 1e-6 count, is the reverse KL.

    Returns:
        (N,) float32, nats per token.
    """
    if skew < _LEAST_SHARE:
        return reverse_kl(student_log_NE, teacher_log_NE)
    return per_token(
        partial(_mixture_kernel, share=1.0 - skew, forward=0.0, reverse=1.0), student_log_NE, teacher_log_NE
    )


def adaptive_kl(student_log_NE: Tensor, teacher_log_NE: Tensor, head_share: float = 0.5) -> Tensor:
    """Forward and reverse KL, weighted by where the student is off (Wu et al. 2024, arXiv 2404.02657, AKL).

    The head is the teacher's most likely events, up to the one whose mass brings their sum to `head_share`. With g_h
    and g_t the sums of |p - q| over head and tail, constants for the gradient:
    (g_h * forward KL + g_t * reverse KL) / (g_h + g_t). Deviation: the authors' code leaves the event that reaches the
    share out of the head, unless it is the first one. Not an f-divergence: merging events may raise it.

    Args:
        student_log_NE: log-probabilities, (N, E), -inf as in `forward_kl`.
        teacher_log_NE: log-probabilities, (N, E), -inf as in `reverse_kl`.
        head_share: the teacher's mass in the head, in (0, 1]; 1 is the forward KL.

    Returns:
        (N,) float32, nats per token.
    """
    if head_share == 1.0:
        return forward_kl(student_log_NE, teacher_log_NE)
    return per_token(partial(_adaptive_kl_kernel, head_share=head_share), student_log_NE, teacher_log_NE)


def alpha_divergence(student_log_NE: Tensor, teacher_log_NE: Tensor, alpha: float = 0.5) -> Tensor:
    """Alpha-divergence, (1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)) (Wang et al. 2021, arXiv 2102.07954).

    The sum over events of (alpha p + (1 - alpha) q - p^alpha q^(1 - alpha)) / (alpha (1 - alpha)): from the reverse KL
    (alpha 0) to the forward KL (alpha 1), the limits of the formula; at 1/2 four times the squared Hellinger distance.
    Between the ends it is never above 1 / (alpha (1 - alpha)). Deviation: the paper also takes a negative alpha, whose
    values it has to clip.

    Args:
        student_log_NE: log-probabilities, (N, E), -inf allowed.
        teacher_log_NE: log-probabilities, (N, E), -inf allowed.
        alpha: in [0, 1]; within 1e-6 of an end it counts as that end.

    Returns:
        (N,) float32, nats per token.
    """
    if alpha < _LEAST_SHARE:
        return reverse_kl(student_log_NE, teacher_log_NE)
    if alpha > 1.0 - _LEAST_SHARE:
        return forward_kl(student_log_NE, teacher_log_NE)
    return per_token(partial(_alpha_kernel, alpha=alpha), student_log_NE, teacher_log_NE)


def renyi_divergence(student_log_NE: Tensor, teacher_log_NE: Tensor, order: float = 0.5) -> Tensor:
    """Renyi divergence of p from q, log(sum p^order q^(1 - order)) / (order - 1) (van Erven 2014, arXiv 1206.2459).

    It grows with the order up to its limit at 1, the forward KL; at 1/2 it is twice the Bhattacharyya distance, the
    same both ways. Unlike the alpha-divergence it has no bound, so that its gradient stays where p and q hardly meet.
    No f-divergence, but merging events never raises it either. Deviation: orders above 1, infinite where only the
    student rules an event out, are left out.

    Args:
        student_log_NE: log-probabilities, (N, E), -inf allowed.
        teacher_log_NE: log-probabilities, (N, E), -inf allowed; where p and q hardly meet raised to at least
            `TEACHER_LOG_FLOOR`, because without a common event the value would be infinite.
        order: in (0, 1]; below 1e-6 it counts as 1e-6, within 1e-6 of 1 as 1.

    Returns:
        (N,) float32, nats per token.
    """
    if order > 1.0 - _LEAST_SHARE:
        return forward_kl(student_log_NE, teacher_log_NE)
    return per_token(partial(_renyi_kernel, order=max(order, _LEAST_SHARE)), student_log_NE, teacher_log_NE)


def total_variation(student_log_NE: Tensor, teacher_log_NE: Tensor) -> Tensor:
    """1/2 sum |p - q| (Wen et al. 2023, f-DISTILL, arXiv 2307.15190, TVD).

    Args:
        student_log_NE: log-probabilities, (N, E), -inf allowed.
        teacher_log_NE: log-probabilities, (N, E), -inf allowed.

    Returns:
        (N,) float32, no unit, in [0, 1].
    """
    return per_token(_total_variation_kernel, student_log_NE, teacher_log_NE)


def sampled_forward_kl(student_log_NK: Tensor, teacher_log_NK: Tensor) -> Tensor:
    """Estimate the forward KL from K draws from the teacher (Anshumann et al. 2025, arXiv 2503.16870).

    The mean of log p - log q over draws with replacement. Unbiased in value and gradient, but no divergence: it may be
    negative. Only the forward KL has this form, because it is an expectation under the teacher.

    Args:
        student_log_NK: log-probabilities of the drawn tokens, (N, K), normalized over the whole vocabulary.
        teacher_log_NK: the same of the teacher.

    Returns:
        (N,) float32, nats per token.
    """
    return (teacher_log_NK.float() - student_log_NK.float()).mean(-1)


def get_divergence(name: str, **options: float) -> Divergence:
    """Look up a divergence of `DIVERGENCES` and bind its option.

    Args:
        name: a key of the table.
        options: values of `OPTIONS`; those that the divergence does not have are left unused.

    Returns:
        a function of (student_log_NE, teacher_log_NE).

    Raises:
        ValueError: for an unknown name; the message lists those that exist.
    """
    row, own = divergence_row(name), divergence_option(name)
    return Divergence(partial(globals()[name], **{own: options[own]} if own in options else {}), row.temperature_power)


# (student_log_NE, teacher_log_NE, derivative_NE) -> value (N,). It writes the derivative of the value with respect to
# the student's log-probabilities into its last argument.
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def _forward_kl_kernel(student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor) -> Tensor:
    # Finite, because an event of probability 0 then adds 0; a NaN stays one, as it should for a model that diverged.
    possible_NE = torch.clamp(student_log_NE, min=_LOWEST, out=derivative_NE)
    gap_NE = (teacher_log_NE - possible_NE).clamp_(min=_LOWEST)
    teacher_NE = torch.exp(teacher_log_NE, out=derivative_NE)
    value_N = gap_NE.mul_(teacher_NE).sum(-1)
    derivative_NE.neg_()
    return value_N


def _reverse_kl_kernel(student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor) -> Tensor:
    floored_NE = torch.clamp(teacher_log_NE, min=TEACHER_LOG_FLOOR, out=derivative_NE)
    gap_NE = (student_log_NE - floored_NE).clamp_(min=_LOWEST)
    student_NE = torch.exp(student_log_NE, out=derivative_NE)
    value_NE = gap_NE.mul_(student_NE)
    derivative_NE.add_(value_NE)
    return value_NE.sum(-1)


def _mixture_kernel(
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


def _adaptive_kl_kernel(
    student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor, head_share: float
) -> Tensor:
    forward_N = _forward_kl_kernel(student_log_NE, teacher_log_NE, derivative_NE)
    off_NE = student_log_NE.exp().add_(derivative_NE).abs_()
    # The one asks how far it has come, for which a GPU would have to be waited for.
    head_sum = _head_sum if off_NE.device.type == "cpu" else _head_sum_without_waiting
    head_N, total_N = head_sum(off_NE, teacher_log_NE, head_share), off_NE.sum(-1)
    # Where nothing is off both weights are 0, as are both divergences.
    forward_weight_N = (head_N / total_N).nan_to_num_(nan=0.0).clamp_(max=1.0)
    reverse_weight_N = (total_N > 0) * (1.0 - forward_weight_N)
    reverse_derivative_NE = off_NE
    reverse_N = _reverse_kl_kernel(student_log_NE, teacher_log_NE, reverse_derivative_NE)
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


def _head_sum_without_waiting(values_NE: Tensor, teacher_log_NE: Tensor, head_share: float) -> Tensor:
    # The head is what is at least as likely as its last event: found by bisection over all float32, whose bits, of
    # numbers of one sign, are in the order of the numbers. Sorting would take three times the memory.
    teacher_NE, bits_NE = teacher_log_NE.exp(), teacher_log_NE.abs().view(torch.int32)
    lowest_N1 = torch.zeros_like(bits_NE[:, :1])
    highest_N1 = lowest_N1 + _BITS_OF_INFINITY
    for _ in range(_BITS_OF_INFINITY.bit_length()):
        bound_N1 = lowest_N1 + (highest_N1 - lowest_N1) // 2
        covered_N1 = (teacher_NE * (bits_NE <= bound_N1)).sum(-1, keepdim=True) >= head_share
        highest_N1 = torch.where(covered_N1, bound_N1, highest_N1)
        lowest_N1 = torch.where(covered_N1, lowest_N1, bound_N1 + 1)
    return (values_NE * (bits_NE <= highest_N1)).sum(-1)


def _alpha_kernel(student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor, alpha: float) -> Tensor:
    # Event by event alpha p + (1 - alpha) q - p^alpha q^(1 - alpha) = m (s expm1(g) - expm1(s g)): m is the larger of
    # p and q, g <= 0 the gap of their logs, and s the share of the smaller one, alpha or 1 - alpha. Where s is near 1
    # that is a difference of nearly equal numbers: with c = 1 - s it is -m (c expm1(g) + e^g expm1(-c g)).
    log_ratio_NE = teacher_log_NE - student_log_NE.clamp(min=_LOWEST)
    share = min(alpha, 1.0 - alpha)
    has_share_NE = (log_ratio_NE > 0) == (alpha >= 0.5)
    gap_NE = -log_ratio_NE.abs()
    larger_NE = torch.maximum(student_log_NE, teacher_log_NE).exp_()
    # Past an exponent of 80 the factor e^g has made nothing of it.
    part_NE = torch.where(has_share_NE, gap_NE * share, (gap_NE * -share).clamp_(max=80.0)).expm1_()
    decay_NE = torch.where(has_share_NE, -1.0, -gap_NE.exp())
    value_NE = part_NE.mul_(decay_NE)
    value_NE.add_(gap_NE.expm1().mul_(torch.where(has_share_NE, share, -share))).mul_(larger_NE)
    # The derivative (q - p^alpha q^(1 - alpha)) / alpha, likewise.
    exponent_NE = log_ratio_NE.mul_(alpha)
    student_NE = torch.exp(student_log_NE, out=derivative_NE)
    near_NE = student_NE * exponent_NE.clamp(max=1.0).expm1_().neg_()
    share_NE = torch.where(exponent_NE > 0, 1.0 - alpha, alpha)
    far_NE = student_NE.sub_(gap_NE.mul_(share_NE).exp_().mul_(larger_NE))
    torch.where(exponent_NE.abs() < 0.5, near_NE, far_NE, out=derivative_NE)
    derivative_NE.div_(alpha)
    return value_NE.sum(-1).div_(alpha * (1.0 - alpha))


def _renyi_kernel(student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor, order: float) -> Tensor:
    # The log of an overlap near 1 would be all rounding: there it comes from what is missing to 1, which is exact.
    missing_N = _alpha_kernel(student_log_NE, teacher_log_NE, derivative_NE, order).mul_(order * (1.0 - order))
    mixed_NE = torch.clamp(teacher_log_NE, min=TEACHER_LOG_FLOOR, out=derivative_NE)
    mixed_NE.mul_(order).add_(student_log_NE, alpha=1.0 - order)
    log_overlap_N = mixed_NE.logsumexp(-1)
    mixed_NE.sub_(log_overlap_N.unsqueeze(-1)).exp_().neg_()
    return torch.where(missing_N < 0.5, torch.log1p(-missing_N), log_overlap_N).div_(order - 1.0)


def _total_variation_kernel(student_log_NE: Tensor, teacher_log_NE: Tensor, derivative_NE: Tensor) -> Tensor:
    student_NE = torch.exp(student_log_NE, out=derivative_NE)
    gap_NE = student_NE - teacher_log_NE.exp()
    derivative_NE.mul_(gap_NE.sign()).mul_(0.5)
    return gap_NE.abs_().sum(-1).mul_(0.5)
