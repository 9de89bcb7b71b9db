"""How fast this machine is, measured in a moment."""

import time
from dataclasses import dataclass

import torch

from cbd_trl.recipe.step_cost import BF16_SPEED, bf16_pays
from cbd_trl.trainers.distill_config import DistillConfig

# Share of the speed of one matrix product that a whole model comes to: on a CPU measured (SmolLM2-135M, float32); on a
# GPU assumed.
_CPU_EFFICIENCY, _GPU_EFFICIENCY = 0.5, 0.4


@dataclass(frozen=True)
class Speed:
    """How fast this machine is.

    Args:
        products: FLOPs a second of a matrix product in float32 on a CPU, or in the training's dtype on a GPU.
        device: what does them.
        training: FLOPs a second of a training step.
        forward: FLOPs a second of a forward pass without gradients.
    """

    products: float
    device: str
    training: float
    forward: float


def measure_speed(args: DistillConfig, width: int) -> Speed:
    """Time a matrix product of 1,024 tokens of a width.

    Args:
        args: of the training: its device and precision.
        width: of the source.
    """
    device, half = args.device, half_precision(args)
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu or not half else torch.bfloat16 if args.bf16 else torch.float16
    products = _product_speed(device, dtype, width)
    efficiency = _CPU_EFFICIENCY if on_cpu else _GPU_EFFICIENCY
    faster = BF16_SPEED if on_cpu and half and bf16_pays() else 1.0
    return Speed(products, str(device), efficiency * faster * products, efficiency * products)


@torch.no_grad()
def _product_speed(device: torch.device, dtype: torch.dtype, width: int) -> float:
    left = torch.randn(1024, width, device=device, dtype=dtype)
    right = torch.randn(width, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        # Read back, so that a device that runs beside the CPU has finished.
        torch.mm(left, right)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * left.shape[0] * width * width / best


def half_precision(args: DistillConfig) -> bool:
    """Whether a training is in mixed precision."""
    return bool(args.bf16 or args.fp16)
