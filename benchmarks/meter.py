"""Seconds, tokens and memory of optimizer steps, of a Trainer or of a plain loop.

Memory above models, gradients and optimizer state =
    the highest memory during the timed steps
    - that just before the first step, when libraries, data, both models and the trainer are there
    - three times the bytes of the trained parameters: the gradient and the two moments of Adam.
What is left are activations, logits and whatever the loss keeps. On the CPU memory is the resident size of the
process, sampled every 5 ms: the kernel's number, so that memory which the allocator holds back counts as used. On a
GPU it is the bytes that the allocator has handed out. Gradients are subtracted in full even if the highest point came
before they existed, alike for every contestant.
"""

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from benchmarks.memory import PeakSampler, resident_bytes

_GRADIENT_AND_MOMENTS = 3


class HostMemory(PeakSampler):
    """The resident size of this process."""

    def now(self) -> int:
        """Bytes."""
        return resident_bytes()

    def synchronize(self) -> None:
        """Nothing to wait for."""


class DeviceMemory:
    """What an accelerator's allocator has handed out, and the end of the work queued on it.

    Args:
        device: an accelerator.

    Raises:
        RuntimeError: its torch module counts no memory (Apple's MPS).
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        if not hasattr(self._module, "max_memory_allocated"):
            raise RuntimeError(f"torch.{device.type} counts no peak of memory: there is nothing to measure with here.")

    def now(self) -> int:
        """Bytes."""
        return self._module.memory_allocated(self._device)

    def start(self) -> None:
        """Begin."""
        self._module.reset_peak_memory_stats(self._device)

    def stop(self) -> int:
        """End.

        Returns:
            the peak in bytes.
        """
        return self._module.max_memory_allocated(self._device)

    def synchronize(self) -> None:
        """Wait for the device."""
        self._module.synchronize(self._device)


def real_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


class Meter:
    """Times optimizer steps, each from the end of the one before, so that loading the data counts.

    Args:
        warm_up: first steps that are left out.
        memory: what is measured; None: of the process.
    """

    def __init__(self, warm_up: int, memory: HostMemory | DeviceMemory | None = None) -> None:
        self.warm_up = warm_up
        self.tokens = 0
        self._seconds: list[float] = []
        self._tokens: list[int] = []
        self._memory = memory or HostMemory()
        self._last = 0.0
        self._before = 0

    def begin(self) -> None:
        """Called just before the first step."""
        gc.collect()
        self._memory.synchronize()
        self._before = self._memory.now()
        self._last = time.perf_counter()
        if not self.warm_up:
            self._memory.start()

    def step_done(self) -> None:
        """Called after each step; `tokens` holds the real tokens of all steps so far."""
        self._memory.synchronize()
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._tokens.append(self.tokens - sum(self._tokens))
        if len(self._seconds) == self.warm_up:
            self._memory.start()
        self._last = time.perf_counter()

    def result(self, student: PreTrainedModel) -> dict[str, Any]:
        """Everything measured, with medians over the timed steps.

        Args:
            student: the trained model.
        """
        peak = self._memory.stop()
        seconds, tokens = self._seconds[self.warm_up :], self._tokens[self.warm_up :]
        trained = sum(p.nbytes for p in student.parameters() if p.requires_grad)
        return {
            "seconds_per_step": statistics.median(seconds),
            "tokens_per_step": statistics.median(tokens),
            "tokens_per_second": statistics.median(t / s for t, s in zip(tokens, seconds, strict=True)),
            "peak_bytes": peak,
            "above_bytes": peak - self._before - _GRADIENT_AND_MOMENTS * trained,
            "seconds": seconds,
            "tokens": tokens,
        }


class _Steps(TrainerCallback):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._meter.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._meter.step_done()


def train_metered(trainer: Trainer, meter: Meter) -> dict[str, Any]:
    """Train, and measure every optimizer step.

    Args:
        trainer: ready to train.
        meter: new.

    Returns:
        what the meter measured.
    """
    inner = trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        meter.tokens += real_tokens(inputs)
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = counted  # type: ignore[method-assign]
    trainer.add_callback(_Steps(meter))
    trainer.train()
    model: Any = trainer.model
    return meter.result(model)
