"""Predict the memory of each phase of a build."""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cbd_trl.architectures import Architecture, decoder_layers
from cbd_trl.architectures.backbone import open_forward
from cbd_trl.losses.fused import default_chunk
from cbd_trl.recipe.trace import FUSED, Bytes, traced
from cbd_trl.surgery.blocks import spaced_blocks
from cbd_trl.teachers.local import Batch, LocalTeacher
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.hidden_states import LayerPairs
from cbd_trl.trainers.hybrid import Pass
from cbd_trl.trainers.model_setup import make_objective
from cbd_trl.trainers.step_loss import StepLoss


def half_dtype(args: DistillConfig) -> torch.dtype | None:
    """The dtype of mixed precision; None without."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _model(config: Any, dtype: torch.dtype, attention: str) -> Any:
    config = copy.deepcopy(config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    open_forward(model)
    return model


class _Timeline:
    """The most bytes alive before each of a series of events, beside those at the start."""

    def __init__(self, count: Bytes) -> None:
        self._count, self._start = count, count.now
        self.peaks: dict[str, int] = {}
        count.reset()

    def mark(self, event: str) -> None:
        peak = self._count.peak - self._start
        self.peaks[event] = max(self.peaks.get(event, 0), peak)
        self._count.reset()


def trace_step(
    student: Architecture,
    teacher: Architecture,
    blocks: Sequence[Sequence[int]],
    args: DistillConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, int]:
    half = half_dtype(args)
    attention = FUSED
    with traced(device, half) as count:
        theirs = _model(teacher.config, dtype, attention).eval().requires_grad_(False)
        ours = _model(student.config, dtype, attention).train()
        pairs = LayerPairs(ours, theirs, [list(block) for block in blocks], None, args)
        if args.gradient_checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        rows, length = args.per_device_train_batch_size, args.max_length or 1024
        ids = torch.zeros(rows, length, dtype=torch.long)
        batch = Batch.split({"input_ids": ids, "labels": ids})
        if args.gradient_accumulation_steps > 1:
            for parameter in ours.parameters():
                parameter.grad = torch.empty_like(parameter)
        line = _Timeline(count)

        def mixed() -> Any:
            return nullcontext() if half is None else torch.autocast("cpu", half)

        with torch.no_grad(), mixed(), pairs.teacher_outputs.recording() as teacher_states:
            predicted = LocalTeacher(theirs).predict(batch, ours)
        line.mark("teacher")

        def forward(through: Pass) -> Tensor:
            with pairs.student_outputs.recording() as states, mixed():
                rows_of = ours.get_output_embeddings().weight.shape[0]
                inside = StepLoss(
                    student=through.model,
                    labels_BT=batch.labels_BT,
                    teacher=predicted,
                    objective=make_objective(args, rows_of),
                    weights=args.weights(0.0),
                    pairs=pairs,
                    student_states=states,
                    teacher_states=teacher_states,
                    chunk=args.loss_chunk_size or default_chunk(rows_of, device),
                )
                return through.run(**batch.inputs, inside=inside)["total"]

        itself, beside = Pass(ours, ours), None
        layers = decoder_layers(ours)
        if pairs.hybrid is not None:
            with pairs.hybrid.at(0, itself) as hybrid, _marked(line, layers, "hybrid"):
                beside = forward(hybrid)
            line.mark("hybrid loss")
        with _marked(line, layers, "student"):
            loss = forward(itself)
        line.mark("student loss")
        loss = loss if beside is None else loss + beside
        del predicted, teacher_states
        loss.backward()
        line.mark("backward")
        return line.peaks


@contextmanager
def _marked(line: _Timeline, layers: Any, name: str) -> Iterator[None]:
    """Mark where the backward pass leaves the uppermost and the lowest layer."""

    def hook(event: str) -> Any:
        def enter(module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(lambda slope: line.mark(f"{name} {event}"))

        return enter

    places = {len(layers) - 1: "top", 0: "bottom"}
    handles = [layers[i].register_forward_pre_hook(hook(place), with_kwargs=True) for i, place in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Phase:
    """What a phase of a build takes at most.

    Args:
        name: of the phase.
        device: bytes on the device that trains.
        host: bytes in the machine's own memory; 0 where that is the device.
    """

    name: str
    device: int
    host: int


def anchor_phases(upper: Architecture, step: Any, calibration_tokens: int) -> list[Phase]:
    lower, args = step.architecture, step.args
    return [Phase("train", _training(lower, upper, args), 0)]


def bridge_phases(teacher: Any, student: Architecture, args: Any, calibration_tokens: int) -> list[Phase]:
    return []


def source_phases() -> list[Phase]:
    return []


def _bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    return architecture.num_parameters * dtype.itemsize


def weight_dtype(args: DistillConfig) -> torch.dtype:
    """The dtype of the weights: float32 unless the source is loaded otherwise."""
    options = args.model_init_kwargs
    kind = options.get("dtype") if isinstance(options, dict) else None
    found = getattr(torch, str(kind).removeprefix("torch."), torch.float32)
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def _training(lower: Architecture, upper: Architecture, args: DistillConfig) -> int:
    dtype = weight_dtype(args)
    trained, taught = _bytes(lower, dtype), _bytes(upper, dtype)
    peaks = _step_peaks(lower, upper, args, dtype)
    moments = 2 * trained
    update = trained + (trained if args.optim == "adamw_torch" and args.device.type != "cpu" else 0)
    return taught + trained + moments + max(update, *peaks.values())


def _step_peaks(lower: Architecture, upper: Architecture, args: DistillConfig, dtype: torch.dtype) -> dict[str, int]:
    blocks = spaced_blocks(upper.depth, lower.depth)
    single = sum(len(block.layers) == 1 for block in blocks)
    several = len(blocks) - single
    def at(singles: int, doubles: int, more: int = 0) -> dict[str, int]:
        sizes = [1] * (singles - 1) + [2] * doubles + [1]
        sizes[-2] += more
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        block_map = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
        return trace_step(lower.with_layers(range(len(sizes))), upper.with_layers(range(sum(sizes))), block_map, args, args.device, dtype)
    base = at(2, 1)
    def slope(other: dict[str, int]) -> dict[str, int]:
        return {event: other[event] - peak for event, peak in base.items()}
    by_single, by_double, by_more = slope(at(3, 1)), slope(at(2, 2)), slope(at(2, 1, 1))
    counts = (single - 2, several - 1, upper.depth - single - 2 * several)
    return {e: p + counts[0] * by_single[e] + counts[1] * by_double[e] + counts[2] * by_more[e] for e, p in base.items()}
