"""Held-out loss: the same fixed token blocks for every model.

Shapes: N blocks, T tokens in each.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cbd_trl.eval_mode import in_eval_mode
from cbd_trl.losses.reduction import cross_entropy


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: Tensor, batch_size: int = 4) -> float:
    """Mean cross-entropy of the tokens of the blocks, each block's first one excepted.

    Args:
        model: a causal language model; its train or eval mode is as it was afterwards.
        blocks: (N, T) int64 token ids, no padding.
        batch_size: blocks in one forward pass.

    Returns:
        nats per predicted token, over all N x (T - 1) of them.

    Raises:
        ValueError: if there is nothing to predict.
    """
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise ValueError(
            f"blocks has shape {tuple(blocks.shape)}, wanted (N, T) with N >= 1 and T >= 2: each block's first token "
            "is only read, so a shorter one has nothing to predict."
        )
    total = 0.0
    with in_eval_mode(model):
        for batch in blocks.split(batch_size):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            total += cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).double().sum().item()
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))
