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

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_trl.bridge.sides import chunked_cross_entropy
from cbd_trl.losses.head import Head, product_dtype
from cbd_trl.losses.reduction import scored_targets, select_scored
from cbd_trl.teachers.batch import Batch
from cbd_trl.teachers.tokenizers import vocabulary_rows
from cbd_trl.trainers.step_loss import StepLoss
from cbd_trl.trainers.teacher_setup import TeacherSetup, open_student


class AbsentTeacher:
    """A teacher that has said all it has to say in the data."""

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """None."""
        return []

    def place(self, accelerator: Accelerator, offload: bool = False) -> None:
        """There is nothing to place."""

    def says(self, batch: Batch, student: nn.Module) -> None:
        """Nothing."""


class SequenceLevelLoss(StepLoss):
    """`StepLoss` whose one term is the cross-entropy of the data's tokens, "ce": -log p(y^_t | y^_<t, x), nats."""

    def _terms(self, hidden_BTd: Tensor, labels_BT: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_Nd = select_scored(hidden_BTd, labels_BT).to(product_dtype(head, hidden_BTd.device))
        ce_N = chunked_cross_entropy(hidden_Nd, head, scored_targets(labels_BT), self.chunk)
        return self.weights.ce * ce_N.sum(), {"ce": ce_N.detach()}


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
