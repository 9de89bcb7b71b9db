"""The base of objectives that compare groups of tokens, the teacher's outputs for groups, and mixtures.

Shapes: N positions of the student, of which n are a part; G groups, of which g begin in a part; D teacher width,
V and W vocabulary rows of student and teacher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.objectives.inputs import AlignedStates, Places, chunked_loss, compared_terms, group_sums
from cbd_trl.losses.objective import TermWeights


@dataclass(frozen=True)
class GroupPrediction:
    """The teacher's prediction for the groups of a part of the student's positions.

    Attributes:
        places: of the student, in the whole micro-batch.
        part: which of its positions these are; whole groups.
        log_prob_g: log-probabilities of the groups in nats, each the sum of those of the teacher's tokens.
        logits_gW: the teacher's on the first token of each group, float32; None where the objective reads none.
    """

    places: Places
    part: slice
    log_prob_g: Tensor
    logits_gW: Tensor | None

    @property
    def start_g(self) -> Tensor:
        """Which of the n positions are the first of a group, (g,) int64."""
        return self.places.start_G[self.places.groups_of(self.part)] - self.part.start

    def rows(self, rows: slice) -> "GroupPrediction":
        """Select some of the positions, whole groups."""
        part = slice(self.part.start + rows.start, self.part.start + rows.stop)
        first, kept = self.places.groups_of(self.part).start, self.places.groups_of(part)
        kept = slice(kept.start - first, kept.stop - first)
        logits_gW = None if self.logits_gW is None else self.logits_gW[kept]
        return GroupPrediction(self.places, part, self.log_prob_g[kept], logits_gW)

    def sums(self, values_n: Tensor) -> Tensor:
        """Sum over the tokens of each group, (n,) to (g,)."""
        return group_sums(values_n, self.places.group_N[self.part], self.places.groups_of(self.part))

    def at_group_starts(self, values_g: Tensor) -> Tensor:
        """Put the value of each group on its first token, and 0 on all other positions, (g,) to (n,)."""
        return values_g.new_zeros(self.part.stop - self.part.start).index_add(0, self.start_g, values_g)


@dataclass(frozen=True)
class GroupOutputs:
    """The teacher's outputs for the groups of a micro-batch, see `cbd_trl.losses.teacher_outputs.AnyTeacherOutputs`.

    Attributes:
        places: of the student.
        log_prob_G: log-probabilities of the groups, nats.
        first_GD: the teacher's states that predict their first tokens; None where no logits are needed.
        head: of the teacher.
    """

    places: Places
    log_prob_G: Tensor
    first_GD: Tensor | None
    head: Head

    @classmethod
    def of(
        cls, student: AlignedStates, teacher: AlignedStates, needs_logits: bool, chunk: int | None = None
    ) -> "GroupOutputs":
        """Compute the outputs of the teacher.

        Args:
            student: of the micro-batch.
            teacher: likewise.
            needs_logits: whether the objective reads the teacher's logits.
            chunk: positions whose logits are held at a time.
        """
        first_GD = teacher.hidden_ND.detach()[teacher.places.start_G] if needs_logits else None
        return cls(student.places, teacher.group_log_probs(chunk), first_GD, teacher.head)

    def at(self, part: slice) -> GroupPrediction:
        """Compute the prediction for a part of the student's positions."""
        groups, logits_gW = self.places.groups_of(part), None
        if self.first_GD is not None:
            with torch.no_grad():
                logits_gW = self.head.logits(self.first_GD[groups])
        return GroupPrediction(self.places, part, self.log_prob_G[groups], logits_gW)


class GroupObjective:
    """An objective that compares groups of tokens: a subclass defines `compare`.

    The value of a group is put on the first of the student's tokens in it, so that sums over positions are sums over
    groups, however the batch is cut.
    """

    @property
    def needs_logits(self) -> bool:
        """Whether it reads the teacher's logits on the first tokens of groups."""
        return True

    def compare(self, student_nV: Tensor, token_log_prob_n: Tensor, teacher: GroupPrediction) -> Tensor:
        """Compare a part of the positions, whole groups.

        Args:
            student_nV: the student's logits, (n, V) float32.
            token_log_prob_n: log-probabilities of its tokens, (n,), nats.
            teacher: its prediction for these groups.

        Returns:
            (g,) float32, at least 0.
        """
        raise NotImplementedError

    def terms(
        self, student_NV: Tensor, teacher: GroupPrediction, targets_N: Tensor, weights: TermWeights
    ) -> dict[str, Tensor]:
        """See `cbd_trl.losses.objective.LogitObjective`; "teacher_ce" is of whole groups, on their first token."""
        return compared_terms(
            student_NV,
            targets_N,
            teacher.at_group_starts(-teacher.log_prob_g),
            weights,
            lambda token_log_prob_N: teacher.at_group_starts(self.compare(student_NV, token_log_prob_N, teacher)),
        )

    def __call__(
        self, student: AlignedStates, teacher: AlignedStates, weights: TermWeights, chunk: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch while holding one chunk of both models' logits at a time.

        Args:
            student: its scored positions.
            teacher: of the same texts.
            weights: of the terms at this step.
            chunk: positions at a time, rounded to whole groups; None to choose by the larger vocabulary.

        Returns:
            the weighted sum of the terms (scalar float32, differentiable once), and each of them, (N,) without
            gradient: "kd" and "teacher_ce" have one value for each group, on its first token; "ce" has one everywhere.
        """

        def outputs(chunk: int) -> GroupOutputs:
            return GroupOutputs.of(student, teacher, self.needs_logits, chunk)

        return chunked_loss(student, teacher, outputs, self, weights, chunk, student.places.cuts)


@dataclass(frozen=True)
class Mixture(GroupObjective):
    """A weighted sum of objectives, in one pass.

    Attributes:
        parts: a weight and an objective each.
    """

    parts: tuple[tuple[float, GroupObjective], ...]

    @property
    def needs_logits(self) -> bool:
        """See `GroupObjective`."""
        return any(objective.needs_logits for _, objective in self.parts)

    def compare(self, student_nV: Tensor, token_log_prob_n: Tensor, teacher: GroupPrediction) -> Tensor:
        """See `GroupObjective`."""
        values = [
            weight * objective.compare(student_nV, token_log_prob_n, teacher) for weight, objective in self.parts
        ]
        return torch.stack(values).sum(0)
