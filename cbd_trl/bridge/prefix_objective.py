"""The teacher's next-token distribution in the student's tokens: summed by the bytes that its tokens begin with.

Shapes: N positions of the student, of which n are a part; G groups, of which g are looked at; r rows in which a token
of the teacher is under way; V and W vocabulary rows of student and teacher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.prefix_table import NO_NODE, ROOT, PrefixTable
from cbd_trl.bridge.sides import Side, on_first
from cbd_trl.losses.divergences import Divergence, get_divergence, tempered_log_probs
from cbd_trl.losses.fused import default_chunk, fused_terms
from cbd_trl.losses.head import Head
from cbd_trl.losses.objective import Weights
from cbd_trl.losses.reduction import cross_entropy


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
class PrefixSignal:
    """What the teacher says at the student's positions (in the place of a `cbd_trl.losses.signals.Signal`).

    Attributes:
        table: the teacher's tokens by the student's.
        rows: of the student's vocabulary, V.
        temperature: of the teacher's distributions.
        first_GD: the teacher's states that predict the first tokens of groups.
        first_G: these tokens.
        log_G: log-probabilities of the groups.
        single_G: which groups are one token of the teacher, bool.
        whole_G: which are one token of either side, bool.
        head: of the teacher.
        tokens_N: the student's tokens.
        group_N: their groups.
        depth_N: how many of the group's tokens are in front, int64.
        node_N: they, in the table.
        open_N: at the first token of a group, how many of the student's tokens the group in front of it has, if the
            teacher might have gone on within one token there; else 0.
        open_node_N: they, in the table; `NO_NODE` where `open_N` is 0.
    """

    table: PrefixTable
    rows: int
    temperature: float
    first_GD: Tensor
    first_G: Tensor
    log_G: Tensor
    single_G: Tensor
    whole_G: Tensor
    head: Head
    tokens_N: Tensor
    group_N: Tensor
    depth_N: Tensor
    node_N: Tensor
    open_N: Tensor
    open_node_N: Tensor

    @classmethod
    def of(
        cls, student: Side, teacher: Side, table: PrefixTable, temperature: float, chunk: int | None = None
    ) -> "PrefixSignal":
        """Ask the teacher.

        Args:
            student: of the micro-batch.
            teacher: likewise.
            table: the teacher's tokens by the student's.
            temperature: above 0.
            chunk: positions whose logits are held at a time.
        """
        log_G, begins_N = teacher.group_log_probs(chunk), teacher.begins_N
        counts = [torch.bincount(side.group_N[side.group_N != NOWHERE], minlength=len(log_G))
                  for side in (student, teacher)]  # fmt: skip
        single_G = counts[1] == 1
        group_N = student.group_N
        depth_N, node_N = _under_way(table, student)
        behind_N = table.child(node_N, student.targets_N)
        open_N = student.begins_N & (_before(group_N, NOWHERE) != NOWHERE)
        open_N &= (_before(student.place_N, -2) == student.place_N - 1) & (_before(student.text_N, -1) == student.text_N)
        open_N &= single_G[_before(group_N, 0).clamp(min=0)] if len(single_G) else False
        open_node_N = torch.where(open_N, _before(behind_N, NO_NODE), NO_NODE)
        open_N = torch.where(open_node_N != NO_NODE, _before(depth_N, 0) + 1, 0)
        whole_G = single_G | (counts[0] == 1)
        return cls(
            table, student.head.rows, temperature, teacher.hidden_ND[begins_N].detach(), teacher.targets_N[begins_N],
            log_G, single_G, whole_G, teacher.head, student.targets_N, group_N, depth_N, node_N, open_N, open_node_N,
        )  # fmt: skip

    @torch.no_grad()
    def at(self, part: slice) -> PrefixSaid:
        """The statement on a part of the student's positions."""
        group_n = self.group_N[part]
        device = group_n.device
        target_nV = torch.zeros(len(group_n), self.rows, device=device)
        inside_n = group_n != NOWHERE
        if inside_n.any():
            least = max(int(group_n[inside_n].min()) - 1, 0)
            most = int(group_n.max()) + 1
            logits_gW = self.head.logits(self.first_GD[least:most])
            log_gW = tempered_log_probs(logits_gW, self.temperature)
            self._fill(target_nV, part, log_gW, logits_gW, least)
        ce_N = on_first(self.group_N, -self.log_G) if len(self.log_G) else torch.zeros(len(self.group_N), device=device)
        return PrefixSaid(target_nV, ce_N[part])

    def _fill(self, target_nV: Tensor, part: slice, log_gW: Tensor, logits_gW: Tensor, least: int) -> None:
        group_n, depth_n, tokens_n = self.group_N[part], self.depth_N[part], self.tokens_N[part]
        usable_n = (group_n != NOWHERE) & self.whole_G[group_n.clamp(min=0)]
        p_gW = log_gW.exp()
        # Where a token of the teacher begins.
        first_n = (usable_n & (depth_n == 0)).nonzero().flatten()
        groups_f = group_n[first_n]
        begin_fV = self.table.first_tokens(p_gW[groups_f - least], self.rows)
        # One token of the student's for several of the teacher's.
        joined_f = ~self.single_G[groups_f]
        if joined_f.any():
            groups_j = groups_f[joined_f]
            first_j = self.first_G[groups_j]
            log_first_j = logits_gW[groups_j - least].float().log_softmax(-1).gather(1, first_j[:, None])[:, 0]
            share_j = (self.log_G[groups_j] - log_first_j).exp().clamp(max=1.0)
            moved_j = share_j * p_gW[groups_j - least, first_j]
            node_first = self.table.first_of(first_j)
            known_j = node_first != NO_NODE
            rows_j = joined_f.nonzero().flatten()
            begin_fV[rows_j[known_j], node_first[known_j]] -= moved_j[known_j]
            begin_fV[rows_j, tokens_n[first_n][joined_f]] += moved_j
            begin_fV.clamp_(min=0.0)
        open_f = self.open_node_N[part][first_n] != NO_NODE
        if open_f.any():
            nodes_r, depths_r = self.open_node_N[part][first_n][open_f], self.open_N[part][first_n][open_f]
            going_rV, whole_r = self.table.continued(
                p_gW, groups_f[open_f] - 1 - least, nodes_r, depths_r, self.rows
            )
            total_r = (going_rV.sum(-1) + whole_r).clamp(min=torch.finfo(torch.float32).tiny)
            begin_fV[open_f] = begin_fV[open_f] * (whole_r / total_r)[:, None] + going_rV / total_r[:, None]
        target_nV[first_n] = begin_fV
        # Within a token of the teacher.
        inner_n = usable_n & (depth_n > 0) & (self.node_N[part] != NO_NODE)
        rows_r = inner_n.nonzero().flatten()
        if len(rows_r):
            going_rV, whole_r = self.table.continued(
                p_gW, group_n[rows_r] - least, self.node_N[part][rows_r], depth_n[rows_r], self.rows
            )
            total_r = (going_rV.sum(-1) + whole_r).clamp(min=torch.finfo(torch.float32).tiny)
            target_nV[rows_r] = going_rV / total_r[:, None]


def _before(values_N: Tensor, first: int) -> Tensor:
    return torch.cat([values_N.new_full((1,), first), values_N])[:-1]


def _under_way(table: PrefixTable, student: Side) -> tuple[Tensor, Tensor]:
    """Of each position, how many tokens of its group are in front, and their node."""
    group_N, begins_N = student.group_N, student.begins_N
    inside_N = group_N != NOWHERE
    places_N = torch.arange(len(group_N), device=group_N.device)
    start_N = torch.where(begins_N, places_N, 0).cummax(0).values
    depth_N = torch.where(inside_N, places_N - start_N, 0)
    node_N = torch.where(inside_N, ROOT, NO_NODE)
    for depth in range(1, int(depth_N.max()) + 1 if len(depth_N) else 1):
        at_r = (depth_N == depth).nonzero().flatten()
        node_N[at_r] = table.child(node_N[at_r - 1], student.targets_N[at_r - 1])
    return depth_N, node_N


@dataclass(frozen=True)
class PrefixObjective:
    """A divergence at every position at which the teacher's tokens tell what the student's next one is.

    Where both have a token's end, the teacher's distribution is summed by the first of the student's tokens that spell
    each of its own, p(v) = sum of p(t) over t that begin with v. Within a token of the teacher the sum is over
    tokens that begin with what the student has already said of it. Where a token ends that others begin with (" run",
    " running"), both are weighed by what the teacher said one token before. One token of the student for several of
    the teacher has the probability of the group. What stays unknown (that a token ends here, and what follows, where
    the text goes on within it; tokens that the student cannot spell) is left to the student: its share of the
    distribution is taken out of both and of the weight. Groups of several tokens on both sides say nothing.

    After the conversion of token to character probabilities by sums over covers (Vieira et al. 2024, arXiv
    2412.03719; Phan et al. 2024, arXiv 2410.09303), with the covers of one token of the teacher and, for the step
    from one to the next, two. With one vocabulary it is the divergence itself.

    Attributes:
        table: the teacher's tokens by the student's.
        divergence: between distributions over the student's tokens.
        temperature: T, of both sides, above 0.
    """

    table: PrefixTable
    divergence: Divergence = get_divergence("forward_kl")  # noqa: RUF009
    temperature: float = 1.0

    def terms(
        self, student_NV: Tensor, teacher: PrefixSaid, targets_N: Tensor, weights: Weights
    ) -> dict[str, Tensor]:
        """See `cbd_trl.losses.objective.LogitObjective`."""
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and weights.ce > 0):
            ce_N = cross_entropy(student_NV, targets_N)
        with torch.set_grad_enabled(grad and weights.kd > 0):
            known_N = teacher.target_nV.sum(-1)
            some_N = known_N > 0
            log_NV = teacher.target_nV.log() - torch.where(some_N, known_N, 1.0).log()[:, None]
            student_log_NV = tempered_log_probs(student_NV, self.temperature)
            log_NV = torch.where(some_N[:, None], log_NV, student_log_NV.detach())
            kd_N = known_N * self.divergence(student_log_NV, log_NV)
        return {"kd": kd_N * self.temperature**self.divergence.temperature_power, "ce": ce_N,
                "teacher_ce": teacher.teacher_ce_n}  # fmt: skip

    def __call__(
        self, student: Side, teacher: Side, weights: Weights, chunk: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, as `GroupObjective` has it; "kd" is a value of each position.

        Args:
            student: its scored positions.
            teacher: of the same texts.
            weights: of the terms at this step.
            chunk: positions at a time; None to choose by the larger vocabulary.
        """
        chunk = chunk or default_chunk(max(student.head.rows, teacher.head.rows), student.hidden_ND.device)
        signal = PrefixSignal.of(student, teacher, self.table, self.temperature, chunk)
        return fused_terms(student.hidden_ND, student.head, student.targets_N, signal, self, weights, chunk)
