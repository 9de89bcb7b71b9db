"""Predict what a chain takes before any work: disk, memory, tokens and time.

The one cost model: `cbd-trl build --dry-run` prints it, the demo tells its time left by it.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from cbd_trl.architectures import Architecture
from cbd_trl.build.plan import Step
from cbd_trl.build.shape_search import SCORED_TOKENS
from cbd_trl.recipe.memory import (
    Phase,
    anchor_phases,
    bridge_phases,
    count_parameters,
    optimizer_bytes,
    source_phases,
    weight_dtype,
)
from cbd_trl.surgery.block_search import measured_blocks
from cbd_trl.targets.many import multiplied_weights
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.blocks import calibration_length
from cbd_trl.utils.modeling import emulates_bf16
from cbd_trl.utils.progress import Progress

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
    faster = _BF16_SPEED if on_cpu and half and bf16_pays() else 1.0
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
    """Check whether a training is in mixed precision."""
    return bool(args.bf16 or args.fp16)


# Of a forward pass of the same model: the backward pass, and the loss with its optimizer step.
_BACKWARD_AND_LOSS = 3.4
# Mixed precision on CPUs with bf16 instructions, against float32.
_BF16_SPEED = 2.2


def _step_cost(upper: float, lower: float, hybrids: float) -> float:
    """Compute what an optimizer step of an anchor costs, in the unit of what a forward pass of the two models costs.

    Args:
        upper: a forward pass of the anchor above it.
        lower: a forward pass of its own.
        hybrids: share of the steps that have a hybrid beside them, which is of the mean size of the two.
    """
    return upper + _BACKWARD_AND_LOSS * (lower + hybrids * (upper + lower) / 2)


def bf16_pays() -> bool:
    """Find whether bf16 mixed precision is worth it here: CPUs without bf16 instructions and old GPUs emulate them.

    Returns:
        of a GPU whether it has bf16, else whether a matrix product in bf16 is clearly faster than in float32.
    """
    if torch.cuda.is_available():
        return not emulates_bf16()
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


# Of the disk of the bfloat16 weights (docs/guides/chains.md).
_STATISTICS_SHARE = 0.15
_BF16_BYTES = 2
# Bytes of the libraries themselves, on a CPU measured; on a GPU of its context.
LIBRARIES = 500_000_000
# Of the common GPUs, in GB; the share of it that an allocator fills.
GPUS = (16, 24, 40, 80, 141)
_FILLED = 0.95
GPU = torch.device("cuda")


@dataclass(frozen=True)
class Cost:
    """What an anchor takes.

    Args:
        name: of the anchor.
        architecture: its shape.
        disk: bytes of its weights, as they are stored, and its statistics.
        checkpoints: bytes beside them while it is trained.
        tokens: that it is trained on, where every row is full; None where they depend on the data.
        seconds: to train and calibrate it; None where the tokens are not known.
        args: that it is made with.
        predict: the memory of its phases, with some arguments on some device; takes seconds.
    """

    name: str
    architecture: Architecture
    disk: int
    checkpoints: int
    tokens: int | None
    seconds: float | None
    args: DistillConfig
    predict: Callable[[Any, torch.device], list[Phase]]

    @cached_property
    def phases(self) -> list[Phase]:
        """What each phase takes on the device of the arguments."""
        return self.predict(self.args, self.args.device)

    @property
    def peak(self) -> Phase:
        """The phase that takes the most there."""
        return max(self.phases, key=lambda phase: phase.device)

    @property
    def memory(self) -> int:
        """Bytes on that device, at most, while it is made, those of the libraries included."""
        return LIBRARIES + self.peak.device

    @cached_property
    def gpu_memory(self) -> int:
        """The same on a CUDA GPU."""
        phases = self.phases if self.args.device.type == "cuda" else self.predict(self.args, GPU)
        return LIBRARIES + max(phase.device for phase in phases)

    def savings(self) -> dict[str, int]:
        """Compute what arguments would save of the bytes on a GPU, each alone, the most first."""
        found = {}
        for what, values in Progress(
            "Counting what saves memory",
            _less_memory(self.args, weight_dtype(self.args, self.architecture.config)).items(),
        ):
            args: Any = copy.copy(self.args)
            for name, value in values.items():
                setattr(args, name, value)
            found[what] = self.gpu_memory - LIBRARIES - max(phase.device for phase in self.predict(args, GPU))
        return {what: saved for what, saved in sorted(found.items(), key=lambda pair: -pair[1]) if saved > 0}


def _less_memory(args: DistillConfig, dtype: torch.dtype) -> dict[str, Mapping[str, Any]]:
    """Arguments that need less memory than those given, by how a recipe has them."""
    found: dict[str, Mapping[str, Any]] = {}
    if not args.gradient_checkpointing:
        found["gradient_checkpointing: true"] = {"gradient_checkpointing": True}
    if (rows := args.per_device_train_batch_size) > 1:
        steps = args.gradient_accumulation_steps
        values = {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2 * steps}
        found[", ".join(f"{name}: {value}" for name, value in values.items())] = values
    found["loss_chunk_size: 64"] = {"loss_chunk_size": 64}
    if dtype == torch.float32:
        options = {**(args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}), "dtype": "bfloat16"}
        found["model_init_kwargs: {dtype: bfloat16}"] = {"model_init_kwargs": options}
    found["optim: adafactor"] = {"optim": "adafactor"}
    return found


def smallest_gpu(memory: int) -> int | None:
    """Find the smallest of `GPUS` that has so many bytes for tensors, in GB; None if there is none."""
    return next((size for size in GPUS if memory <= _FILLED * size * 1e9), None)


def machine_memory(device: torch.device) -> int:
    """Bytes of a device that is there, or of the machine where it is the CPU or does not tell."""
    module: Any = getattr(torch, device.type, None)
    if hasattr(module, "mem_get_info"):
        return int(module.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def disk_needed(costs: Sequence[Cost]) -> int:
    """Sum the bytes that a chain takes at most at any time: all anchors, and the checkpoints of one."""
    return sum(cost.disk for cost in costs) + max((cost.checkpoints for cost in costs), default=0)


def trained_tokens(args: DistillConfig) -> int | None:
    """Count the tokens of a training whose rows are all full; None where the dataset decides, in epochs."""
    if args.max_steps <= 0 or not args.max_length:
        return None
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1)
    return args.max_steps * rows * args.max_length


def source_cost(name: str, source: Architecture, args: DistillConfig, calibration_tokens: int, speed: Speed) -> Cost:
    """Predict what the source takes: it is sorted and measured, not trained.

    Args:
        name: of the anchor.
        source: its shape.
        args: of the chain.
        calibration_tokens: behind its statistics.
        speed: of this machine.
    """
    return Cost(
        name=name,
        architecture=source,
        disk=_weights(source, args) + _statistics_disk(source),
        checkpoints=0,
        tokens=0,
        seconds=_calibration_seconds(source, calibration_tokens, speed),
        args=args,
        predict=lambda args, device: source_phases(source, args, calibration_tokens, device),
    )


def anchor_cost(upper: Architecture, step: Step, calibration_tokens: int, speed: Speed) -> Cost:
    """Predict what a lower anchor takes.

    Args:
        upper: the anchor above it.
        step: the anchor.
        calibration_tokens: behind its statistics.
        speed: of this machine.
    """
    lower, args = step.architecture, step.args

    def predict(args: DistillConfig, device: torch.device) -> list[Phase]:
        return anchor_phases(upper, replace(step, args=args), calibration_tokens, device)

    weights = sum(multiplied_weights(one) for one in (upper, step.second_teacher) if one is not None)
    cost = _trained_cost(step.name, lower, args, weights, calibration_tokens, speed, predict)
    if cost.seconds is None:
        return cost
    if step.matched is not None:
        # The statistics of both, and passes that compare their streams: another one where one is rotated first.
        both, passes = (upper, lower), 1 if lower.tied else 2
        compared = sum(_calibration_seconds(one, calibration_tokens, speed) for one in both)
        compared += passes * sum(_forward_seconds(one, calibration_tokens, speed) for one in both)
        return replace(cost, seconds=cost.seconds + compared)
    # Each block of layers that one could stand for is measured twice on one block of tokens, from its first layer on:
    # half a forward pass on average. Measured, SmolLM2-135M to 16 layers: 15,000 tokens for 28 blocks.
    chosen = len(measured_blocks(upper, lower.depth)) * calibration_length(upper.config)
    before = _forward_seconds(upper, chosen, speed) + _calibration_seconds(upper, calibration_tokens, speed)
    searched = 0.0
    if step.search is not None:
        # What layers cost is measured once for all shapes; each is refitted and compared, the best are trained.
        each = _calibration_seconds(upper, calibration_tokens, speed) + _forward_seconds(lower, SCORED_TOKENS, speed)
        searched = step.search["shapes"] * each
        searched += step.search["trainings"] * step.search["training_steps"] / args.max_steps * cost.seconds
    return replace(cost, seconds=cost.seconds + before + searched)


def bridge_cost(
    name: str,
    source: PretrainedConfig,
    student: Architecture,
    args: BridgeDistillConfig,
    calibration_tokens: int,
    speed: Speed,
    source_dtype: torch.dtype = torch.float32,
) -> Cost:
    """Predict what anchor zero takes.

    Args:
        name: of the anchor.
        source: config of its teacher, of any architecture.
        student: anchor zero.
        args: of the bridge.
        calibration_tokens: behind its statistics.
        speed: of this machine.
        source_dtype: that the source is loaded in.
    """
    count = count_parameters(source)

    def predict(args: BridgeDistillConfig, device: torch.device) -> list[Phase]:
        return bridge_phases(source, count, student, args, calibration_tokens, device, source_dtype)

    return _trained_cost(name, student, args, count, calibration_tokens, speed, predict)


def _trained_cost(
    name: str,
    lower: Architecture,
    args: DistillConfig,
    teacher_weights: int,
    calibration_tokens: int,
    speed: Speed,
    predict: Callable[[Any, torch.device], list[Phase]],
) -> Cost:
    weights, tokens = _weights(lower, args), trained_tokens(args)
    seconds = None
    if tokens is not None:
        passes = _step_cost(2.0 * teacher_weights, 2.0 * multiplied_weights(lower), args.swap_probability or 0)
        seconds = tokens / max(args.world_size, 1) * passes / speed.training
        seconds += _calibration_seconds(lower, calibration_tokens, speed)
    return Cost(
        name=name,
        architecture=lower,
        disk=weights + _statistics_disk(lower),
        checkpoints=_kept_checkpoints(args)
        * (weights + optimizer_bytes(lower, args, weight_dtype(args, lower.config))),
        tokens=tokens,
        seconds=seconds,
        args=args,
        predict=predict,
    )


def _weights(architecture: Architecture, args: DistillConfig) -> int:
    return architecture.num_parameters * weight_dtype(args, architecture.config).itemsize


def _statistics_disk(architecture: Architecture) -> int:
    return int(_STATISTICS_SHARE * _BF16_BYTES * architecture.num_parameters)


def _kept_checkpoints(args: DistillConfig) -> int:
    """How many checkpoints lie on the disk at once at most; the last one is written before an old one goes."""
    if str(args.save_strategy).rpartition(".")[2].lower() == "no":
        return 0
    kept = args.save_total_limit + 1 if args.save_total_limit else None
    steps = int(args.save_steps) if args.save_steps >= 1 else max(1, int(args.save_steps * args.max_steps))
    written = -(-args.max_steps // steps) if args.max_steps > 0 else 1
    return written if kept is None else min(kept, written)


# A model is loaded, or made from two anchors, before it is measured.
_LOADING_SECONDS = 1.0
# Writing one token at a time reads every weight for it: so many times as slow as reading a text.
_WRITING = 6.0


def measuring_seconds(weights: Sequence[float], tokens: int, speed: Speed) -> float:
    """Predict the time to measure the loss of some models.

    Args:
        weights: of each model, those that a token is multiplied with (`multiplied_weights`).
        tokens: that each is measured on.
        speed: of this machine.
    """
    return sum(_LOADING_SECONDS + 2.0 * count * tokens / speed.forward for count in weights)


def writing_seconds(weights: Sequence[float], tokens: int, speed: Speed) -> float:
    """Predict the time in which some models write text, one token at a time.

    Args:
        weights: as `measuring_seconds` takes them.
        tokens: that each writes.
        speed: of this machine.
    """
    return sum(_LOADING_SECONDS + _WRITING * 2.0 * count * tokens / speed.forward for count in weights)


def _calibration_seconds(architecture: Architecture, tokens: int, speed: Speed) -> float:
    # Summing the moments takes a fifth as long again.
    return 1.2 * _forward_seconds(architecture, tokens, speed)


def _forward_seconds(architecture: Architecture, tokens: int, speed: Speed) -> float:
    return 2.0 * multiplied_weights(architecture) * tokens / speed.forward
