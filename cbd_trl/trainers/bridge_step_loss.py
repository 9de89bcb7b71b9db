"""The loss of one micro-batch across vocabularies: what the teacher says, and how the student is compared with it.

Shapes: B x T the student's batch, R x U the teacher's, N scored tokens, G groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbd_trl.architectures.backbone import output_head
from cbd_trl.architectures.head import Head, product_dtype
from cbd_trl.bridge.alignment import NOWHERE, Alignment
from cbd_trl.bridge.objectives.inputs import Side, on_first
from cbd_trl.losses.reduction import scored_mask
from cbd_trl.teachers.batch import Batch
from cbd_trl.teachers.local import LocalTeacher
from cbd_trl.trainers.step_loss import StepLoss


@dataclass(frozen=True)
class BridgeSignal:
    """What a teacher with tokens of its own says of a micro-batch.

    Attributes:
        teacher: at the tokens of groups.
        alignment: the groups.
        ids_BT: the student's tokens.
        text_BT: the text each of them is from.
    """

    teacher: Side
    alignment: Alignment
    ids_BT: Tensor
    text_BT: Tensor


class BridgeTeacher(LocalTeacher):
    """A frozen causal LM that reads the texts of a batch in its own tokens, put there by `BridgeCollator`.

    Args:
        model: what `load_teacher` returned.
        embedded: whether the objective reads input embeddings of both models.
    """

    def __init__(self, model: Any, embedded: bool = False) -> None:
        super().__init__(model)
        self._embedded = embedded

    @property
    def models(self) -> list[Any]:
        """None: it does not run on the student's batch."""
        return []

    @torch.no_grad()
    def says(self, batch: Batch, student: nn.Module) -> BridgeSignal:  # type: ignore[override]  # no positions shared
        """What the teacher says of the texts of a batch.

        Args:
            batch: with the tensors of `BridgeCollator`.
            student: unused.
        """
        read = {name.removeprefix("teacher_"): tensor for name, tensor in batch.teacher.items()}
        inside = _ReadSide(self.model, read["ids"], read["group"], self._embedded)
        teacher = self._placed(input_ids=read["ids"], attention_mask=read["mask"], use_cache=False, inside=inside)
        groups = max(int(read["group"].max()), NOWHERE) + 1
        alignment = Alignment(read["students_group"], read["group"], groups)
        return BridgeSignal(teacher, alignment, batch.inputs["input_ids"], read["students_text"])


@dataclass(frozen=True)
class _ReadSide:
    model: Any
    ids_RU: Tensor
    group_RU: Tensor
    embedded: bool

    def __call__(self, hidden_RUD: Tensor) -> Side:
        with output_head(self.model, keep=True) as head:
            dtype = product_dtype(head, hidden_RUD.device)
            embedding_VD = self.model.get_input_embeddings().weight if self.embedded else None
            return Side.teacher(hidden_RUD.to(dtype), head.to(dtype), self.ids_RU, self.group_RU, embedding_VD)


class BridgeStepLoss(StepLoss):
    """`StepLoss` with a `BridgeSignal` and an objective of `cbd_trl.bridge.objectives.registry`.

    One more term is "unaligned": 1 for a token in no group, which nothing of the teacher is compared with. The
    hidden-state term is taken behind the last tokens of groups, where both models have read the same bytes, and is
    written on the first, like "kd".
    """

    def _terms(self, hidden_BTd: Tensor, labels_BT: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        said = self.teacher
        group_BT = said.alignment.student_BT
        embedded = said.teacher.embedding_VD is not None
        embedding_Vd = self.student.get_input_embeddings().weight if embedded else None
        student = Side.student(hidden_BTd, head, said.ids_BT, labels_BT, group_BT, said.text_BT, embedding_Vd)
        total, terms = self.objective(student, said.teacher, self.weights, self.chunk)
        return total, {**terms, "unaligned": (student.group_N == NOWHERE).float()}

    def _hidden(self, labels_BT: Tensor) -> Tensor | None:
        alignment = self.teacher.alignment
        ours_G, theirs_G = alignment.last_tokens()
        hidden_G = self.pairs.distance(
            self.student_states,
            self.teacher_states,
            lambda states: states.flatten(0, 1)[ours_G],
            lambda states: states.flatten(0, 1)[theirs_G],
        )
        if hidden_G is None:
            return None
        return on_first(alignment.student_BT[:, 1:][scored_mask(labels_BT)], hidden_G)
