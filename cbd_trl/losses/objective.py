"""The distillation objective: which terms there are and how they add up, per token.

Shapes: N scored tokens, V_s vocabulary rows of the student.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cbd_trl.losses.divergences import Divergence, tempered_log_probs
from cbd_trl.losses.reduction import cross_entropy
from cbd_trl.losses.teacher_outputs import Prediction
from cbd_trl.utils.formatting import did_you_mean

# Share of the way from start to end, at a progress in [0, 1].
_SHARES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    # Half a cosine, as learning rates decay (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5).
    "cosine": lambda progress: (1.0 - math.cos(math.pi * progress)) / 2.0,
}
SCHEDULES = tuple(_SHARES)


@dataclass(frozen=True)
class WeightSchedule:
    """The weight of a loss term from the start of the run to its end.

    Args:
        start: weight at the start, finite and at least 0.
        end: weight at the end, likewise; `constant` never gets there.
        shape: one of `SCHEDULES`: `constant` stays at the start, `linear` and `cosine` go to the end.

    Raises:
        ValueError: for a weight or a shape that has no meaning.
    """

    start: float
    end: float
    shape: str

    def __post_init__(self) -> None:
        """Check every value."""
        if self.shape not in _SHARES:
            hint = did_you_mean(self.shape, SCHEDULES)
            raise ValueError(f"Unknown schedule {self.shape!r}: there are {', '.join(SCHEDULES)}.{hint}")
        for name, value in (("start", self.start), ("end", self.end)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"A schedule with {name}={value}: a weight of the loss must be finite and at least 0 (0 switches "
                    "the term off)."
                )

    def at(self, progress: float) -> float:
        """Compute the weight at a point of the run.

        Args:
            progress: share of the optimizer steps done; below 0 counts as 0, above 1 as 1.

        Returns:
            the weight, exactly `start` at 0 and, unless constant, exactly `end` at 1.
        """
        share = _SHARES[self.shape](min(max(progress, 0.0), 1.0))
        return self.start * (1.0 - share) + self.end * share

    @property
    def highest(self) -> float:
        """The highest weight of the run: 0 for a term that is never on."""
        return max(self.at(0.0), self.at(1.0))


# What `trl.SFTTrainer` logs beside its loss, by its names: of the student's distribution the entropy (nats), and 1
# where its most likely token is the one that follows, else 0.
METRICS = ("entropy", "mean_token_accuracy")
# Everything that is logged of a token. The teacher's cross-entropy is no part of the loss, nor is whether the token is
# one that a teacher with tokens of its own has no counterpart of, nor are the metrics.
TERMS = ("kd", "ce", "hidden", "teacher_ce", "unaligned", *METRICS)


@dataclass(frozen=True)
class TermWeights:
    """Weights of the terms at one step.

    Attributes:
        kd: of the divergence.
        ce: of the cross-entropy on the data's tokens.
        hidden: of the hidden-state distance.
    """

    kd: float
    ce: float
    hidden: float = 0.0


class LogitObjective(Protocol):
    """What `cbd_trl.losses.fused.fused_terms` needs of an objective."""

    def terms(self, student_NV: Tensor, teacher: Any, targets_N: Tensor, weights: TermWeights) -> dict[str, Tensor]:
        """{"kd", "ce", "teacher_ce"}: (N,) float32 each; see `DistillObjective.terms`."""


@dataclass(frozen=True)
class DistillObjective:
    """The divergence and the cross-entropy of the objective.

    Attributes:
        divergence: what `cbd_trl.losses.divergences.get_divergence` returned.
        temperature: T, divides both models' logits in the divergence. Its gradients with respect to the logits shrink
            as 1 / T^2 (total variation: 1 / T), so it is multiplied by that power of T: its weight beside the
            cross-entropy is to keep its meaning (Hinton et al. 2015, arXiv 1503.02531, section 2).
        top_k: compare the teacher's k most likely tokens and one bucket for all others; None for all tokens.
        shared_rows: vocabulary rows that both models have; None for all.
    """

    divergence: Divergence
    temperature: float = 1.0
    top_k: int | None = None
    shared_rows: int | None = None

    def terms(
        self, student_NV: Tensor, teacher: Prediction, targets_N: Tensor, weights: TermWeights
    ) -> dict[str, Tensor]:
        """Compute every term that reads logits, and the teacher's own cross-entropy.

        A term of weight 0 is computed without gradient, because it is logged all the same. The divergence is taken
        between the distributions over the shared rows, the cross-entropies over each model's own rows.

        Args:
            student_NV: logits, (N, V_s) float32.
            teacher: its prediction at the same positions.
            targets_N: token ids, (N,).
            weights: of this step.

        Returns:
            {"kd", "ce", "teacher_ce"}: (N,) float32, nats per token.
        """
        rows = student_NV.shape[1] if self.shared_rows is None else self.shared_rows
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and (weights.kd > 0 or weights.ce > 0)):
            student_log_NV = tempered_log_probs(student_NV[:, :rows], self.temperature)
        with torch.set_grad_enabled(grad and weights.kd > 0):
            kd_N = teacher.compare(student_log_NV, self.divergence, self.temperature, self.top_k)
            kd_N = kd_N * self.temperature**self.divergence.temperature_power
        with torch.set_grad_enabled(grad and weights.ce > 0):
            if self.temperature == 1.0 and rows == student_NV.shape[1]:
                ce_N = -student_log_NV.gather(1, targets_N[:, None])[:, 0]
            else:
                ce_N = cross_entropy(student_NV, targets_N)
        with torch.no_grad():
            return {"kd": kd_N, "ce": ce_N, "teacher_ce": teacher.cross_entropy(targets_N)}


def combine(terms: dict[str, Tensor], weights: TermWeights) -> Tensor:
    """Add up the terms that have a weight.

    Args:
        terms: "kd", "ce" and perhaps "hidden", (N,) each.
        weights: of this step.

    Returns:
        (N,) float32.
    """
    each = {"kd": weights.kd, "ce": weights.ce, "hidden": weights.hidden}
    parts = [weight * terms[name] for name, weight in each.items() if weight > 0 and name in terms]
    return torch.stack(parts).sum(0) if parts else torch.zeros_like(terms["ce"])
