"""What a teacher says of the student's next token, where its own tokens tell.

Shapes: N positions of the student, of which n are a part; G groups, of which g are looked at, b begin in the part and
j are one token of the student for several of the teacher; r rows in which a token of the teacher is under way; V and W
vocabulary rows of student and teacher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.objectives.inputs import Side, on_first
from cbd_trl.bridge.objectives.prefix_table import NO_NODE, ROOT, PrefixTable
from cbd_trl.losses.divergences import tempered_log_probs


@dataclass(frozen=True)
class PrefixSaid:
    """What the teacher says at a part of the student's positions.

    Attributes:
        target_nV: probabilities of the student's tokens as far as they are known; their sum is at most 1.
        teacher_ce_n: what a group costs the teacher, on its first token, nats.
    """

    target_nV: Tensor
    teacher_ce_n: Tensor

    def rows(self, rows: slice) -> "PrefixSaid":
        """What is said at some of the positions."""
        return PrefixSaid(self.target_nV[rows], self.teacher_ce_n[rows])


@dataclass(frozen=True)
class _UnderWay:
    """For each position a token of the teacher that may not be at its end there: of which group it is the first, what
    the student has said of it (`NO_NODE`: none is), and in how many tokens; (N,) each."""

    group_N: Tensor
    node_N: Tensor
    depth_N: Tensor


@dataclass(frozen=True)
class PrefixSignal:
    """What the teacher says at the student's positions (in the place of a `cbd_trl.losses.teacher_outputs.Signal`).

    Attributes:
        table: the teacher's tokens by the student's.
        temperature: of the teacher's distributions.
        student, teacher: of the micro-batch.
        log_G: log-probabilities of the groups.
        single_G: which groups are one token of the teacher, bool.
        told_N: which positions are in a group that is one token of either side, bool.
        under_way: see there.
    """

    table: PrefixTable
    temperature: float
    student: Side
    teacher: Side
    log_G: Tensor
    single_G: Tensor
    told_N: Tensor
    under_way: _UnderWay

    @classmethod
    def of(
        cls, student: Side, teacher: Side, table: PrefixTable, temperature: float, chunk: int | None = None
    ) -> "PrefixSignal":
        """Ask the teacher.

        Args:
            student: of the micro-batch.
            teacher: likewise.
            table: the teacher's tokens by the student's; moved here where it is on another device than the batch.
            temperature: above 0.
            chunk: positions whose logits are held at a time.
        """
        table = table.to(student.hidden_ND.device)
        log_G, group_N = teacher.group_log_probs(chunk), student.group_N
        one_G, single_G = (_counts(side, len(log_G)) == 1 for side in (student, teacher))
        told_N = group_N != NOWHERE
        told_N = told_N.masked_scatter(told_N, (single_G | one_G)[group_N[told_N]])
        under_way = _under_way(student, single_G, table)
        return cls(table, temperature, student, teacher, log_G, single_G, told_N, under_way)

    @torch.no_grad()
    def at(self, part: slice) -> PrefixSaid:
        """The statement on a part of the student's positions."""
        group_n, told_n, under_way = self.student.group_N[part], self.told_N[part], self.under_way
        target_nV = self.log_G.new_zeros(len(group_n), self.student.head.rows)
        teacher_ce_n = on_first(self.student.group_N, -self.log_G)[part]
        if not told_n.any():
            return PrefixSaid(target_nV, teacher_ce_n)
        # A token of the teacher may be under way since the group in front of the part.
        least, most = max(int(group_n[told_n].min()) - 1, 0), int(group_n.max()) + 1
        logits_gW = self.teacher.head.logits(self.teacher.hidden_ND[self.teacher.begins_N][least:most])
        p_gW = tempered_log_probs(logits_gW, self.temperature).exp()
        begins_n, whole_n, total_n = (told_n & self.student.begins_N[part]), *target_nV.new_ones(2, len(group_n))
        asked_n = told_n & (under_way.node_N[part] != NO_NODE)
        going_rV, whole_r = self.table.continued(
            p_gW, under_way.group_N[part][asked_n] - least, under_way.node_N[part][asked_n],
            under_way.depth_N[part][asked_n], self.student.head.rows,
        )  # fmt: skip
        whole_n[asked_n], total_n[asked_n] = whole_r, going_rV.sum(-1) + whole_r
        target_nV[begins_n] = self._beginnings(part, begins_n, logits_gW, p_gW, least) * whole_n[begins_n, None]
        target_nV[asked_n] += going_rV
        return PrefixSaid(target_nV / total_n.clamp(min=torch.finfo(torch.float32).tiny)[:, None], teacher_ce_n)

    def _beginnings(self, part: slice, begins_n: Tensor, logits_gW: Tensor, p_gW: Tensor, least: int) -> Tensor:
        """Of positions at which a token of the teacher begins, (b, V)."""
        groups_b, tokens_b = self.student.group_N[part][begins_n], self.student.targets_N[part][begins_n]
        sums_bV = self.table.first_tokens(p_gW[groups_b - least], self.student.head.rows)
        joined_b = ~self.single_G[groups_b]
        groups_j, rows_j = groups_b[joined_b], joined_b.nonzero().flatten()
        first_j = self.teacher.targets_N[self.teacher.begins_N][groups_j]
        log_first_j = logits_gW[groups_j - least].float().log_softmax(-1).gather(1, first_j[:, None])[:, 0]
        # The share of the first token's probability that goes on to the whole group is the student's token.
        moved_j = (self.log_G[groups_j] - log_first_j).exp().clamp(max=1.0) * p_gW[groups_j - least, first_j]
        own_j = self.table.first_of(first_j)
        spelled_j = own_j != NO_NODE
        sums_bV[rows_j[spelled_j], own_j[spelled_j]] -= moved_j[spelled_j]
        sums_bV[rows_j, tokens_b[joined_b]] += moved_j
        return sums_bV.clamp(min=0.0)


def _counts(side: Side, groups: int) -> Tensor:
    return torch.bincount(side.group_N[side.group_N != NOWHERE], minlength=groups)


def _before(values_N: Tensor, first: int) -> Tensor:
    return torch.cat([values_N.new_full((1,), first), values_N])[:-1]


def _under_way(student: Side, single_G: Tensor, table: PrefixTable) -> _UnderWay:
    """Within a group its own first token; where a group begins the one token of the group in front, if the text goes
    on: the teacher could have gone on with a longer one."""
    group_N, begins_N = student.group_N, student.begins_N
    places_N = torch.arange(len(group_N), device=group_N.device)
    inside_N = group_N != NOWHERE
    depth_N = torch.where(inside_N, places_N - torch.where(begins_N, places_N, 0).cummax(0).values, 0)
    node_N = torch.where(inside_N, ROOT, NO_NODE)
    for depth in range(1, int(depth_N.max()) + 1 if len(depth_N) else 1):
        at_r = (depth_N == depth).nonzero().flatten()
        node_N[at_r] = table.child(node_N[at_r - 1], student.targets_N[at_r - 1])
    before_N = _before(group_N, NOWHERE)
    follows_N = begins_N & (before_N != NOWHERE)
    follows_N &= _before(student.place_N, NOWHERE) == student.place_N - 1
    follows_N &= _before(student.text_N, NOWHERE) == student.text_N
    follows_N = follows_N.masked_scatter(follows_N, single_G[before_N[follows_N]])
    behind_N = _before(table.child(node_N, student.targets_N), NO_NODE)
    return _UnderWay(
        torch.where(begins_N, before_N, group_N),
        torch.where(follows_N, behind_N, torch.where(begins_N, NO_NODE, node_N)),
        torch.where(begins_N, _before(depth_N, 0) + 1, depth_N),
    )
