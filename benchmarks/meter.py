"""Seconds, tokens and memory of optimizer steps, of a Trainer or of a plain loop.

Memory above models, gradients and optimizer state =
    the highest resident size of the process during the timed steps (sampled every 5 ms)
    - its resident size just before the first step, when libraries, data, both models and the trainer are there
    - 12 bytes for each trained parameter: its float32 gradient and the two moments of Adam.
What is left are activations, logits and whatever the loss keeps. The resident size is the kernel's, so memory that
the allocator holds back counts as used. Gradients are subtracted in full even if the highest point came before they
existed, alike for every contestant.
"""

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from memory import PeakSampler, resident_bytes
from transformers import PreTrainedModel, Trainer, TrainerCallback

_GRADIENT_AND_MOMENTS = 12


def real_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


class Meter:
    """Times optimizer steps, each from the end of the one before, so that loading the data counts.

    Args:
        warm_up: first steps that are left out.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.tokens = 0
        self._seconds: list[float] = []
        self._tokens: list[int] = []
        self._sampler = PeakSampler()
        self._last = 0.0
        self._before = 0

    def begin(self) -> None:
        """Called just before the first step."""
        gc.collect()
        self._before = resident_bytes()
        self._last = time.perf_counter()
        if not self.warm_up:
            self._sampler.start()

    def step_done(self) -> None:
        """Called after each step; `tokens` holds the real tokens of all steps so far."""
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._tokens.append(self.tokens - sum(self._tokens))
        if len(self._seconds) == self.warm_up:
            self._sampler.start()
        self._last = time.perf_counter()

    def result(self, student: PreTrainedModel) -> dict[str, Any]:
        """Everything measured, with medians over the timed steps.

        Args:
            student: the trained model.
        """
        peak = self._sampler.stop()
        seconds, tokens = self._seconds[self.warm_up :], self._tokens[self.warm_up :]
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
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
