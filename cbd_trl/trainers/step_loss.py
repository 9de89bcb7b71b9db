"""The loss of one micro-batch, computed inside the student's forward from its last hidden states.

Shapes: B rows, T tokens, N scored tokens, V vocabulary, d and D width of student and teacher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cbd_trl.architectures.backbone import Head, output_head, product_dtype
from cbd_trl.losses.fused import fused_terms
from cbd_trl.losses.objective import METRICS, TermWeights
from cbd_trl.losses.reduction import Scored, cross_entropy
from cbd_trl.trainers.hidden_states import LayerPairs


@dataclass(frozen=True)
class StepLoss:
    """What `model(**inputs, inside=...)` runs: the fused head and divergence, and the hidden-state term.

    Attributes:
        student: the causal LM itself, not wrapped.
        labels_BT: token ids, -100 where the token is not scored.
        scored: its scored positions.
        teacher_scored: where the teacher predicts the same tokens: other places if it reads prompts of its own.
        teacher: its output: of the same tokens a `cbd_trl.losses.teacher_outputs.TeacherOutputs`.
        objective: the terms on logits: of the same tokens a `cbd_trl.losses.objective.DistillObjective`.
        weights: of all terms at this step.
        pairs: the layers that are compared.
        student_states: layer -> output (B, T, d), filled while the student runs.
        teacher_states: layer -> output (B, T, D) of the teacher.
        chunk: tokens whose logits are held at a time; None to choose.
        with_logits: also return all logits, for metrics.
    """

    student: Any
    labels_BT: Tensor
    scored: Scored
    teacher_scored: Scored
    teacher: Any
    objective: Any
    weights: TermWeights
    pairs: LayerPairs
    student_states: Mapping[int, Tensor]
    teacher_states: Mapping[int, Tensor]
    chunk: int | None = None
    with_logits: bool = False

    def __call__(self, hidden_BTd: Tensor) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            hidden_BTd: last hidden states of the student, (B, T, d).

        Returns:
            "total", the weighted sum over the scored tokens, with gradient; "kd", "ce", "teacher_ce" and, where it is
            taken, "hidden": (N,) without; "logits" (B, T, V) if requested. All on the device of the labels.

        Raises:
            RuntimeError: if the hidden-state term would be weighted but not trained.
        """
        device = self.labels_BT.device
        # The last layer and the head of a student that is spread are where its `device_map` put them.
        hidden_BTd = hidden_BTd.to(device)
        with output_head(self.student) as head:
            head = head.to(device)
            total, terms = self._terms(hidden_BTd, head)
            outputs = {**terms}
            if self.with_logits:
                outputs["logits"] = head.logits(hidden_BTd.to(product_dtype(head, hidden_BTd.device))).detach()
        hidden_N = self._hidden()
        if hidden_N is not None:
            self._check_gradient(hidden_N, total)
            total = total + self.weights.hidden * hidden_N.sum()
            outputs["hidden"] = hidden_N.detach()
        return {"total": total, **outputs}

    def _terms(self, hidden_BTd: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_Nd, targets_N = self._scored(hidden_BTd)
        return fused_terms(hidden_Nd, head, targets_N, self.teacher, self.objective, self.weights, self.chunk)

    def _scored(self, hidden_BTd: Tensor) -> tuple[Tensor, Tensor]:
        """The states at the scored positions and the tokens that they predict, where the student has its head."""
        return self.scored.select(hidden_BTd), self.scored.select_next(self.labels_BT.to(hidden_BTd.device))

    def _hidden(self) -> Tensor | None:
        ours, theirs = self.scored.select, self.teacher_scored.select
        return self.pairs.distance(self.student_states, self.teacher_states, ours, theirs)

    def _check_gradient(self, hidden_N: Tensor, total: Tensor) -> None:
        # A hybrid may well have no trained layer on one of its steps.
        expected = torch.is_grad_enabled() and self.weights.hidden > 0 and self.pairs.hybrid is None
        if expected and total.requires_grad and not hidden_N.requires_grad:
            raise RuntimeError(
                f"The hidden-state term has weight {self.weights.hidden:g} but no gradient, though the rest of the "
                "loss has one: it would train nothing. Reentrant gradient checkpointing hides it: set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}. If all layers are frozen, set "
                "hidden_weight=0."
            )


class SequenceLevelLoss(StepLoss):
    """SeqKD: the student learns text that its teacher wrote, and the teacher itself does not run.

    Kim and Rush 2016 (arXiv 1606.07947), section 3.2: of the cross-entropy of whole sequences, the teacher's
    distribution is replaced by its mode, which a beam search comes near to,

        L = -sum_y q(y | x) log p(y | x), about -log p(y^ | x) = -sum_t log p(y^_t | y^_<t, x)

    with q the teacher, p the student, x the prompt and y^ the teacher's output. Deviations: y^ is whatever the dataset
    has, drawn from the teacher by default (`cbd-trl generate`) and not searched for; and it is read in the student's
    tokens, the teacher's may be others. The one term is "ce": -log p(y^_t | y^_<t, x), in nats.
    """

    def _terms(self, hidden_BTd: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_Nd, targets_N = self._scored(hidden_BTd)
        total, terms = fused_terms(hidden_Nd, head, targets_N, _NoOutput(), _TextAlone(), self.weights, self.chunk)
        return total, {name: terms[name] for name in ("ce", *METRICS)}


class _NoOutput:
    """The output of a teacher that does not run."""

    def at(self, part: slice) -> "_NoOutput":
        return self

    def rows(self, rows: slice) -> "_NoOutput":
        return self


class _TextAlone:
    """An objective whose only term is the cross-entropy."""

    def terms(self, student_NV: Tensor, teacher: Any, targets_N: Tensor, weights: TermWeights) -> dict[str, Tensor]:
        ce_N = cross_entropy(student_NV, targets_N)
        return {"kd": torch.zeros_like(ce_N), "ce": ce_N, "teacher_ce": torch.zeros_like(ce_N)}
