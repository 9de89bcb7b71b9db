"""Teacher output for the next token at N positions, and how a student is compared with it.

`TeacherOutputs` hold a whole micro-batch in a small form (hidden states, top-k entries). For a part of it `at` makes a
`Prediction`, which may be as wide as the vocabulary and lives as long as that part is worked on.

Shapes: N positions, D teacher width, V vocabulary rows, K kept entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cbd_trl.architectures.backbone import Head
from cbd_trl.losses.divergences import Divergence, sampled_forward_kl, tempered_log_probs
from cbd_trl.losses.reduction import cross_entropy


def top_k_log_probs(log_NV: Tensor, indices_NK: Tensor) -> Tensor:
    """Gather the log-probabilities of the kept tokens, in their order, and last of everything else together.

    The tail is summed over the other tokens, not taken as 1 - sum, which would be noise for a confident model.

    Args:
        log_NV: log-probabilities over the vocabulary, (N, V).
        indices_NK: kept tokens, (N, K), int64, distinct within a row.

    Returns:
        (N, K + 1) float32, nats; (N, V) if K = V, for then nothing else is left.
    """
    if indices_NK.shape[-1] == log_NV.shape[-1]:
        return log_NV.float().gather(-1, indices_NK)
    return _KeptAndTail.apply(log_NV.float(), indices_NK)


def teacher_top_k(log_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take what a cache keeps of a teacher's distribution.

    Args:
        log_NV: log-probabilities over the vocabulary, (N, V).
        k: tokens to keep, at most V of them.

    Returns:
        indices (N, K) int64 with the most likely first, their log-probabilities (N, K) float32, and that of everything
        else together (N,) float32: -inf where nothing is left (k >= V). Nats.
    """
    indices_NK = log_NV.topk(min(k, log_NV.shape[-1]), dim=-1).indices
    log_NE = top_k_log_probs(log_NV, indices_NK)
    if k >= log_NV.shape[-1]:
        return indices_NK, log_NE, torch.full_like(log_NE[:, 0], float("-inf"))
    return indices_NK, log_NE[:, :-1], log_NE[:, -1]


def draw(log_NV: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw tokens with replacement, for `cbd_trl.losses.divergences.sampled_forward_kl`.

    Args:
        log_NV: log-probabilities over the vocabulary, (N, V).
        count: draws per token.
        generator: on the device of `log_NV`; None for torch's own.

    Returns:
        (N, count) int64; a token may come up several times.
    """
    return torch.multinomial(log_NV.float().exp(), count, replacement=True, generator=generator)


class _KeptAndTail(torch.autograd.Function):
    # gather, scatter and logsumexp would do, but autograd passes over three more blocks of (N, V) for them.
    @staticmethod
    def forward(ctx: Any, log_NV: Tensor, indices_NK: Tensor) -> Tensor:
        others_NV = log_NV.scatter(-1, indices_NK, float("-inf"))
        # 0 where nothing else has any probability: -inf - -inf would be NaN.
        shift_N1 = others_NV.amax(-1, keepdim=True).nan_to_num_(neginf=0.0)
        others_NV.sub_(shift_N1).exp_()
        sum_N1 = others_NV.sum(-1, keepdim=True)
        ctx.save_for_backward(others_NV, sum_N1, indices_NK)
        return torch.cat([log_NV.gather(-1, indices_NK), sum_N1.log() + shift_N1], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        others_NV, sum_N1, indices_NK = ctx.saved_tensors
        (gradient_NE,) = gradients
        scale_N1 = torch.where(sum_N1 > 0, gradient_NE[:, -1:] / sum_N1, 0.0)
        return (others_NV * scale_N1).scatter_(-1, indices_NK, gradient_NE[:, :-1]), None


class ReusedRows:
    """Room for the logits of one chunk after another.

    Chunks are larger than what a C library's allocator keeps: each new one would be pages that the system has to clear
    first, which costs a fifth of the matrix product that fills them.
    """

    def __init__(self) -> None:
        self._room_NV: Tensor | None = None

    def like(self, hidden_nD: Tensor, columns: int) -> Tensor:
        """Make room for the product of hidden states and a head; the last one made may be written over.

        Args:
            hidden_nD: in the dtype and on the device of the product, (n, D).
            columns: V.

        Returns:
            (n, V), not initialized.
        """
        rows = len(hidden_nD)
        if self._room_NV is None or len(self._room_NV) < rows:
            # Before there is more room: both at once would not be needed.
            self._room_NV = None
            self._room_NV = hidden_nD.new_empty(rows, columns)
        return self._room_NV[:rows]


class Prediction(Protocol):
    """A teacher's next-token distributions at some positions, ready to be compared with."""

    def compare(self, student_log_NV: Tensor, divergence: Divergence, temperature: float, top_k: int | None) -> Tensor:
        """Compute the divergence between student and teacher.

        Args:
            student_log_NV: the student's log-probabilities at the temperature, over the rows both models have, (N, V).
            divergence: of `cbd_trl.losses.divergences`.
            temperature: divides the teacher's logits.
            top_k: compare the teacher's k most likely tokens and one bucket for all others; None for all tokens.

        Returns:
            (N,) float32, nats per token, before the factor of the temperature.
        """

    def cross_entropy(self, targets_N: Tensor) -> Tensor:
        """The teacher's own cross-entropy at temperature 1, (N,) nats per token."""

    def rows(self, rows: slice) -> "Prediction":
        """Select some of the N positions."""


class AnyTeacherOutputs(Protocol):
    """Teacher output at all scored positions of a micro-batch, in whatever form an objective reads."""

    def at(self, part: slice) -> Any:
        """Compute the output at some of the positions, good until the next call; `rows` gets at fewer of them."""


class TeacherOutputs(AnyTeacherOutputs, Protocol):
    """Teacher output at all scored positions of a micro-batch."""

    def at(self, part: slice) -> Prediction:
        """Compute the prediction at some of the positions. It is good until the next call."""


class LogitPrediction:
    """A prediction made of logits: of one teacher, or of several whose distributions are averaged.

    Args:
        logits: for each teacher (N, V_i) float32.
        weights: of the teachers, summing to 1.
    """

    def __init__(self, logits: Sequence[Tensor], weights: Sequence[float] = (1.0,)) -> None:
        self._logits = logits
        self._weights = weights
        # At temperature 1 the divergence and the cross-entropy read the same log-probabilities.
        self._known: dict[tuple[float, int], Tensor] = {}

    def rows(self, rows: slice) -> "LogitPrediction":
        """See `Prediction`."""
        return LogitPrediction([logits_NV[rows] for logits_NV in self._logits], self._weights)

    def log_probs(self, temperature: float, rows: int) -> Tensor:
        """Log of the weighted mean of the teachers' distributions over the first rows, (N, rows)."""
        key = (temperature, rows)
        if key not in self._known:
            # Slicing all rows would cost nothing, but each teacher may have a number of its own.
            each = [tempered_log_probs(logits_NV[:, :rows], temperature) for logits_NV in self._logits]
            self._known[key] = each[0] if len(each) == 1 else self._mean(each)
        return self._known[key]

    def _mean(self, each: Sequence[Tensor]) -> Tensor:
        # The mean of probabilities (Baby Llama, arXiv 2308.02019; You et al. 2017), not of logits: it is a
        # distribution at every temperature, and one sure teacher is not outvoted by the scale of another's logits.
        return torch.stack(
            [log + torch.tensor(w).log() for log, w in zip(each, self._weights, strict=True)]
        ).logsumexp(0)

    def compare(self, student_log_NV: Tensor, divergence: Divergence, temperature: float, top_k: int | None) -> Tensor:
        """See `Prediction`."""
        teacher_log_NV = self.log_probs(temperature, student_log_NV.shape[1])
        if top_k is None:
            return divergence(student_log_NV, teacher_log_NV)
        indices_NK, kept_NK, tail_N = teacher_top_k(teacher_log_NV, top_k)
        student_log_NE = top_k_log_probs(student_log_NV, indices_NK)
        everything = indices_NK.shape[1] == teacher_log_NV.shape[1]
        return divergence(student_log_NE, kept_NK if everything else torch.cat([kept_NK, tail_N[:, None]], 1))

    def cross_entropy(self, targets_N: Tensor) -> Tensor:
        """See `Prediction`. Each teacher's distribution is over its own rows."""
        if len(self._logits) == 1:
            return -self.log_probs(1.0, self._logits[0].shape[1]).gather(1, targets_N[:, None])[:, 0]
        return -self._mean([-cross_entropy(logits_NV, targets_N) for logits_NV in self._logits])


@dataclass(frozen=True)
class HiddenOutputs:
    """The last hidden states of a teacher, to be multiplied by its head part by part.

    Attributes:
        hidden_ND: (N, D), in the dtype of the head.
        head: of the teacher.
    """

    hidden_ND: Tensor
    head: Head
    _projected: ReusedRows = field(default_factory=ReusedRows, init=False, repr=False, compare=False)

    @torch.no_grad()
    def logits(self, part: slice) -> Tensor:
        """Logits of a part, (n, V) float32. They are good until the next call, which may write over them."""
        hidden_nD = self.hidden_ND[part]
        out_nV = self._projected.like(hidden_nD, self.head.rows)
        return self.head.bound(self.head.to(hidden_nD.dtype).project(hidden_nD, out_nV))

    def at(self, part: slice) -> LogitPrediction:
        """See `TeacherOutputs`."""
        return LogitPrediction([self.logits(part)])


@dataclass(frozen=True)
class MixtureOutputs:
    """Several teachers, whose distributions are averaged.

    Attributes:
        members: the outputs of each.
        weights: summing to 1.
    """

    members: Sequence[HiddenOutputs]
    weights: Sequence[float]

    def at(self, part: slice) -> LogitPrediction:
        """See `TeacherOutputs`."""
        return LogitPrediction([member.logits(part) for member in self.members], self.weights)


@dataclass(frozen=True)
class TopKOutputs:
    """A teacher's K most likely tokens and the mass of all others.

    Attributes:
        indices_NK: token ids, distinct within a row.
        log_probs_NK: at the temperature they were taken at, float32.
        tail_N: log of the mass of all other tokens, -inf where there is none.
        target_N: log-probability at temperature 1 of the token that follows.
    """

    indices_NK: Tensor
    log_probs_NK: Tensor
    tail_N: Tensor
    target_N: Tensor

    def at(self, part: slice) -> "TopKOutputs":
        """See `TeacherOutputs`."""
        return self.rows(part)

    def rows(self, rows: slice) -> "TopKOutputs":
        """See `Prediction`."""
        return TopKOutputs(self.indices_NK[rows], self.log_probs_NK[rows], self.tail_N[rows], self.target_N[rows])

    def compare(self, student_log_NV: Tensor, divergence: Divergence, temperature: float, top_k: int | None) -> Tensor:
        """See `Prediction`. The temperature is the one the entries were taken at; the first `top_k` are used."""
        indices_NK = self.indices_NK.long()
        kept = indices_NK.shape[1] if top_k is None else min(top_k, indices_NK.shape[1])
        student_log_NE = top_k_log_probs(student_log_NV, indices_NK[:, :kept])
        teacher_log_NE = self.log_probs_NK[:, :kept]
        if kept < student_log_NV.shape[1]:
            tail_N1 = torch.cat([self.log_probs_NK[:, kept:], self.tail_N[:, None]], 1).logsumexp(1, keepdim=True)
            teacher_log_NE = torch.cat([teacher_log_NE, tail_N1], 1)
        # Rounding on disk must not make the events anything but a distribution: divergences would turn negative.
        return divergence(student_log_NE, teacher_log_NE.log_softmax(-1))

    def cross_entropy(self, targets_N: Tensor) -> Tensor:
        """See `Prediction`."""
        return -self.target_N


@dataclass(frozen=True)
class SampledOutputs:
    """K draws from a teacher's distribution at every position (Sparse Logit Sampling, arXiv 2503.16870).

    Attributes:
        indices_NK: the tokens drawn, with repetition.
        log_probs_NK: theirs at the temperature they were drawn at, float32.
        target_N: log-probability at temperature 1 of the token that follows.
    """

    indices_NK: Tensor
    log_probs_NK: Tensor
    target_N: Tensor

    def at(self, part: slice) -> "SampledOutputs":
        """See `TeacherOutputs`."""
        return self.rows(part)

    def rows(self, rows: slice) -> "SampledOutputs":
        """See `Prediction`."""
        return SampledOutputs(self.indices_NK[rows], self.log_probs_NK[rows], self.target_N[rows])

    def compare(self, student_log_NV: Tensor, divergence: Divergence, temperature: float, top_k: int | None) -> Tensor:
        """See `Prediction`. Forward KL whatever the divergence: it alone can be estimated from draws without bias."""
        return sampled_forward_kl(student_log_NV.gather(1, self.indices_NK.long()), self.log_probs_NK)

    def cross_entropy(self, targets_N: Tensor) -> Tensor:
        """See `Prediction`."""
        return -self.target_N
