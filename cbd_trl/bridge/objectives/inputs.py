"""Inputs of objectives across vocabularies, and the chunked loss that all of them use.

`AlignedStates` holds, for one model, the states that predict tokens and the groups of those tokens. Position t
predicts token t + 1, so the state of a token is the one before it. At the first token of a group both models have read
the same bytes: there their next-token distributions can be compared.

Shapes: N positions of a micro-batch, of which n are one chunk; D width, V vocabulary rows, B x T a batch, G groups.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.losses.fused import default_chunk, fused_terms
from cbd_trl.losses.objective import LogitObjective, TermWeights
from cbd_trl.losses.reduction import Scored, cross_entropy
from cbd_trl.losses.teacher_outputs import AnyTeacherOutputs
from cbd_trl.utils.blocks import IGNORE_INDEX


@dataclass(frozen=True)
class Vectors:
    """Named vectors of indices in one tensor, which goes to the device in one copy.

    Attributes:
        packed_K: all of them end to end, int64.
        lengths: of each, in their order.
    """

    packed_K: Tensor
    lengths: Mapping[str, int]

    @classmethod
    def of(cls, **vectors: Tensor) -> "Vectors":
        """Pack vectors, (n,) int64 each."""
        return cls(torch.cat([*vectors.values()]), {name: len(vector) for name, vector in vectors.items()})

    def __getitem__(self, name: str) -> Tensor:
        parts = self.packed_K.split([*self.lengths.values()])
        return parts[[*self.lengths].index(name)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Vectors":
        """Move them to a device, as a tensor."""
        return Vectors(self.packed_K.to(device, non_blocking=non_blocking), self.lengths)

    def pin_memory(self) -> "Vectors":
        """Pin them, as a tensor."""
        return Vectors(self.packed_K.pin_memory(), self.lengths)


@dataclass(frozen=True)
class Places:
    """The positions of one model in a micro-batch that count, and the groups of the tokens that they predict.

    Made on the host, by the data collator: what is a number here would be a wait for the device if it were made there.

    Attributes:
        vectors: where the model is: "index", the positions in the flattened batch, increasing, (N,); "group" of the
            token that follows, `NOWHERE` for none, else never decreasing, (N,); "start", which of the N positions are
            the first of a group, in the order of the groups, (G,).
        starts: the same as "start".
        cuts: which of the N positions a chunk may begin at without cutting a group in two, the first of them 0.
        text_N: the index of the text, int64, on the host.
    """

    vectors: Vectors
    starts: list[int]
    cuts: list[int]
    text_N: Tensor

    @classmethod
    def of_student(cls, labels_BT: Tensor, group_BT: Tensor, text_BT: Tensor) -> "Places":
        """Take every scored position of the student, in a group or not; what is on a device is copied from there.

        Args:
            labels_BT: token ids, -100 where the token is not scored, not shifted.
            group_BT: `Alignment.student_BT`.
            text_BT: `StudentRows.text_BT`.
        """
        scored = Scored.of(labels_BT.cpu())
        group_N = scored.select_next(group_BT.cpu())
        start_G = group_starts(group_N).nonzero().flatten()
        vectors = Vectors.of(index=scored.index_N, group=group_N, start=start_G)
        return cls(vectors, start_G.tolist(), _cuts(group_N), scored.select_next(text_BT.cpu()))

    @classmethod
    def of_teacher(cls, group_RU: Tensor) -> "Places":
        """Take the positions of the teacher before tokens of groups; each row is one text.

        Args:
            group_RU: `Alignment.teacher_RU`.
        """
        labels_RU = torch.where(group_RU == NOWHERE, IGNORE_INDEX, group_RU)
        text_RU = torch.arange(len(group_RU))[:, None].expand_as(group_RU)
        return cls.of_student(labels_RU, group_RU, text_RU)

    def __len__(self) -> int:
        return self.vectors.lengths["index"]

    @property
    def groups(self) -> int:
        """Number of groups, G."""
        return len(self.starts)

    @property
    def scored(self) -> Scored:
        """The positions."""
        return Scored(self.vectors["index"])

    @property
    def group_N(self) -> Tensor:
        """The group of the token that follows each."""
        return self.vectors["group"]

    @property
    def start_G(self) -> Tensor:
        """Which of the N positions are the first of a group."""
        return self.vectors["start"]

    def groups_of(self, part: slice) -> slice:
        """Find the groups that begin in a part of the positions."""
        return slice(bisect_left(self.starts, part.start), bisect_left(self.starts, part.stop))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Places":
        """Move the vectors to a device."""
        return replace(self, vectors=self.vectors.to(device, non_blocking))

    def pin_memory(self) -> "Places":
        """Pin the vectors."""
        return replace(self, vectors=self.vectors.pin_memory())


@dataclass(frozen=True)
class AlignedStates:
    """The states of one model at N positions of a micro-batch, in its order, and the tokens that they predict.

    Attributes:
        hidden_ND: last hidden states, (N, D).
        head: of the model.
        inputs_N: the token read at the position, int64.
        targets_N: the token that follows, int64.
        places: the positions and their groups.
        embedding_VD: input embeddings, (V, D), for the objectives that read them.
        plan: what the data collator prepared for the objective, if it has such a thing.
    """

    hidden_ND: Tensor
    head: Head
    inputs_N: Tensor
    targets_N: Tensor
    places: Places
    embedding_VD: Tensor | None = None
    plan: Any = None

    @classmethod
    def of(
        cls,
        hidden_BTD: Tensor,
        head: Head,
        ids_BT: Tensor,
        places: Places,
        embedding_VD: Tensor | None = None,
        plan: Any = None,
    ) -> "AlignedStates":
        """Select the states of a model.

        Args:
            hidden_BTD: last hidden states, (B, T, D).
            head: of the model.
            ids_BT: token ids, int64.
            places: its positions that count.
            embedding_VD: input embeddings, for "dskd-cma".
            plan: of the data collator, for "prefix".
        """
        places, ids_BT = places.to(hidden_BTD.device), ids_BT.to(hidden_BTD.device)
        scored = places.scored
        inputs_N, targets_N = scored.select(ids_BT), scored.select_next(ids_BT)
        return cls(scored.select(hidden_BTD), head, inputs_N, targets_N, places, embedding_VD, plan)

    def group_log_probs(self, chunk: int | None = None) -> Tensor:
        """Compute the log-probability of each group, the sum over its tokens, without gradient.

        Args:
            chunk: positions whose logits are held at a time.

        Returns:
            (G,) float32, nats.
        """
        with torch.no_grad():
            return self.group_sums(-chunked_cross_entropy(self.hidden_ND, self.head, self.targets_N, chunk))

    def group_sums(self, values_N: Tensor) -> Tensor:
        """Sum over the tokens of each group, (N,) to (G,)."""
        return group_sums(values_N, self.places.group_N, slice(0, self.places.groups))

    def at_group_starts(self, values_G: Tensor) -> Tensor:
        """Put the value of each group on its first token, and 0 on all other positions, (G,) to (N,)."""
        return values_G.new_zeros(len(self.places)).index_add(0, self.places.start_G, values_G)


def group_starts(group_N: Tensor) -> Tensor:
    """Flag the tokens that are the first of a group, (N,) bool.

    Args:
        group_N: whole groups in order, `NOWHERE` for tokens in none.
    """
    # A token in none may stand between two of a group.
    highest_N = torch.cat([group_N.new_full((1,), NOWHERE), group_N])[:-1].cummax(0).values
    return group_N > highest_N


def group_sums(values_n: Tensor, group_n: Tensor, groups: slice) -> Tensor:
    """Sum over the tokens of each group, in which none is another one's.

    Args:
        values_n: of each position.
        group_n: the group of each, `NOWHERE` for none.
        groups: the numbers of all that there are.

    Returns:
        (g,) in the dtype of the values.
    """
    count = groups.stop - groups.start
    sums = values_n.new_zeros(count + 1)
    return sums.index_add(0, torch.where(group_n == NOWHERE, count, group_n - groups.start), values_n)[:count]


def _cuts(group_N: Tensor) -> list[int]:
    before_N = torch.cat([group_N.new_full((1,), NOWHERE), group_N])[:-1].cummax(0).values
    # After the last group there is none to cut.
    after_N = group_N.masked_fill(group_N == NOWHERE, torch.iinfo(group_N.dtype).max)
    after_N = after_N.flip(0).cummin(0).values.flip(0)
    return (before_N < after_N).nonzero().flatten().tolist()


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
