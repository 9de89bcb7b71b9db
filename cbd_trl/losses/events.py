"""Fewer events than tokens: the kept tokens and one event for all others, or draws.

Shapes: N scored tokens, V vocabulary rows, K kept tokens or draws. Both models' log-probabilities over the same K + 1
events sum to one again, so a divergence of them is a true one. That of an f-divergence is never above its value on
the whole vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def top_k_log_probs(log_NV: Tensor, indices_NK: Tensor) -> Tensor:
    """Log-probabilities of the kept tokens, in their order, and last of everything else together.

    The tail is summed over the other tokens, not taken as 1 - sum, which would be noise for a confident model.

    Args:
        log_NV: log-probabilities over the vocabulary, (N, V).
        indices_NK: kept tokens, (N, K), int64, distinct within a row.

    Returns:
        (N, K + 1) float32, nats; (N, V) if K = V, for then nothing else is left.
    """
    if indices_NK.shape[-1] == log_NV.shape[-1]:
        return log_NV.float().gather(-1, indices_NK)
    return _KeptAndTail.apply(log_NV.float(), indices_NK)


def teacher_top_k(log_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a cache keeps of a teacher's distribution.

    Args:
        log_NV: log-probabilities over the vocabulary, (N, V).
        k: tokens to keep, at most V of them.

    Returns:
        indices (N, K) int64 with the most likely first, their log-probabilities (N, K) float32, and that of everything
        else together (N,) float32: -inf where nothing is left (k >= V). Nats.
    """
    indices_NK = log_NV.topk(min(k, log_NV.shape[-1]), dim=-1).indices
    log_NE = top_k_log_probs(log_NV, indices_NK)
    if k >= log_NV.shape[-1]:
        return indices_NK, log_NE, torch.full_like(log_NE[:, 0], float("-inf"))
    return indices_NK, log_NE[:, :-1], log_NE[:, -1]


def draw(log_NV: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw tokens with replacement, as `cbd_trl.losses.divergences.sampled_forward_kl` wants them.

    Args:
        log_NV: log-probabilities over the vocabulary, (N, V).
        count: draws per token.
        generator: on the device of `log_NV`; None for torch's own.

    Returns:
        (N, count) int64; a token may come up several times.
    """
    return torch.multinomial(log_NV.float().exp(), count, replacement=True, generator=generator)


class _KeptAndTail(torch.autograd.Function):
    # gather, scatter and logsumexp would do, but autograd passes over three more blocks of (N, V) for them.
    @staticmethod
    def forward(ctx: Any, log_NV: Tensor, indices_NK: Tensor) -> Tensor:
        others_NV = log_NV.scatter(-1, indices_NK, float("-inf"))
        # 0 where nothing else has any probability: -inf - -inf would be NaN.
        shift_N1 = others_NV.amax(-1, keepdim=True).nan_to_num_(neginf=0.0)
        others_NV.sub_(shift_N1).exp_()
        sum_N1 = others_NV.sum(-1, keepdim=True)
        ctx.save_for_backward(others_NV, sum_N1, indices_NK)
        return torch.cat([log_NV.gather(-1, indices_NK), sum_N1.log() + shift_N1], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        others_NV, sum_N1, indices_NK = ctx.saved_tensors
        (gradient_NE,) = gradients
        scale_N1 = torch.where(sum_N1 > 0, gradient_NE[:, -1:] / sum_N1, 0.0)
        return (others_NV * scale_N1).scatter_(-1, indices_NK, gradient_NE[:, :-1]), None
