"""Divergences between the next-token distributions of a student and a teacher, and their gradients.

Shapes: N scored tokens, V vocabulary rows, K draws, E events (all tokens, or the kept ones and a tail: `events.py`).
Every divergence takes float log-probabilities of the same E events, which sum to one, and returns nats per token that
are >= 0 and exactly 0 for equal inputs. The teacher is a constant. In the formulas p is the teacher, q the student.
A new divergence is one function and one row of `DIVERGENCES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from cbd_trl.losses.divergence_kernels import (
    adaptive_kl_kernel,
    forward_kl_kernel,
    mixture_kernel,
    per_token,
    reverse_kl_kernel,
    total_variation_kernel,
)
from cbd_trl.utils.formatting import did_you_mean

# Where one distribution has less than about this share of a mixture, float32 rounds the other's to 1 and the formula
# divides by 0. At that point the mixture is the other distribution.
_LEAST_SHARE = 1e-6


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
        """The divergence of every token, (N,) float32."""
        return self.function(student_log_NE, teacher_log_NE)


def tempered_log_probs(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T).

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
    return per_token(forward_kl_kernel, student_log_NE, teacher_log_NE)


def reverse_kl(student_log_NE: Tensor, teacher_log_NE: Tensor) -> Tensor:
    """KL(q || p): the student keeps to what the teacher finds likely (Gu et al. 2023, arXiv 2306.08543).

    Args:
        student_log_NE: log-probabilities, (N, E); -inf for impossible events, which add nothing.
        teacher_log_NE: log-probabilities, (N, E); raised to at least `TEACHER_LOG_FLOOR`, because an event that only
            the teacher rules out would make the value infinite.

    Returns:
        (N,) float32, nats per token.
    """
    return per_token(reverse_kl_kernel, student_log_NE, teacher_log_NE)


def jsd(student_log_NE: Tensor, teacher_log_NE: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence (Agarwal et al. 2023, arXiv 2306.13649, eq. 1), with TRL's `beta`.

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
        partial(mixture_kernel, share=beta, forward=beta, reverse=1.0 - beta), student_log_NE, teacher_log_NE
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
    return per_token(partial(mixture_kernel, share=skew, forward=1.0, reverse=0.0), student_log_NE, teacher_log_NE)


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
        partial(mixture_kernel, share=1.0 - skew, forward=0.0, reverse=1.0), student_log_NE, teacher_log_NE
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
    return per_token(partial(adaptive_kl_kernel, head_share=head_share), student_log_NE, teacher_log_NE)


def total_variation(student_log_NE: Tensor, teacher_log_NE: Tensor) -> Tensor:
    """1/2 sum |p - q| (Wen et al. 2023, f-DISTILL, arXiv 2307.15190, TVD).

    Args:
        student_log_NE: log-probabilities, (N, E), -inf allowed.
        teacher_log_NE: log-probabilities, (N, E), -inf allowed.

    Returns:
        (N,) float32, no unit, in [0, 1].
    """
    return per_token(total_variation_kernel, student_log_NE, teacher_log_NE)


def sampled_forward_kl(student_log_NK: Tensor, teacher_log_NK: Tensor) -> Tensor:
    """Estimate of the forward KL from K draws from the teacher (Anshumann et al. 2025, arXiv 2503.16870).

    The mean of log p - log q over draws with replacement. Unbiased in value and gradient, but no divergence: it may be
    negative. Only the forward KL has this form, because it is an expectation under the teacher.

    Args:
        student_log_NK: log-probabilities of the drawn tokens, (N, K), normalised over the whole vocabulary.
        teacher_log_NK: the same of the teacher.

    Returns:
        (N,) float32, nats per token.
    """
    return (teacher_log_NK.float() - student_log_NK.float()).mean(-1)


@dataclass(frozen=True)
class DivergenceRow:
    """One divergence: its function, its option beside the two distributions, and `Divergence.temperature_power`."""

    function: Callable[..., Tensor]
    option: str | None = None
    temperature_power: int = 2


DIVERGENCES: dict[str, DivergenceRow] = {
    "forward_kl": DivergenceRow(forward_kl),
    "reverse_kl": DivergenceRow(reverse_kl),
    "jsd": DivergenceRow(jsd, "beta"),
    "skew_kl": DivergenceRow(skew_kl, "skew"),
    "skew_reverse_kl": DivergenceRow(skew_reverse_kl, "skew"),
    "adaptive_kl": DivergenceRow(adaptive_kl, "head_share"),
    "total_variation": DivergenceRow(total_variation, temperature_power=1),
}


def get_divergence(name: str, **options: float) -> Divergence:
    """A divergence of `DIVERGENCES` with its option bound.

    Args:
        name: a key of the table.
        options: beta, skew, head_share; those that the divergence does not have are left unused.

    Returns:
        a function of (student_log_NE, teacher_log_NE).

    Raises:
        ValueError: for an unknown name; the message lists those that exist.
    """
    row = _row(name)
    own = {key: value for key, value in options.items() if key == row.option}
    return Divergence(partial(row.function, **own), row.temperature_power)


def divergence_option(name: str) -> str | None:
    """The option that a divergence of `DIVERGENCES` has: beta, skew, head_share or None.

    Args:
        name: a key of the table.

    Returns:
        the option's name.

    Raises:
        ValueError: for an unknown name; the message lists those that exist.
    """
    return _row(name).option


def _row(name: str) -> DivergenceRow:
    if name not in DIVERGENCES:
        hint = did_you_mean(name, DIVERGENCES)
        raise ValueError(f"Unknown divergence {name!r}: there are {', '.join(DIVERGENCES)}.{hint}")
    return DIVERGENCES[name]
