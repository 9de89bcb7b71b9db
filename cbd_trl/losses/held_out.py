"""Held-out loss: the same fixed token blocks for every model.

Shapes: N blocks, T tokens in each.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cbd_trl.eval_mode import in_eval_mode
from cbd_trl.losses.reduction import cross_entropy, scored_mask, scored_targets, select_scored


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: Tensor, batch_size: int = 4, labels: Tensor | None = None) -> float:
    """Mean cross-entropy of the tokens of the blocks, each block's first one excepted.

    Args:
        model: a causal language model; its train or eval mode is as it was afterwards.
        blocks: (N, T) int64 token ids, no padding.
        batch_size: blocks in one forward pass.
        labels: (N, T) int64, the blocks with -100 where a token is read but not scored; None to score them all.

    Returns:
        nats per scored token.

    Raises:
        ValueError: if there is nothing to predict.
    """
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise ValueError(
            f"blocks has shape {tuple(blocks.shape)}, wanted (N, T) with N >= 1 and T >= 2: each block's first token "
            "is only read, so a shorter one has nothing to predict."
        )
    labels = blocks if labels is None else labels
    total = 0.0
    with in_eval_mode(model):
        for batch, wanted in zip(blocks.split(batch_size), labels.split(batch_size), strict=True):
            logits, wanted = model(input_ids=batch.to(model.device), use_cache=False).logits, wanted.to(model.device)
            losses = cross_entropy(select_scored(logits, wanted), scored_targets(wanted))
            total += losses.double().sum().item()
    return total / int(scored_mask(labels).sum())
