"""Held-out loss: the same fixed token blocks for every model.

Shapes: N blocks, T tokens in each, P scored positions of a few blocks, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from cbd_trl.architectures.backbone import Head, check_head, last_hidden, output_head
from cbd_trl.losses.fused import logits_in_blocks
from cbd_trl.losses.reduction import Scored, cross_entropy, scored_mask
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.modeling import in_eval_mode, portable_attention


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: Tensor | TokenBlocks, batch_size: int = 4) -> float:
    """Compute the mean cross-entropy of the tokens of the blocks, each block's first one excepted.

    The head runs on some hundred positions at a time: memory does not grow with batch_size x T x vocabulary.

    Args:
        model: a causal language model, or one with adapters; its train or eval mode is as it was afterwards.
        blocks: text, with what of it is scored; or (N, T) int64 token ids, no padding.
        batch_size: blocks in one forward pass.

    Returns:
        nats per scored token.

    Raises:
        ValueError: if there is nothing to predict, or the model's logits are not a plain head of its last hidden
            state.
    """
    text = blocks if isinstance(blocks, TokenBlocks) else TokenBlocks(blocks, blocks)
    blocks, labels = text.input_ids, text.labels
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise ValueError(
            f"blocks has shape {tuple(blocks.shape)}, wanted (N, T) with N >= 1 and T >= 2: each block's first token "
            "is only read, so a shorter one has nothing to predict."
        )
    tokens = int(scored_mask(labels).sum())
    if not tokens:
        raise ValueError("labels scores no token: all behind each block's first one are -100. Score at least one.")
    causal: Any = model
    if hasattr(causal, "get_base_model"):
        causal = causal.get_base_model()
    total = 0.0
    with in_eval_mode(model), portable_attention(causal):
        check_head(causal)
        for ids, wanted in zip(blocks.split(batch_size), labels.split(batch_size), strict=True):
            scored = Scored.of(wanted)
            hidden_PD = scored.select(last_hidden(causal, input_ids=ids.to(model.device)))
            with output_head(causal) as head:
                total += _cross_entropy_sum(hidden_PD, head, scored.select_next(wanted))
    return total / tokens


class HeldOutDivergence:
    """KL(reference || model) of next-token predictions on the same text for every model.

    Args:
        reference: a causal language model; it is kept, for its head.
        blocks: text, of which the scored positions are compared.
        batch_size: blocks in one forward pass.
    """

    def __init__(self, reference: PreTrainedModel, blocks: TokenBlocks, batch_size: int = 4) -> None:
        self._reference, self._blocks, self._batch_size = reference, blocks, batch_size
        self._hidden = list(self._last_hidden(reference))

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> float:
        """Compute the mean divergence, in nats per scored token.

        Args:
            model: of the reference's vocabulary; its train or eval mode is as it was afterwards.
        """
        total = 0.0
        for hidden_PD, reference_PD in zip(self._last_hidden(model), self._hidden, strict=True):
            with output_head(model) as head, output_head(self._reference) as reference_head:
                pairs = zip(
                    logits_in_blocks(hidden_PD, head), logits_in_blocks(reference_PD, reference_head), strict=True
                )
                for (_, logits_nV), (_, reference_nV) in pairs:
                    log_nV, wanted_nV = logits_nV.log_softmax(-1), reference_nV.log_softmax(-1)
                    total += float(kl_div(log_nV, wanted_nV, log_target=True, reduction="sum"))
        return total / self._blocks.scored

    @torch.no_grad()
    def _last_hidden(self, model: Any) -> Iterator[Tensor]:
        """Yield what the head reads at the scored positions, batch by batch, (P, D)."""
        texts = (self._blocks.input_ids.split(self._batch_size), self._blocks.labels.split(self._batch_size))
        with in_eval_mode(model), portable_attention(model):
            check_head(model)
            for ids, labels in zip(*texts, strict=True):
                yield Scored.of(labels).select(last_hidden(model, input_ids=ids.to(model.device)))


def _cross_entropy_sum(hidden_PD: Tensor, head: Head, targets_P: Tensor) -> float:
    device = head.weight_VD.device
    hidden_PD, targets_P = hidden_PD.to(device), targets_P.to(device)
    sums = [cross_entropy(logits_nV, targets_P[rows]).sum() for rows, logits_nV in logits_in_blocks(hidden_PD, head)]
    # Some devices have no float64.
    return float(torch.stack(sums).cpu().double().sum()) if sums else 0.0
