"""SeqKD: the student learns text that its teacher wrote, and the teacher itself does not run.

Kim and Rush 2016 (arXiv 1606.07947), section 3.2: of the cross-entropy of whole sequences, the teacher's distribution
is replaced by its mode, which a beam search comes near to,

    L = -sum_y q(y | x) log p(y | x), about -log p(y^ | x) = -sum_t log p(y^_t | y^_<t, x)

with q the teacher, p the student, x what is given and y^ the teacher's output. Deviations: y^ is whatever the data
holds, drawn from the teacher by default (`cbd-trl generate`) and not searched for; and it is read in the student's
tokens, the teacher's may be others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_trl.architectures.backbone import Head
from cbd_trl.losses.fused import fused_terms
from cbd_trl.losses.objective import METRICS, TermWeights
from cbd_trl.losses.reduction import cross_entropy, scored_targets, select_scored
from cbd_trl.teachers.local import Batch
from cbd_trl.trainers.step_loss import StepLoss
from cbd_trl.trainers.teacher_setup import TeacherSetup, open_student
from cbd_trl.utils.tokenizers import vocabulary_rows


class AbsentTeacher:
    """A teacher that has said all it has to say in the data."""

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """None."""
        return []

    def place(self, accelerator: Accelerator, offload: bool = False) -> None:
        """There is nothing to place."""

    def predict(self, batch: Batch, student: nn.Module) -> None:
        """Nothing."""


class SequenceLevelLoss(StepLoss):
    """`StepLoss` whose one term is the cross-entropy of the data's tokens, "ce": -log p(y^_t | y^_<t, x), nats."""

    def _terms(self, hidden_BTd: Tensor, labels_BT: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_Nd, targets_N = select_scored(hidden_BTd, labels_BT), scored_targets(labels_BT)
        total, terms = fused_terms(hidden_Nd, head, targets_N, _Silence(), _TextAlone(), self.weights, self.chunk)
        return total, {name: terms[name] for name in ("ce", *METRICS)}


class _Silence:
    """What an absent teacher says."""

    def at(self, part: slice) -> "_Silence":
        return self

    def rows(self, rows: slice) -> "_Silence":
        return self


class _TextAlone:
    def terms(self, student_NV: Tensor, teacher: Any, targets_N: Tensor, weights: TermWeights) -> dict[str, Tensor]:
        ce_N = cross_entropy(student_NV, targets_N)
        return {"kd": torch.zeros_like(ce_N), "ce": ce_N, "teacher_ce": torch.zeros_like(ce_N)}


def set_up_black_box(student: Any, teacher_tokenizer: Any) -> TeacherSetup:
    """A setup without a teacher.

    Args:
        student: not wrapped for training; its forward is opened.
        teacher_tokenizer: the trainer's argument.

    Raises:
        ValueError: if there is a tokenizer for the teacher.
    """
    if teacher_tokenizer is not None:
        raise ValueError(
            "teacher_processing_class was given with objective='seqkd', which reads what the teacher wrote as text: "
            "it would not be used. Leave it out."
        )
    open_student(student)
    return TeacherSetup(
        AbsentTeacher(), None, vocabulary_rows(student), "not at hand: the data is text that it wrote (SeqKD)"
    )
