"""How long the demo still takes: predicted from one measured forward pass, corrected by the stages as they finish."""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

from cbd_trl.recipe.estimate import BF16_SPEED, step_cost

# What choosing 16 of 30 layers comes to, in tokens of the source's forward pass.
_CHOOSING_TOKENS = 15_000


class Clock:
    """Predicts the time left of a run of known stages.

    Args:
        seconds: stage -> predicted seconds, in order; 0 for one that has nothing left to do.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._predicted = dict(seconds)
        self._actual: dict[str, float] = {}
        self._running: tuple[str, float] | None = None

    def start(self, stage: str) -> None:
        """End the stage that runs, if any, and begin another.

        Args:
            stage: one of those predicted.
        """
        self.stop()
        self._running = (stage, time.perf_counter())

    def stop(self) -> None:
        """End the stage that runs, if any."""
        if self._running is not None:
            stage, started = self._running
            self._actual[stage] = time.perf_counter() - started
            self._running = None

    def seconds(self, stage: str) -> float:
        """Predicted seconds of a stage, corrected by how the finished stages compare with their predictions."""
        predicted = sum(self._predicted[name] for name in self._actual)
        actual = sum(self._actual.values())
        return self._predicted[stage] * (actual / predicted if predicted > 1 else 1.0)

    def left(self) -> float:
        """Predicted seconds of everything that is not finished, the running stage counted whole."""
        return sum(self.seconds(stage) for stage in self._predicted if stage not in self._actual)


def predict(
    sizes: list[int],
    targets: int,
    operators: int,
    *,
    swap_probabilities: Sequence[float],
    speed: float,
    bf16: bool,
    steps: int,
    step_tokens: int,
    calibration_tokens: int,
    held_out_tokens: int,
    answer_tokens: int,
) -> dict[str, float]:
    """Seconds of every stage of the demo.

    Args:
        sizes: parameters of the source and of the lower anchors, largest first.
        targets: how many sizes are made.
        operators: how many models of each.
        swap_probabilities: share of each lower anchor's steps that have a hybrid beside them.
        speed: tokens per second of the source's forward pass.
        bf16: whether training is in mixed precision.
        steps: optimiser steps per anchor.
        step_tokens: tokens in a step.
        calibration_tokens: tokens of an anchor's statistics.
        held_out_tokens: tokens that every model is measured on.
        answer_tokens: tokens of an answer.

    Returns:
        {"anchor 1": seconds, ..., "sweep": seconds, "answers": seconds}.
    """
    shares = [size / sizes[0] for size in sizes]
    training = speed * (BF16_SPEED if bf16 else 1.0)
    seconds = {}
    for number, ((upper, lower), hybrids) in enumerate(
        zip(pairwise(shares), swap_probabilities, strict=True), start=1
    ):
        step = step_cost(upper, lower, hybrids)
        seconds[f"anchor {number}"] = steps * step_tokens * step / training + calibration_tokens * 1.2 * lower / speed
    # Only the first has layers to choose.
    seconds["anchor 1"] += (calibration_tokens * 1.2 + _CHOOSING_TOKENS) / speed
    mean = sum(shares) / len(shares)
    models = len(shares) + targets * operators
    seconds["sweep"] = models * (1.0 + held_out_tokens * mean / speed)
    # Writing one token at a time reads every weight for it: about six times as slow as reading.
    seconds["answers"] = (len(shares) + targets) * (1.0 + answer_tokens * 6 * mean / speed)
    return seconds


def peak_memory() -> float:
    """The most memory this process has held, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
