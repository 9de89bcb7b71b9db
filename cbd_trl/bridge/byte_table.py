"""The bytes of a vocabulary as tensors: from token ids to text, all tokens of a batch at once.

Shapes: V ids, N tokens end to end, X bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ByteTable:
    """What every id stands for.

    Attributes:
        pool_X: the bytes of all ids end to end, uint8.
        starts_V: where those of an id begin, int64.
        lengths_V: how many they are, int64.
        marks_V: ids that are no text, such as special tokens, bool. Their bytes are how they are written in a text
            that a tokenizer reads; none where they cannot be.
    """

    pool_X: Tensor
    starts_V: Tensor
    lengths_V: Tensor
    marks_V: Tensor

    @classmethod
    def of(cls, texts: Sequence[bytes | None], marks: Mapping[int, bytes]) -> "ByteTable":
        """Make a table.

        Args:
            texts: the bytes of each id, None for marks (see `token_bytes`).
            marks: how a mark is written; those that are not named have no bytes.
        """
        pieces = [marks.get(index, b"") if text is None else text for index, text in enumerate(texts)]
        lengths_V = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
        joined = bytearray(b"".join(pieces))
        pool_X = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        marks_V = torch.tensor([text is None for text in texts], dtype=torch.bool)
        return cls(pool_X, lengths_V.cumsum(0) - lengths_V, lengths_V, marks_V)

    def check(self, ids_N: Tensor) -> None:
        """Refuse rows with ids that the student's tokenizer does not have.

        Args:
            ids_N: token ids.

        Raises:
            ValueError: if an id is negative or has no entry.
        """
        known = self.lengths_V.numel()
        wrong_N = ids_N[(ids_N < 0) | (ids_N >= known)]
        if wrong_N.numel():
            raise ValueError(
                f"The rows have token id {wrong_N[0].item()}, but the student's tokenizer knows only 0 to "
                f"{known - 1}: they were made by another tokenizer, so what text they are is not known. Pass the "
                "tokenizer that made them as `processing_class`."
            )

    def spell(self, ids_N: Tensor, skip_N: Tensor) -> Tensor:
        """The text of tokens.

        Args:
            ids_N: token ids.
            skip_N: how many bytes to leave out at the beginning of each, at most as many as it has, int64.

        Returns:
            (X,) uint8, their bytes end to end.
        """
        return self.pool_X[places_of_bytes(self.starts_V[ids_N] + skip_N, self.lengths_V[ids_N] - skip_N)]

    def begins_with_space(self, ids_N: Tensor) -> Tensor:
        """Which tokens are text whose first byte is a space.

        Args:
            ids_N: token ids.

        Returns:
            (N,) bool.
        """
        text_N = (self.lengths_V[ids_N] > 0) & ~self.marks_V[ids_N]
        first_N = self.starts_V[ids_N].clamp(max=max(self.pool_X.numel() - 1, 0))
        return text_N & (self.pool_X[first_N] == ord(" ")) if self.pool_X.numel() else text_N


def places_of_bytes(starts_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Where each byte of some runs of bytes is.

    Args:
        starts_N: where the runs begin, int64.
        lengths_N: how long they are, int64.

    Returns:
        (X,) int64, run by run.
    """
    shifts_N = starts_N - (lengths_N.cumsum(0) - lengths_N)
    places_X = shifts_N.repeat_interleave(lengths_N)
    return places_X + torch.arange(places_X.numel())


def any_byte(flags_X: Tensor, lengths_N: Tensor) -> Tensor:
    """For each token, is one of its bytes flagged?

    Args:
        flags_X: bool, of all bytes, those of the tokens end to end.
        lengths_N: bytes of each token, int64.

    Returns:
        (N,) bool; False for a token of no bytes.
    """
    before_X = torch.cat([torch.zeros(1, dtype=torch.int64), flags_X.cumsum(0)])
    ends_N = lengths_N.cumsum(0)
    return before_X[ends_N] > before_X[ends_N - lengths_N]
