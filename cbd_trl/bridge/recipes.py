"""What rows of an embedding table are made of: sums of a few old rows, by method."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbd_trl.bridge.matching_pursuit import matching_pursuit
from cbd_trl.bridge.vocabulary import VocabularyMatch
from cbd_trl.surgery.weights import working

# What "weighted" takes: how much less a piece counts than the next one, and the share of the mean of all rows.
_EARLIER = 0.75
_NEUTRAL = 0.2


@dataclass(frozen=True)
class Recipe:
    """Rows that are sums of old rows. N rows are made, of P parts together.

    Args:
        part: old ids, row after row, (P,) int64.
        start: where each row's parts begin, (N,) int64.
        share: what each part is multiplied by, (P,) floating point.
        neutral: what the mean of all old rows is multiplied by.
    """

    part: Tensor
    start: Tensor
    share: Tensor
    neutral: float = 0.0

    def apply(self, table_VD: Tensor, mean_D: Tensor) -> Tensor:
        """The rows, (N, D), from an old table (V, D), in its dtype, and the mean of its rows (D,)."""
        place, dtype = table_VD.device, table_VD.dtype
        part, start, share = self.part.to(place), self.start.to(place), self.share.to(place, dtype)
        sums = torch.nn.functional.embedding_bag(part, table_VD, start, mode="sum", per_sample_weights=share)
        return sums + self.neutral * mean_D


def mean_recipe(match: VocabularyMatch) -> Recipe:
    """Each built row is the mean of its pieces' rows."""
    return _averages(match, [[1.0] * len(pieces) for pieces in match.built.values()], neutral=0.0)


def weighted_recipe(match: VocabularyMatch, lengths: Sequence[int]) -> Recipe:
    """Each built row is a weighted mean of its pieces' rows, moved a part of the way to the mean of all old rows.

    A piece counts by its bytes, and more the later it is: the model goes on reading from the last one. And a token of
    several pieces is rarer than each of them, but the mean of their rows in the head would make it as likely.
    Measured without training on SmolLM2-135M, tied, given BPEs of its own kind, bits per byte of held-out text: with
    16000, 8000 and 4000 tokens 1.607, 1.701 and 1.902, where "mean" has 1.730, 1.791 and 1.974. The three parts apart
    (8000 tokens, other text): mean 1.716, by bytes 1.710, by place too 1.701, moved too 1.629. To lengthen the mean to
    the length of its pieces, as one might, is far worse.

    Args:
        match: which tokens are built of which pieces.
        lengths: bytes of each old token, by id.
    """
    weights = [
        [lengths[piece] * _EARLIER ** (len(pieces) - place) for place, piece in enumerate(pieces, start=1)]
        for pieces in match.built.values()
    ]
    return _averages(match, weights, neutral=_NEUTRAL)


def _averages(match: VocabularyMatch, weights: list[list[float]], neutral: float) -> Recipe:
    lengths = torch.tensor([len(pieces) for pieces in match.built.values()], dtype=torch.int64)
    part = torch.tensor([piece for pieces in match.built.values() for piece in pieces], dtype=torch.int64)
    share = [(1 - neutral) * weight / sum(row) for row in weights for weight in row]
    return Recipe(part, lengths.cumsum(0) - lengths, torch.tensor(share, dtype=torch.float64), neutral)


def pursuit_recipe(match: VocabularyMatch, donor_WE: Tensor, atoms: int) -> Recipe:
    """Each built row is the sum of taken-over rows that the donor's row is (arXiv 2506.06607).

    A token's row in the donor's table is written with the donor's rows of tokens that both vocabularies have; the
    same coefficients then hold for the model's rows of these tokens.

    Args:
        match: which tokens are built, and which both vocabularies have.
        donor_WE: a table of a model that has the new vocabulary, (W, E).
        atoms: how many tokens one is written with; no more than the donor's width and the tokens in common.
    """
    donor = working(donor_WE)
    new = torch.tensor(list(match.copied), device=donor.device)
    old = torch.tensor(list(match.copied.values()), device=donor.device)
    built = torch.tensor(list(match.built), dtype=torch.int64, device=donor.device)
    chosen, coefficient = matching_pursuit(donor[built], donor[new], atoms)
    start = torch.arange(len(built)) * chosen.shape[1]
    return Recipe(old[chosen].flatten(), start, coefficient.flatten())
