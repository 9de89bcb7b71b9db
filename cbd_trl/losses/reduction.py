"""The one truth about which positions are scored, how per-token terms are masked and how they are normalized.

Shapes: B batch, T tokens, N scored positions, V vocabulary rows, R dataset rows (examples) of a batch.
Position t predicts token t + 1, so it is scored when the label of t + 1 is not -100; the last position never is.
"""

from collections.abc import Iterable, Mapping
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


def scored_targets(labels_BT: Tensor) -> Tensor:
    """The tokens that are predicted, in the order of `select_scored`.

    Args:
        labels_BT: token ids, -100 where the token is not scored, (B, T), not shifted.

    Returns:
        (N,) token ids.
    """
    return labels_BT[:, 1:][scored_mask(labels_BT)]


def select_scored(values_BTX: Tensor, labels_BT: Tensor) -> Tensor:
    """Select the values at the scored positions: logits, or hidden states.

    Args:
        values_BTX: (B, T, X), any dtype.
        labels_BT: token ids, -100 where the token is not scored, (B, T), not shifted.

    Returns:
        (N, X).
    """
    return values_BTX[:, :-1][scored_mask(labels_BT)]


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
    items = torch.as_tensor(tokens if num_items is None else num_items, device=total.device)
    return total / items.clamp(min=1) * num_processes


def sums_per_row(per_token_N: Tensor, labels_BT: Tensor, row_lengths_R: Tensor | None = None) -> Tensor:
    """Sum per-token values over each dataset row.

    Args:
        per_token_N: (N,) values at the scored positions.
        labels_BT: token ids, -100 where the token is not scored, (B, T), not shifted.
        row_lengths_R: for a padding-free batch (B = 1, rows end to end), tokens of each row, (R,).

    Returns:
        (R,) in the dtype of `per_token_N`, R = B without `row_lengths_R`.
    """
    batch, length = labels_BT.shape
    if row_lengths_R is None:
        row_of_BT = torch.arange(batch, device=labels_BT.device)[:, None].expand(batch, length)
        rows = batch
    else:
        ends_R = row_lengths_R.cumsum(0)
        # Padding behind the last row is never scored; clamping keeps its index in range.
        row_of_T = torch.bucketize(torch.arange(length, device=labels_BT.device), ends_R, right=True)
        rows = row_lengths_R.numel()
        row_of_BT = row_of_T.clamp(max=rows - 1)[None]
    row_of_N = row_of_BT[:, 1:][scored_mask(labels_BT)]
    return per_token_N.new_zeros(rows).index_add(0, row_of_N, per_token_N)
