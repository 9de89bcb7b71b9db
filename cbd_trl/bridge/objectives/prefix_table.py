"""A teacher's tokens by the student's tokens that spell them, as a tree: which begin with some tokens, and go on how.

Shapes: W vocabulary rows of the teacher, V of the student, M spelled tokens in the order of their spelling, L the
longest spelling, X nodes (a node for each beginning of a spelling), r rows of a query.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.token_bytes import Vocabulary
from cbd_trl.bridge.vocabulary import match_read

NO_NODE = -1
ROOT = 0


@dataclass(frozen=True)
class PrefixTable:
    """The tree. A node's tokens are the rows `start_X` to `end_X` of `ids_M`; the first of them, until `longer_X`, are
    spelled by the node's own tokens and no more.

    Attributes:
        vocabulary: rows of the student, V.
        ids_M: the teacher's tokens, int64, in the order of their spellings.
        spelled_ML: the student's tokens that spell them, -1 behind the end.
        first_W: the first of them by the teacher's token, -1 for none, up to the last that is spelled.
        start_X, longer_X, end_X: see above.
        keys_X: parent * V + token of every node but the root, increasing; the node of a key is its place plus one.
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
        """Spell every token of the teacher: a token of the same bytes or role, or pieces that have all its bytes.

        Raises:
            ValueError: as `match_vocabularies`.
        """
        old, new = Vocabulary.of(student), Vocabulary.of(teacher)
        match, ours, theirs = match_read(old, new), old.bytes, new.bytes
        spellings: dict[int, Sequence[int]] = {index: (own,) for index, own in match.source.items()}
        for index, pieces in match.built.items():
            if b"".join(ours[piece] or b"" for piece in pieces) == theirs[index]:
                spellings[index] = pieces
        return cls.from_spellings(spellings, len(ours))

    @classmethod
    def from_spellings(cls, spellings: Mapping[int, Sequence[int]], vocabulary: int) -> "PrefixTable":
        """The tree of given spellings.

        Args:
            spellings: {the teacher's id: the student's ids, at least one}; tokens that are left out say nothing.
            vocabulary: rows of the student.

        Raises:
            ValueError: no spelling.
        """
        if not spellings:
            raise ValueError(
                "There is no token of the teacher that is spelled in the student's tokens, so its distribution says "
                "nothing of theirs. Check that both tokenizers are the ones that are meant."
            )
        rows = sorted((tuple(own), index) for index, own in spellings.items())
        lengths_M = torch.tensor([len(own) for own, _ in rows])
        longest = int(lengths_M.max())
        table_ML = torch.full((len(rows), longest), -1)
        spelled = torch.tensor([token for own, _ in rows for token in own])
        table_ML.masked_scatter_(torch.arange(longest) < lengths_M[:, None], spelled)
        nodes_M = torch.zeros(len(rows), dtype=torch.int64)
        keys, starts, ends, longer = [], [0], [len(rows)], [0]
        # A node's number is the place of its key, so those of a depth are numbered behind those above.
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
        """The tree on the device of what it is asked about; itself where it is there already."""
        if self.ids_M.device == device:
            return self
        moved: Any = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved)

    def child(self, nodes_r: Tensor, tokens_r: Tensor) -> Tensor:
        """The nodes one token further on, `NO_NODE` where no token of the teacher begins so, (r,)."""
        keys_r = nodes_r * self.vocabulary + tokens_r
        place_r = torch.searchsorted(self.keys_X, keys_r).clamp(max=len(self.keys_X) - 1)
        return torch.where((nodes_r != NO_NODE) & (self.keys_X[place_r] == keys_r), place_r + 1, NO_NODE)

    def first_of(self, tokens_r: Tensor) -> Tensor:
        """The first of the student's tokens that spell each of some of the teacher's, -1 for none, (r,)."""
        known_r = tokens_r < len(self.first_W)
        return torch.where(known_r, self.first_W[tokens_r.clamp(max=len(self.first_W) - 1)], NO_NODE)

    def first_tokens(self, probabilities_rW: Tensor, rows: int) -> Tensor:
        """The teacher's probabilities summed by the first of the student's tokens, (r, rows)."""
        sums_rV = probabilities_rW.new_zeros(len(probabilities_rW), rows)
        spelled_rM = probabilities_rW.index_select(1, self.ids_M)
        return sums_rV.index_add_(1, self.spelled_ML[:, 0], spelled_rM)

    def continued(
        self, probabilities_gW: Tensor, row_r: Tensor, nodes_r: Tensor, depth_r: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        """What the teacher says of the token behind a beginning.

        Args:
            probabilities_gW: of the teacher, where the token begins.
            row_r: which of them.
            nodes_r: what is there of it, no `NO_NODE`.
            depth_r: how many of the student's tokens that is.
            rows: of the student's vocabulary.

        Returns:
            (r, rows): probability of the beginning and each token behind it; (r,): of the beginning as a whole token.
        """
        start_r, longer_r, end_r = (x[nodes_r] for x in (self.start_X, self.longer_X, self.end_X))
        longer_k, place_k = _ranges(longer_r, end_r)
        sums_rV = probabilities_gW.new_zeros(len(nodes_r), rows)
        tokens_k = self.spelled_ML[place_k, depth_r[longer_k]]
        values_k = probabilities_gW[row_r[longer_k], self.ids_M[place_k]]
        sums_rV.index_put_((longer_k, tokens_k), values_k, accumulate=True)
        whole_k, place_k = _ranges(start_r, longer_r)
        values_k = probabilities_gW[row_r[whole_k], self.ids_M[place_k]]
        return sums_rV, probabilities_gW.new_zeros(len(nodes_r)).index_add_(0, whole_k, values_k)


def _ranges(start_r: Tensor, end_r: Tensor) -> tuple[Tensor, Tensor]:
    """All places of some ranges, end to end: the range each is of, and the place."""
    lengths_r = end_r - start_r
    row_k = torch.repeat_interleave(lengths_r)
    offsets_r = lengths_r.cumsum(0) - lengths_r
    return row_k, torch.arange(len(row_k), device=start_r.device) - offsets_r[row_k] + start_r[row_k]
