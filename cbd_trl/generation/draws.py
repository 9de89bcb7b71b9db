"""Tokens drawn by random numbers that belong to a row, whichever rows come with it.

Shapes: B rows, T tokens so far, V vocabulary rows, N new tokens at most.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


def row_numbers(seed: int, row: int, count: int) -> Tensor:
    """Uniform random numbers of a row: a function of seed and row number alone, the same on every device.

    Args:
        seed: of the corpus.
        row: its number in the file, from 0.
        count: N.

    Returns:
        (N,) float64 in [0, 1), on the CPU.
    """
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


class DrawByRow(LogitsProcessor):
    """Leaves each row the one token that its next random number falls on, in the order of the vocabulary.

    Greedy search behind it then draws from the distribution.

    Args:
        seed: of the corpus.
        rows: numbers of the B rows.
        width: tokens of the prompts, padding included.
        max_new_tokens: N.
    """

    def __init__(self, seed: int, rows: Sequence[int], width: int, max_new_tokens: int) -> None:
        self._width = width
        self._numbers_NB = torch.stack([row_numbers(seed, row, max_new_tokens) for row in rows], dim=1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What `generate` asks of a processor.

        Args:
            input_ids: (B, T).
            scores: (B, V), softmax of which is drawn from.

        Returns:
            (B, V): 0 at the token drawn, -inf elsewhere.
        """
        # Apple's devices have no float64, and in float32 the sum over a vocabulary loses its rare tokens.
        where = "cpu" if scores.device.type == "mps" else scores.device
        sums_BV = scores.to(where).double().softmax(-1).cumsum(-1)
        # Exactly 1 from the last token that can be drawn on: every number below 1 falls on one that can.
        sums_BV = sums_BV / sums_BV[:, -1:]
        numbers_B1 = self._numbers_NB[input_ids.shape[1] - self._width, :, None].to(where)
        drawn_B1 = torch.searchsorted(sums_BV, numbers_B1, right=True).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1, 0.0)


class RefuseNonNumbers(LogitsProcessor):
    """Lets no logits pass that are not numbers: whatever is chosen from them means nothing."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What `generate` asks of a processor.

        Args:
            input_ids: (B, T).
            scores: (B, V).

        Returns:
            the scores.

        Raises:
            ValueError: if one is NaN.
        """
        if scores.isnan().any():
            raise ValueError(
                "The teacher's logits are not numbers (NaN). Its weights are damaged, or its dtype is too narrow: "
                "load it in float32 or bfloat16."
            )
        return scores
