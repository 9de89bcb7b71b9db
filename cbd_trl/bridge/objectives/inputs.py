"""Inputs of objectives across vocabularies, and the chunked loss that all of them use.

`AlignedStates` holds, for one model, the states that predict tokens and the groups of those tokens. Position t
predicts token t + 1, so the state of a token is the one before it. At the first token of a group both models have read
the same bytes: there their next-token distributions can be compared.

Shapes: N positions of a micro-batch, of which n are one chunk; D width, V vocabulary rows, B x T a batch, G groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.losses.fused import default_chunk, fused_terms
from cbd_trl.losses.objective import LogitObjective, TermWeights
from cbd_trl.losses.reduction import cross_entropy, scored_mask, scored_targets, select_scored
from cbd_trl.losses.teacher_outputs import AnyTeacherOutputs
from cbd_trl.utils.blocks import IGNORE_INDEX


@dataclass(frozen=True)
class AlignedStates:
    """The states of one model at N positions of a micro-batch, in its order, and the tokens that they predict.

    Attributes:
        hidden_ND: last hidden states, (N, D).
        head: of the model.
        inputs_N: the token read at the position, int64.
        targets_N: the token that follows, int64.
        group_N: the group of that token, int64; `NOWHERE` for none, else never decreasing.
        text_N: the index of its text, int64.
        position_N: its index in the flattened batch, int64.
        embedding_VD: input embeddings, (V, D), for the objectives that read them.
    """

    hidden_ND: Tensor
    head: Head
    inputs_N: Tensor
    targets_N: Tensor
    group_N: Tensor
    text_N: Tensor
    position_N: Tensor
    embedding_VD: Tensor | None = None

    @classmethod
    def of_student(
        cls,
        hidden_BTD: Tensor,
        head: Head,
        ids_BT: Tensor,
        labels_BT: Tensor,
        group_BT: Tensor,
        text_BT: Tensor,
        embedding_VD: Tensor | None = None,
    ) -> "AlignedStates":
        """Select the student's states at every scored position, in a group or not.

        Args:
            hidden_BTD: last hidden states, (B, T, D).
            head: of the model.
            ids_BT: token ids, int64.
            labels_BT: the same, -100 where the token is not scored, not shifted.
            group_BT: `Alignment.student_BT`.
            text_BT: `StudentRows.text_BT`.
            embedding_VD: input embeddings, for "dskd-cma".
        """
        scored_BT = scored_mask(labels_BT)
        position_BT = torch.arange(ids_BT.numel(), device=ids_BT.device).view_as(ids_BT)
        return cls(
            select_scored(hidden_BTD, labels_BT), head, ids_BT[:, :-1][scored_BT], scored_targets(labels_BT),
            group_BT[:, 1:][scored_BT], text_BT[:, 1:][scored_BT], position_BT[:, 1:][scored_BT], embedding_VD,
        )  # fmt: skip

    @classmethod
    def of_teacher(
        cls, hidden_RUD: Tensor, head: Head, ids_RU: Tensor, group_RU: Tensor, embedding_VD: Tensor | None = None
    ) -> "AlignedStates":
        """Select the teacher's states before tokens of groups; each row is one text.

        Args:
            hidden_RUD: last hidden states, (R, U, D).
            head: of the model.
            ids_RU: `TeacherRows.ids_RU`.
            group_RU: `Alignment.teacher_RU`.
            embedding_VD: input embeddings, for "dskd-cma".
        """
        labels_RU = ids_RU.masked_fill(group_RU == NOWHERE, IGNORE_INDEX)
        text_RU = torch.arange(len(ids_RU), device=ids_RU.device)[:, None].expand_as(ids_RU)
        return cls.of_student(hidden_RUD, head, ids_RU, labels_RU, group_RU, text_RU, embedding_VD)

    @property
    def group_start_N(self) -> Tensor:
        """Flags of the tokens that are the first of a group, (N,) bool."""
        return group_starts(self.group_N)

    def group_log_probs(self, chunk: int | None = None) -> Tensor:
        """Compute the log-probability of each group, the sum over its tokens, without gradient.

        Args:
            chunk: positions whose logits are held at a time.

        Returns:
            (G,) float32, nats; G is the last group's number plus one.
        """
        with torch.no_grad():
            return self.group_sums(-chunked_cross_entropy(self.hidden_ND, self.head, self.targets_N, chunk))

    def group_sums(self, values_N: Tensor) -> Tensor:
        """Sum over the tokens of each group, (N,) to (G,) by the group's number."""
        inside_N = self.group_N != NOWHERE
        groups = int(self.group_N.max()) + 1 if len(self.group_N) else 0
        return values_N.new_zeros(groups).index_add(0, self.group_N[inside_N], values_N[inside_N])

    def chunk_starts(self) -> list[int]:
        """List the positions at which a chunk may begin without cutting a group in two, the first of them 0."""
        group_N = self.group_N
        before_N = torch.cat([group_N.new_full((1,), NOWHERE), group_N])[:-1].cummax(0).values
        # After the last group there is none to cut.
        after_N = group_N.masked_fill(group_N == NOWHERE, torch.iinfo(group_N.dtype).max)
        after_N = after_N.flip(0).cummin(0).values.flip(0)
        return (before_N < after_N).nonzero().flatten().tolist()


def group_starts(group_N: Tensor) -> Tensor:
    """Flag the tokens that are the first of a group, (N,) bool.

    Args:
        group_N: whole groups in order, `NOWHERE` for tokens in none.
    """
    inside_N = group_N != NOWHERE
    grouped_M = group_N[inside_N]
    first_M = torch.ones_like(grouped_M, dtype=torch.bool)
    first_M[1:] = grouped_M[1:] != grouped_M[:-1]
    return inside_N.masked_scatter(inside_N, first_M)


def at_group_starts(group_N: Tensor, values_G: Tensor) -> Tensor:
    """Put the value of each group on its first token, and 0 on all other positions.

    Args:
        group_N: the group of each position.
        values_G: by the number of the group, float32.

    Returns:
        (N,).
    """
    group_start_N = group_starts(group_N)
    return values_G.new_zeros(len(group_N)).masked_scatter(group_start_N, values_G[group_N[group_start_N]])


def chunked_cross_entropy(hidden_ND: Tensor, head: Head, targets_N: Tensor, chunk: int | None = None) -> Tensor:
    """Compute the per-token cross-entropy chunk by chunk; the backward pass computes each chunk's logits again.

    Args:
        hidden_ND: last hidden states, (N, D); the product is taken in their dtype.
        head: of the model.
        targets_N: token ids, (N,).
        chunk: tokens at a time; None for `default_chunk`.

    Returns:
        (N,) float32, nats.
    """
    size = chunk or default_chunk(head.rows, hidden_ND.device)

    def part(hidden_nD: Tensor, targets_n: Tensor) -> Tensor:
        return cross_entropy(head.logits(hidden_nD), targets_n)

    parts = zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return torch.cat(
            [checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False) for arguments in parts]
        )


def chunked_loss(
    student: AlignedStates,
    teacher: AlignedStates,
    outputs: Callable[[int], AnyTeacherOutputs],
    objective: LogitObjective,
    weights: TermWeights,
    chunk: int | None = None,
    starts: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of a micro-batch while holding one chunk of both models' logits at a time.

    Args:
        student: its scored positions.
        teacher: of the same texts.
        outputs: makes the teacher's outputs, holding logits of so many positions at a time.
        objective: computes the terms from the student's logits and a part of these outputs.
        weights: of the terms at this step.
        chunk: positions at a time; None to choose by the larger vocabulary.
        starts: where a chunk may begin, see `fused_terms`.

    Returns:
        as `fused_terms`: the weighted sum, and each term per token.
    """
    chunk = common_chunk(student, teacher, chunk)
    return fused_terms(
        student.hidden_ND, student.head, student.targets_N, outputs(chunk), objective, weights, chunk, starts
    )


def common_chunk(student: AlignedStates, teacher: AlignedStates, chunk: int | None = None) -> int:
    """Choose how many positions' logits are held at a time: `chunk`, or as many as suit the larger vocabulary."""
    return chunk or default_chunk(max(student.head.rows, teacher.head.rows), student.hidden_ND.device)


def compared_terms(
    student_nV: Tensor,
    targets_n: Tensor,
    teacher_ce_n: Tensor,
    weights: TermWeights,
    compare: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Compute the terms of one chunk, see `cbd_trl.losses.objective.LogitObjective`.

    A term of weight 0 is computed without gradient, because it is logged all the same.

    Args:
        student_nV: the student's logits, (n, V) float32.
        targets_n: token ids.
        teacher_ce_n: the teacher's cross-entropy, nats.
        weights: of this step.
        compare: computes "kd" at each position from the student's log-probabilities of its tokens, (n,) both.

    Returns:
        {"kd", "ce", "teacher_ce"}: (n,) float32 each.
    """
    grad = torch.is_grad_enabled()
    with torch.set_grad_enabled(grad and (weights.kd > 0 or weights.ce > 0)):
        ce_n = cross_entropy(student_nV, targets_n)
    with torch.set_grad_enabled(grad and weights.kd > 0):
        kd_n = compare(-ce_n)
    return {"kd": kd_n, "ce": ce_n, "teacher_ce": teacher_ce_n}
