"""The teacher's distribution converted to the student's tokens, position by position, and a divergence from it.

`PrefixTable` is a prefix tree of the teacher's tokens, spelled in the student's tokens. `PrefixOutputs` sums the
teacher's probabilities along it, which gives a `PrefixPrediction` over the student's vocabulary at a part of the
positions, and `PrefixObjective` compares the student with it.

Shapes: N positions of the student, of which n are a part; G groups, of which g are read, b begin in the part and j are
one token of the student for several of the teacher; r positions within an open token of the teacher (one that may be
longer than what the student has written of it); M spelled tokens, L the longest spelling, X nodes of the tree; V and W
vocabulary rows of student and teacher.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.objectives.inputs import (
    AlignedStates,
    Places,
    Vectors,
    chunked_loss,
    compared_terms,
    group_starts,
)
from cbd_trl.bridge.token_bytes import Vocabulary
from cbd_trl.bridge.vocabulary import match_loaded
from cbd_trl.losses.divergences import Divergence, get_divergence, tempered_log_probs
from cbd_trl.losses.objective import TermWeights

NO_NODE = -1
ROOT = 0


@dataclass(frozen=True)
class PrefixTable:
    """The teacher's tokens as a prefix tree over the student's tokens.

    A node stands for a sequence of the student's tokens. The teacher's tokens that begin with it are the rows
    `start_X` to `end_X` of `ids_M`; of those, the rows before `longer_X` are spelled by exactly this sequence.

    Attributes:
        vocabulary: rows of the student, V.
        ids_M: the teacher's tokens, int64, in the order of their spellings.
        spelled_ML: the student's tokens that spell them, -1 after the end.
        first_W: the first of these by the teacher's token, -1 for none, up to the last token with a spelling.
        start_X, longer_X, end_X: see above.
        keys_X: parent * V + token of every node but the root, increasing; the node of a key is its index plus one.
    """

    vocabulary: int
    ids_M: Tensor
    spelled_ML: Tensor
    first_W: Tensor
    start_X: Tensor
    longer_X: Tensor
    end_X: Tensor
    keys_X: Tensor

    @classmethod
    def of(cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> "PrefixTable":
        """Spell every token of the teacher: by a token of the same bytes or role, or by several with all its bytes.

        Raises:
            ValueError: as `match_vocabularies`.
        """
        old, new = Vocabulary.of(student), Vocabulary.of(teacher)
        match, ours, theirs = match_loaded(old, new), old.bytes, new.bytes
        spellings: dict[int, Sequence[int]] = {index: (own,) for index, own in match.source.items()}
        for index, pieces in match.built.items():
            if b"".join(ours[piece] or b"" for piece in pieces) == theirs[index]:
                spellings[index] = pieces
        return cls.from_spellings(spellings, len(ours))

    @classmethod
    def from_spellings(cls, spellings: Mapping[int, Sequence[int]], vocabulary: int) -> "PrefixTable":
        """Build the tree of given spellings.

        Args:
            spellings: {the teacher's id: the student's ids, at least one}; tokens that are left out are not compared.
            vocabulary: rows of the student.

        Raises:
            ValueError: there is no spelling.
        """
        if not spellings:
            raise ValueError(
                "Got no token of the teacher that is spelled in the student's tokens, and at least one is needed to "
                "convert its distribution. Check that both tokenizers are the right ones, or use another objective."
            )
        rows = sorted((tuple(own), index) for index, own in spellings.items())
        lengths_M = torch.tensor([len(own) for own, _ in rows])
        longest = int(lengths_M.max())
        table_ML = torch.full((len(rows), longest), -1)
        spelled = torch.tensor([token for own, _ in rows for token in own])
        table_ML.masked_scatter_(torch.arange(longest) < lengths_M[:, None], spelled)
        nodes_M = torch.zeros(len(rows), dtype=torch.int64)
        keys, starts, ends, longer = [], [0], [len(rows)], [0]
        # A node's number is the index of its key, so nodes are numbered after those of smaller depth.
        for depth in range(longest):
            tokens_M = table_ML[:, depth]
            inside_M = (nodes_M != NO_NODE) & (tokens_M != -1)
            keys_M = torch.where(inside_M, nodes_M * vocabulary + tokens_M, -1)
            found, number_M, counts = keys_M.unique(return_inverse=True, return_counts=True)
            skipped = int(found[0] == -1)
            first = torch.full_like(found, len(rows)).scatter_reduce(0, number_M, torch.arange(len(rows)), "amin")
            ended_M = (table_ML[:, depth + 1] == -1) if depth + 1 < longest else torch.ones_like(inside_M)
            exact = torch.zeros_like(found).index_add(0, number_M, (ended_M & inside_M).long())
            base = len(starts) - skipped
            nodes_M = torch.where(inside_M, number_M + base, NO_NODE)
            keys += found[skipped:].tolist()
            starts += first[skipped:].tolist()
            ends += (first + counts)[skipped:].tolist()
            longer += (first + exact)[skipped:].tolist()
        ids_M = torch.tensor([index for _, index in rows], dtype=torch.int64)
        first_W = torch.full((int(ids_M.max()) + 1,), NO_NODE).index_put((ids_M,), table_ML[:, 0])
        return cls(vocabulary, ids_M, table_ML, first_W, *(torch.tensor(x) for x in (starts, longer, ends, keys)))

    def to(self, device: torch.device) -> "PrefixTable":
        """Move the tree to a device; it is returned as it is where it is there already."""
        if self.ids_M.device == device:
            return self
        moved: Any = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved)

    def child(self, nodes_r: Tensor, tokens_r: Tensor) -> Tensor:
        """Find the nodes one token further, `NO_NODE` where no token of the teacher begins so, (r,) int64."""
        keys_r = nodes_r * self.vocabulary + tokens_r
        index_r = torch.searchsorted(self.keys_X, keys_r).clamp(max=len(self.keys_X) - 1)
        return torch.where((nodes_r != NO_NODE) & (self.keys_X[index_r] == keys_r), index_r + 1, NO_NODE)

    def first_of(self, tokens_r: Tensor) -> Tensor:
        """Find the first of the student's tokens that spell each of the teacher's, -1 for none, (r,) int64."""
        known_r = tokens_r < len(self.first_W)
        return torch.where(known_r, self.first_W[tokens_r.clamp(max=len(self.first_W) - 1)], NO_NODE)

    def first_token_probabilities(self, probabilities_rW: Tensor, rows: int) -> Tensor:
        """Sum the teacher's probabilities, (r, W), by the first of the student's tokens, (r, rows)."""
        sums_rV = probabilities_rW.new_zeros(len(probabilities_rW), rows)
        spelled_rM = probabilities_rW.index_select(1, self.ids_M)
        return sums_rV.index_add_(1, self.spelled_ML[:, 0], spelled_rM)

    def continuations(
        self,
        probabilities_gW: Tensor,
        row_r: Tensor,
        nodes_r: Tensor,
        depth_r: Tensor,
        rows: int,
        counts: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum the teacher's probabilities by the student's token that comes after the beginning of an open token.

        Args:
            probabilities_gW: the teacher's, where its token begins.
            row_r: the row of `probabilities_gW` for each open token.
            nodes_r: the node of its beginning, never `NO_NODE`.
            depth_r: number of the student's tokens in the beginning.
            rows: of the student's vocabulary.
            counts: how many of the teacher's tokens are longer than the beginnings, and how many are these, in all;
                None to wait for the device, which knows.

        Returns:
            (r, rows): probability of the beginning followed by each token; (r,): of the beginning as a whole token.
        """
        start_r, longer_r, end_r = (x[nodes_r] for x in (self.start_X, self.longer_X, self.end_X))
        longer, whole = counts or (None, None)
        longer_k, index_k = _ranges(longer_r, end_r, longer)
        sums_rV = probabilities_gW.new_zeros(len(nodes_r), rows)
        tokens_k = self.spelled_ML[index_k, depth_r[longer_k]]
        values_k = probabilities_gW[row_r[longer_k], self.ids_M[index_k]]
        sums_rV.index_put_((longer_k, tokens_k), values_k, accumulate=True)
        whole_k, index_k = _ranges(start_r, longer_r, whole)
        values_k = probabilities_gW[row_r[whole_k], self.ids_M[index_k]]
        return sums_rV, probabilities_gW.new_zeros(len(nodes_r)).index_add_(0, whole_k, values_k)


@dataclass(frozen=True)
class PrefixPrediction:
    """The teacher's prediction at a part of the student's positions.

    Attributes:
        target_nV: probabilities of the student's tokens as far as they are known, float32; their sum is at most 1.
        teacher_ce_n: the teacher's cross-entropy of a group, on its first token, nats.
    """

    target_nV: Tensor
    teacher_ce_n: Tensor

    def rows(self, rows: slice) -> "PrefixPrediction":
        """Select some of the positions."""
        return PrefixPrediction(self.target_nV[rows], self.teacher_ce_n[rows])


@dataclass(frozen=True)
class PrefixPlan:
    """What the table is asked at each position of a micro-batch, which tokens and groups alone decide: on the host.

    Comparable are positions in a group that is one token of either model. Of each kind of positions a part of the
    batch has a range, which the host finds in `at`, `longer` and `whole`.

    Attributes:
        vectors: where the model is, in order of the positions: "open", those where a token of the teacher may not have
            ended yet, (R,), "open_group", the group that it begins, "open_node", the node of what the student has
            written of it, and "open_depth", the number of the student's tokens that this is; "start", those where a
            group begins, (B,), and "start_group"; "joined", which of these B are of several tokens of the teacher.
        at: positions by kind: "comparable", "open", "start" and "joined".
        groups: of the comparable positions.
        longer, whole: tokens of the teacher that are longer than, or equal to, what is open before each of the R.
    """

    vectors: Vectors
    at: Mapping[str, list[int]]
    groups: list[int]
    longer: list[int]
    whole: list[int]

    @classmethod
    def of(cls, table: PrefixTable, student: Places, teacher: Places, targets_N: Tensor) -> "PrefixPlan":
        """Make the plan of a micro-batch.

        Args:
            table: on the host.
            student: on the host.
            teacher: likewise.
            targets_N: the student's tokens that follow its positions, likewise.
        """
        group_N, start_N = student.group_N, group_starts(student.group_N)
        one_G, single_G = (_group_sizes(places) == 1 for places in (student, teacher))
        inside_N = group_N != NOWHERE
        comparable_N = inside_N & torch.cat([single_G | one_G, inside_N.new_zeros(1)])[group_N]
        before_N, node_N, depth_N = _open_tokens(student, targets_N, single_G, table)
        open_R = (comparable_N & (node_N != NO_NODE)).nonzero().flatten()
        start_B = (comparable_N & start_N).nonzero().flatten()
        joined_J = (~single_G[group_N[start_B]]).nonzero().flatten()
        node_R = node_N[open_R]
        begin_R, longer_R, end_R = (x[node_R] for x in (table.start_X, table.longer_X, table.end_X))
        vectors = Vectors.of(
            open=open_R, open_group=before_N[open_R], open_node=node_R, open_depth=depth_N[open_R],
            start=start_B, start_group=group_N[start_B], joined=joined_J,
        )  # fmt: skip
        kinds = {"comparable": comparable_N.nonzero().flatten(), "open": open_R, "start": start_B}
        kinds["joined"] = start_B[joined_J]
        sums = ([0, *lengths_R.cumsum(0).tolist()] for lengths_R in (end_R - longer_R, longer_R - begin_R))
        at = {name: positions.tolist() for name, positions in kinds.items()}
        return cls(vectors, at, group_N[comparable_N].tolist(), *sums)

    def range_of(self, kind: str, part: slice) -> slice:
        """Find which positions of a kind are in a part of the batch."""
        return slice(bisect_left(self.at[kind], part.start), bisect_left(self.at[kind], part.stop))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PrefixPlan":
        """Move the vectors to a device."""
        return replace(self, vectors=self.vectors.to(device, non_blocking))

    def pin_memory(self) -> "PrefixPlan":
        """Pin the vectors."""
        return replace(self, vectors=self.vectors.pin_memory())


@dataclass(frozen=True)
class PrefixOutputs:
    """The teacher's outputs at the student's positions, see `cbd_trl.losses.teacher_outputs.AnyTeacherOutputs`.

    Attributes:
        table: the teacher's tokens as a tree over the student's.
        temperature: of the teacher's distributions.
        student, teacher: states of the micro-batch.
        log_prob_G: the teacher's log-probabilities of the groups, nats.
        teacher_ce_N: the same as costs, on the first token of each group.
        plan: of the positions.
    """

    table: PrefixTable
    temperature: float
    student: AlignedStates
    teacher: AlignedStates
    log_prob_G: Tensor
    teacher_ce_N: Tensor
    plan: PrefixPlan

    @classmethod
    def of(
        cls,
        student: AlignedStates,
        teacher: AlignedStates,
        table: PrefixTable,
        temperature: float,
        chunk: int | None = None,
    ) -> "PrefixOutputs":
        """Compute the outputs of the teacher.

        Args:
            student: of the micro-batch; its plan is made where it has none.
            teacher: likewise.
            table: moved to the device of the batch if it is on another.
            temperature: above 0.
            chunk: positions whose logits are held at a time.
        """
        device, plan = student.hidden_ND.device, student.plan
        if plan is None:
            on_host = table.to(torch.device("cpu")), student.places.to("cpu"), teacher.places.to("cpu")
            plan = PrefixPlan.of(*on_host, student.targets_N.cpu())
        log_prob_G = teacher.group_log_probs(chunk)
        teacher_ce_N = student.at_group_starts(-log_prob_G)
        return cls(table.to(device), temperature, student, teacher, log_prob_G, teacher_ce_N, plan.to(device))

    @torch.no_grad()
    def at(self, part: slice) -> PrefixPrediction:
        """Compute the prediction at a part of the student's positions."""
        plan, vectors = self.plan, self.plan.vectors
        target_nV = self.log_prob_G.new_zeros(part.stop - part.start, self.student.head.rows)
        teacher_ce_n, comparable = self.teacher_ce_N[part], plan.range_of("comparable", part)
        if comparable.start == comparable.stop:
            return PrefixPrediction(target_nV, teacher_ce_n)
        # A token of the teacher may be open since the group before the part.
        groups = slice(max(plan.groups[comparable.start] - 1, 0), plan.groups[comparable.stop - 1] + 1)
        logits_gW = self.teacher.head.logits(self.teacher.hidden_ND[self.teacher.places.start_G[groups]])
        p_gW = tempered_log_probs(logits_gW, self.temperature).exp()
        # Where no token is open, one has ended for sure.
        whole_n, total_n = target_nV.new_ones(2, len(target_nV))
        opened = plan.range_of("open", part)
        open_r, group_r, node_r, depth_r = (
            vectors[name][opened] for name in ("open", "open_group", "open_node", "open_depth")
        )
        open_r = open_r - part.start
        longer, whole = (sums[opened.stop] - sums[opened.start] for sums in (plan.longer, plan.whole))
        longer_rV, whole_r = self.table.continuations(
            p_gW, group_r - groups.start, node_r, depth_r, self.student.head.rows, (longer, whole)
        )
        whole_n[open_r], total_n[open_r] = whole_r, longer_rV.sum(-1) + whole_r
        start_b = vectors["start"][plan.range_of("start", part)] - part.start
        target_nV[start_b] = self._at_token_starts(part, logits_gW, p_gW, groups.start) * whole_n[start_b, None]
        target_nV[open_r] += longer_rV
        return PrefixPrediction(target_nV / total_n.clamp(min=torch.finfo(torch.float32).tiny)[:, None], teacher_ce_n)

    def _at_token_starts(self, part: slice, logits_gW: Tensor, p_gW: Tensor, first: int) -> Tensor:
        """Convert the distributions where a token of the teacher begins, (b, V); `first` is the group of row 0."""
        vectors, starts = self.plan.vectors, self.plan.range_of("start", part)
        groups_b = vectors["start_group"][starts]
        sums_bV = self.table.first_token_probabilities(p_gW[groups_b - first], self.student.head.rows)
        rows_j = vectors["joined"][self.plan.range_of("joined", part)] - starts.start
        groups_j = groups_b[rows_j]
        tokens_j = self.student.targets_N[vectors["start"][starts][rows_j]]
        first_j = self.teacher.targets_N[self.teacher.places.start_G[groups_j]]
        log_first_j = logits_gW[groups_j - first].float().log_softmax(-1).gather(1, first_j[:, None])[:, 0]
        # The share of the first token's probability that continues to the whole group belongs to the student's token.
        moved_j = (self.log_prob_G[groups_j] - log_first_j).exp().clamp(max=1.0) * p_gW[groups_j - first, first_j]
        own_j = self.table.first_of(first_j)
        sums_bV[rows_j, own_j.clamp(min=0)] -= moved_j * (own_j != NO_NODE)
        sums_bV[rows_j, tokens_j] += moved_j
        return sums_bV.clamp(min=0.0)


@dataclass(frozen=True)
class PrefixObjective:
    """A divergence at every position for which the teacher's tokens give probabilities of the student's next one.

    - Where a token begins in both models, the teacher's distribution is summed by the first of the student's tokens
      that spell each of its own: p(v) is the sum of p(t) over the t that begin with v.
    - Within a token of the teacher, the sum is over the tokens that begin with what the student has written of it.
    - Where a token has ended that others begin with (" run", " running"), the two are weighted by their probabilities
      one token of the teacher before.
    - One token of the student for several of the teacher has the probability of the group.
    - Groups of several tokens of both models are not compared, and what else is unknown (whether a token ends here,
      where the text continues within it; tokens that the student cannot spell) is left to the student: it is taken out
      of both distributions, and the rest is weighted by the teacher's probability of it.

    After the conversion of token to byte and character probabilities by sums over covering tokens (Phan et al. 2024,
    arXiv 2410.09303; Vieira et al. 2024, arXiv 2412.03719), with covers of one token, two where one has ended: the
    teacher does not run again, as an exact conversion would require (arXiv 2512.14954). With one vocabulary it is the
    divergence itself.

    Attributes:
        table: the teacher's tokens as a tree over the student's.
        divergence: between distributions over the student's tokens.
        temperature: T, of both models, above 0.
    """

    table: PrefixTable
    divergence: Divergence = get_divergence("forward_kl")  # noqa: RUF009
    temperature: float = 1.0

    def terms(
        self, student_NV: Tensor, teacher: PrefixPrediction, targets_N: Tensor, weights: TermWeights
    ) -> dict[str, Tensor]:
        """See `cbd_trl.losses.objective.LogitObjective`."""
        return compared_terms(
            student_NV, targets_N, teacher.teacher_ce_n, weights, lambda _: self._compare(student_NV, teacher)
        )

    def _compare(self, student_NV: Tensor, teacher: PrefixPrediction) -> Tensor:
        student_log_NV = tempered_log_probs(student_NV, self.temperature)
        known_N = teacher.target_nV.sum(-1, keepdim=True)
        log_NV = torch.where(known_N > 0, teacher.target_nV.log() - known_N.log(), student_log_NV.detach())
        kd_N = known_N[:, 0] * self.divergence(student_log_NV, log_NV)
        return kd_N * self.temperature**self.divergence.temperature_power

    def __call__(
        self, student: AlignedStates, teacher: AlignedStates, weights: TermWeights, chunk: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch as `GroupObjective` does, with a value of "kd" at each position.

        Args:
            student: its scored positions.
            teacher: of the same texts.
            weights: of the terms at this step.
            chunk: positions at a time; None to choose by the larger vocabulary.
        """

        def outputs(chunk: int) -> PrefixOutputs:
            return PrefixOutputs.of(student, teacher, self.table, self.temperature, chunk)

        return chunked_loss(student, teacher, outputs, self, weights, chunk)


def _ranges(start_r: Tensor, end_r: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Enumerate some ranges end to end, `total` long: the range of each index, and the index."""
    lengths_r = end_r - start_r
    row_k = torch.repeat_interleave(lengths_r, output_size=total)
    offsets_r = lengths_r.cumsum(0) - lengths_r
    return row_k, torch.arange(len(row_k), device=start_r.device) - offsets_r[row_k] + start_r[row_k]


def _group_sizes(places: Places) -> Tensor:
    group_N = places.group_N
    return torch.bincount(group_N[group_N != NOWHERE], minlength=places.groups)


def _shift(values_N: Tensor, first: int) -> Tensor:
    """Move values one position on: at each position the value of the one before."""
    return torch.cat([values_N.new_full((1,), first), values_N])[:-1]


def _open_tokens(
    student: Places, targets_N: Tensor, single_G: Tensor, table: PrefixTable
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the teacher's token that may not have ended yet at each position.

    Within a group it is the group's first token. Where a group begins it is the token of the group before, if that has
    one token and the text continues: the teacher could have chosen a longer token there.

    Args:
        student: the positions.
        targets_N: the tokens that follow them.
        single_G: groups of one token of the teacher, bool.
        table: all on the host.

    Returns:
        the group that it begins; the node of what the student has written of it, `NO_NODE` where no token is open; the
        number of the student's tokens that this is: (N,) int64 each.
    """
    group_N, position_N = student.group_N, student.scored.index_N
    start_N, inside_N = group_starts(group_N), group_N != NOWHERE
    positions_N = torch.arange(len(group_N))
    depth_N = torch.where(inside_N, positions_N - torch.where(start_N, positions_N, 0).cummax(0).values, 0)
    node_N = torch.where(inside_N, ROOT, NO_NODE)
    for depth in range(1, int(depth_N.max()) + 1 if len(depth_N) else 1):
        at_r = (depth_N == depth).nonzero().flatten()
        node_N[at_r] = table.child(node_N[at_r - 1], targets_N[at_r - 1])
    before_N = _shift(group_N, NOWHERE)
    follows_N = start_N & (before_N != NOWHERE)
    follows_N &= _shift(position_N, NOWHERE) == position_N - 1
    follows_N &= _shift(student.text_N, NOWHERE) == student.text_N
    follows_N[follows_N.clone()] = single_G[before_N[follows_N]]
    after_N = _shift(table.child(node_N, targets_N), NO_NODE)
    return (
        torch.where(start_N, before_N, group_N),
        torch.where(follows_N, after_N, torch.where(start_N, NO_NODE, node_N)),
        torch.where(start_N, _shift(depth_N, 0) + 1, depth_N),
    )
