"""The teacher's distribution converted to the student's tokens, position by position, and a divergence from it.

`PrefixTable` is a prefix tree of the teacher's tokens, spelled in the student's tokens. `PrefixOutputs` sums the
teacher's probabilities along it, which gives a `PrefixPrediction` over the student's vocabulary at a part of the
positions, and `PrefixObjective` compares the student with it.

Shapes: N positions of the student, of which n are a part; G groups, of which g are read, b begin in the part and j are
one token of the student for several of the teacher; r positions within an open token of the teacher (one that may be
longer than what the student has written of it); M spelled tokens, L the longest spelling, X nodes of the tree; V and W
vocabulary rows of student and teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.objectives.inputs import AlignedStates, at_group_starts, chunked_loss, compared_terms
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
        self, probabilities_gW: Tensor, row_r: Tensor, nodes_r: Tensor, depth_r: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Sum the teacher's probabilities by the student's token that comes after the beginning of an open token.

        Args:
            probabilities_gW: the teacher's, where its token begins.
            row_r: the row of `probabilities_gW` for each open token.
            nodes_r: the node of its beginning, never `NO_NODE`.
            depth_r: number of the student's tokens in the beginning.
            rows: of the student's vocabulary.

        Returns:
            (r, rows): probability of the beginning followed by each token; (r,): of the beginning as a whole token.
        """
        start_r, longer_r, end_r = (x[nodes_r] for x in (self.start_X, self.longer_X, self.end_X))
        longer_k, index_k = _ranges(longer_r, end_r)
        sums_rV = probabilities_gW.new_zeros(len(nodes_r), rows)
        tokens_k = self.spelled_ML[index_k, depth_r[longer_k]]
        values_k = probabilities_gW[row_r[longer_k], self.ids_M[index_k]]
        sums_rV.index_put_((longer_k, tokens_k), values_k, accumulate=True)
        whole_k, index_k = _ranges(start_r, longer_r)
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
class _OpenTokens:
    """The teacher's token that may not have ended yet at each position, (N,) int64 each.

    Attributes:
        group_N: the group that it begins.
        node_N: the node of what the student has written of it; `NO_NODE` where no token is open.
        depth_N: number of the student's tokens that this is.
    """

    group_N: Tensor
    node_N: Tensor
    depth_N: Tensor


@dataclass(frozen=True)
class PrefixOutputs:
    """The teacher's outputs at the student's positions, see `cbd_trl.losses.teacher_outputs.AnyTeacherOutputs`.

    Attributes:
        table: the teacher's tokens as a tree over the student's.
        temperature: of the teacher's distributions.
        student, teacher: states of the micro-batch.
        log_prob_G: the teacher's log-probabilities of the groups, nats.
        single_G: groups of one token of the teacher, bool.
        comparable_N: positions in a group that is one token of either model, bool.
        open_tokens: of the teacher, at each position.
    """

    table: PrefixTable
    temperature: float
    student: AlignedStates
    teacher: AlignedStates
    log_prob_G: Tensor
    single_G: Tensor
    comparable_N: Tensor
    open_tokens: _OpenTokens

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
            student: of the micro-batch.
            teacher: likewise.
            table: moved to the device of the batch if it is on another.
            temperature: above 0.
            chunk: positions whose logits are held at a time.
        """
        table = table.to(student.hidden_ND.device)
        log_prob_G, group_N = teacher.group_log_probs(chunk), student.group_N
        one_G, single_G = (_group_sizes(states, len(log_prob_G)) == 1 for states in (student, teacher))
        comparable_N = group_N != NOWHERE
        comparable_N = comparable_N.masked_scatter(comparable_N, (single_G | one_G)[group_N[comparable_N]])
        open_tokens = _open_tokens(student, single_G, table)
        return cls(table, temperature, student, teacher, log_prob_G, single_G, comparable_N, open_tokens)

    @torch.no_grad()
    def at(self, part: slice) -> PrefixPrediction:
        """Compute the prediction at a part of the student's positions."""
        group_n, comparable_n, open_tokens = self.student.group_N[part], self.comparable_N[part], self.open_tokens
        target_nV = self.log_prob_G.new_zeros(len(group_n), self.student.head.rows)
        teacher_ce_n = at_group_starts(self.student.group_N, -self.log_prob_G)[part]
        if not comparable_n.any():
            return PrefixPrediction(target_nV, teacher_ce_n)
        # A token of the teacher may be open since the group before the part.
        first, end = max(int(group_n[comparable_n].min()) - 1, 0), int(group_n.max()) + 1
        logits_gW = self.teacher.head.logits(self.teacher.hidden_ND[self.teacher.group_start_N][first:end])
        p_gW = tempered_log_probs(logits_gW, self.temperature).exp()
        # Where no token is open, one has ended for sure.
        whole_n, total_n = target_nV.new_ones(2, len(group_n))
        open_n = comparable_n & (open_tokens.node_N[part] != NO_NODE)
        group_r, node_r, depth_r = (
            values_N[part][open_n] for values_N in (open_tokens.group_N, open_tokens.node_N, open_tokens.depth_N)
        )
        longer_rV, whole_r = self.table.continuations(p_gW, group_r - first, node_r, depth_r, self.student.head.rows)
        whole_n[open_n], total_n[open_n] = whole_r, longer_rV.sum(-1) + whole_r
        start_n = comparable_n & self.student.group_start_N[part]
        target_nV[start_n] = self._at_token_starts(part, start_n, logits_gW, p_gW, first) * whole_n[start_n, None]
        target_nV[open_n] += longer_rV
        return PrefixPrediction(target_nV / total_n.clamp(min=torch.finfo(torch.float32).tiny)[:, None], teacher_ce_n)

    def _at_token_starts(self, part: slice, start_n: Tensor, logits_gW: Tensor, p_gW: Tensor, first: int) -> Tensor:
        """Convert the distributions where a token of the teacher begins, (b, V); `first` is the group of row 0."""
        groups_b, tokens_b = self.student.group_N[part][start_n], self.student.targets_N[part][start_n]
        sums_bV = self.table.first_token_probabilities(p_gW[groups_b - first], self.student.head.rows)
        joined_b = ~self.single_G[groups_b]
        groups_j, rows_j = groups_b[joined_b], joined_b.nonzero().flatten()
        first_j = self.teacher.targets_N[self.teacher.group_start_N][groups_j]
        log_first_j = logits_gW[groups_j - first].float().log_softmax(-1).gather(1, first_j[:, None])[:, 0]
        # The share of the first token's probability that continues to the whole group belongs to the student's token.
        moved_j = (self.log_prob_G[groups_j] - log_first_j).exp().clamp(max=1.0) * p_gW[groups_j - first, first_j]
        own_j = self.table.first_of(first_j)
        spelled_j = own_j != NO_NODE
        sums_bV[rows_j[spelled_j], own_j[spelled_j]] -= moved_j[spelled_j]
        sums_bV[rows_j, tokens_b[joined_b]] += moved_j
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


def _ranges(start_r: Tensor, end_r: Tensor) -> tuple[Tensor, Tensor]:
    """Enumerate some ranges end to end: the range of each index, and the index."""
    lengths_r = end_r - start_r
    row_k = torch.repeat_interleave(lengths_r)
    offsets_r = lengths_r.cumsum(0) - lengths_r
    return row_k, torch.arange(len(row_k), device=start_r.device) - offsets_r[row_k] + start_r[row_k]


def _group_sizes(states: AlignedStates, groups: int) -> Tensor:
    return torch.bincount(states.group_N[states.group_N != NOWHERE], minlength=groups)


def _shift(values_N: Tensor, first: int) -> Tensor:
    """Move values one position on: at each position the value of the one before."""
    return torch.cat([values_N.new_full((1,), first), values_N])[:-1]


def _open_tokens(student: AlignedStates, single_G: Tensor, table: PrefixTable) -> _OpenTokens:
    """Find the teacher's open token at each position.

    Within a group it is the group's first token. Where a group begins it is the token of the group before, if that has
    one token and the text continues: the teacher could have chosen a longer token there.
    """
    group_N, group_start_N = student.group_N, student.group_start_N
    positions_N = torch.arange(len(group_N), device=group_N.device)
    inside_N = group_N != NOWHERE
    depth_N = torch.where(inside_N, positions_N - torch.where(group_start_N, positions_N, 0).cummax(0).values, 0)
    node_N = torch.where(inside_N, ROOT, NO_NODE)
    for depth in range(1, int(depth_N.max()) + 1 if len(depth_N) else 1):
        at_r = (depth_N == depth).nonzero().flatten()
        node_N[at_r] = table.child(node_N[at_r - 1], student.targets_N[at_r - 1])
    before_N = _shift(group_N, NOWHERE)
    follows_N = group_start_N & (before_N != NOWHERE)
    follows_N &= _shift(student.position_N, NOWHERE) == student.position_N - 1
    follows_N &= _shift(student.text_N, NOWHERE) == student.text_N
    follows_N = follows_N.masked_scatter(follows_N, single_G[before_N[follows_N]])
    after_N = _shift(table.child(node_N, student.targets_N), NO_NODE)
    return _OpenTokens(
        torch.where(group_start_N, before_N, group_N),
        torch.where(follows_N, after_N, torch.where(group_start_N, NO_NODE, node_N)),
        torch.where(group_start_N, _shift(depth_N, 0) + 1, depth_N),
    )
