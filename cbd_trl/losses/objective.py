"""The distillation objective: which terms there are and how they add up, per token.

Shapes: N scored tokens, V_s and V_t vocabulary rows of student and teacher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cbd_trl.losses.divergences import get_divergence
from cbd_trl.losses.reduction import cross_entropy


@dataclass(frozen=True)
class DistillObjective:
    """kd_weight x divergence + ce_weight x cross-entropy + hidden_weight x hidden distance, per token.

    Attributes:
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy on the data's tokens.
        hidden_weight: weight of the hidden-state distance.
        divergence: a name in `cbd_trl.losses.divergences.DIVERGENCES`.
        temperature: divides both models' logits in the divergence.
        beta: of the jsd.
        shared_rows: vocabulary rows that both models have; None for all.
    """

    kd_weight: float
    ce_weight: float
    hidden_weight: float
    divergence: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    shared_rows: int | None = None

    def terms(self, student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, hidden_N: Tensor | None) -> dict:
        """Every term of the loss, and the teacher's own cross-entropy.

        A term of weight 0 is computed without gradient, because it is logged all the same. The divergence is taken
        between the distributions over the shared rows, the cross-entropies over each model's own rows.

        Args:
            student_NV: logits, (N, V_s).
            teacher_NV: logits, (N, V_t).
            targets_N: token ids, (N,).
            hidden_N: hidden-state distance, (N,); None when it is not taken.

        Returns:
            {"kd", "ce", "teacher_ce", and "hidden" if given}: (N,) float32, nats per token (hidden: no unit).
        """
        rows = self.shared_rows
        divergence = get_divergence(self.divergence)
        terms: dict[str, Tensor] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kd_weight > 0):
            terms["kd"] = divergence(student_NV[:, :rows], teacher_NV[:, :rows], self.temperature, self.beta)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.ce_weight > 0):
            terms["ce"] = cross_entropy(student_NV, targets_N)
        if hidden_N is not None:
            terms["hidden"] = hidden_N
        with torch.no_grad():
            terms["teacher_ce"] = cross_entropy(teacher_NV, targets_N)
        return terms

    def combine(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms that have a weight.

        Args:
            terms: what `terms` returned.

        Returns:
            (N,) float32.

        Raises:
            ValueError: if every weight of a present term is 0.
        """
        weights = {"kd": self.kd_weight, "ce": self.ce_weight, "hidden": self.hidden_weight}
        parts = [weight * terms[name] for name, weight in weights.items() if weight > 0 and name in terms]
        if not parts:
            raise ValueError(f"Nothing to minimise: the weights are {weights}. Set at least one of them above 0.")
        return torch.stack(parts).sum(0)
