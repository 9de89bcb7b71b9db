"""The one truth about which positions are scored, how per-token terms are masked and how they are normalized.

Shapes: B batch, T tokens, N scored positions, V vocabulary rows, R dataset rows (examples) of a batch.
Position t predicts token t + 1, so it is scored when the label of t + 1 is not -100; the last position never is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_trl.utils.blocks import IGNORE_INDEX


def scored_mask(labels_BT: Tensor) -> Tensor:
    """Mark the positions that predict a scored token.

    Args:
        labels_BT: token ids, -100 where the token is not scored, (B, T), not shifted.

    Returns:
        (B, T - 1) bool.
    """
    return labels_BT[:, 1:] != IGNORE_INDEX


def count_scored(batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Count the scored positions of several batches.

    Args:
        batches: each with `labels` (B, T), not shifted.

    Returns:
        scalar, int64.
    """
    return torch.stack([scored_mask(batch["labels"]).sum() for batch in batches]).sum()


@dataclass(frozen=True)
class Scored:
    """The scored positions of a batch: the host knows how many they are, the device where.

    A mask would make the host wait for the device wherever it selects, since only the device knows how much that is.
    So the data collator makes this, while the labels are still on the host, and it goes to the device with the batch.

    Attributes:
        index_N: the scored positions in the flattened batch, increasing, int64.
    """

    index_N: Tensor

    @classmethod
    def of(cls, labels_BT: Tensor) -> "Scored":
        """Find the scored positions; where the labels are on a GPU the host waits for it.

        Args:
            labels_BT: token ids, -100 where the token is not scored, (B, T), not shifted.
        """
        return cls(F.pad(scored_mask(labels_BT), (0, 1)).flatten().nonzero().flatten())

    def __len__(self) -> int:
        return len(self.index_N)

    def select(self, values_BTX: Tensor) -> Tensor:
        """Select the values at the scored positions: logits, hidden states, or token ids.

        Args:
            values_BTX: (B, T, ...), any dtype.

        Returns:
            (N, ...).
        """
        return values_BTX.flatten(0, 1).index_select(0, self.index_N.to(values_BTX.device))

    def select_next(self, values_BTX: Tensor) -> Tensor:
        """Select the values one position on: of token ids, those that are predicted.

        Args:
            values_BTX: (B, T, ...), any dtype.

        Returns:
            (N, ...), in the order of `select`.
        """
        return values_BTX.flatten(0, 1).index_select(0, self.index_N.to(values_BTX.device) + 1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Scored":
        """Move it to a device, as a tensor; so does accelerate with what is in a batch."""
        return Scored(self.index_N.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Scored":
        """Pin it, as a tensor; so does torch's DataLoader with what is in a batch."""
        return Scored(self.index_N.pin_memory())


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Compute the per-token cross-entropy.

    Args:
        logits_NV: logits, (N, V), any float dtype.
        targets_N: token ids below V, (N,).

    Returns:
        (N,) float32, nats per token.
    """
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def normalize(total: Tensor, tokens: int, num_items: Tensor | int | None, num_processes: int = 1) -> Tensor:
    """Normalize the loss of a micro-batch: its token sum over the tokens of the whole optimizer step.

    Summed over micro-batches, and averaged over processes as DDP does, this is the mean over all scored tokens of the
    step, whatever the accumulation, packing or number of processes.

    Args:
        total: scalar, nats, summed over the scored tokens of this micro-batch.
        tokens: how many they are.
        num_items: scored tokens of the optimizer step, over all processes that `num_processes` counts; None for those
            of this micro-batch.
        num_processes: how many processes share `num_items`.

    Returns:
        scalar; 0, with a gradient of 0, where nothing is scored.
    """
    items = tokens if num_items is None else num_items
    return total / (items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)) * num_processes


def sums_per_row(
    per_token_N: Tensor, scored: Scored, shape: Sequence[int], row_lengths_R: Tensor | None = None
) -> Tensor:
    """Sum per-token values over each dataset row.

    Args:
        per_token_N: (N,) values at the scored positions.
        scored: these positions.
        shape: of the batch, B and T.
        row_lengths_R: for a padding-free batch (B = 1, rows end to end), tokens of each row, (R,).

    Returns:
        (R,) in the dtype of `per_token_N`, R = B without `row_lengths_R`.
    """
    batch, length = shape
    # Of the tokens that are predicted.
    index_N = scored.index_N.to(per_token_N.device) + 1
    if row_lengths_R is None:
        return per_token_N.new_zeros(batch).index_add(0, index_N // length, per_token_N)
    row_of_N = torch.bucketize(index_N, row_lengths_R.cumsum(0), right=True)
    return per_token_N.new_zeros(len(row_lengths_R)).index_add(0, row_of_N, per_token_N)
