"""What a distillation step costs, and whether bf16 makes it cheaper on this machine: for those who predict a time."""

import time

import torch

# Of a forward pass of the same model: the backward pass, and the loss with its optimiser step.
_BACKWARD_AND_LOSS = 3.4
# Mixed precision on CPUs with bf16 instructions, against float32.
BF16_SPEED = 2.2


def step_cost(upper: float, lower: float, hybrids: float) -> float:
    """What an optimiser step of an anchor costs, in the unit of what a forward pass of the two models costs.

    Args:
        upper: a forward pass of the anchor above it.
        lower: a forward pass of its own.
        hybrids: share of the steps that have a hybrid beside them, which is of the mean size of the two.
    """
    return upper + _BACKWARD_AND_LOSS * (lower + hybrids * (upper + lower) / 2)


def bf16_pays() -> bool:
    """Whether bf16 mixed precision is worth it here: measured, because CPUs without bf16 instructions emulate them.

    Returns:
        whether a matrix product in bf16 is clearly faster than in float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


@torch.no_grad()
def _matmul_seconds(dtype: torch.dtype) -> float:
    left, right = torch.randn(1024, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    torch.mm(left, right)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return best
