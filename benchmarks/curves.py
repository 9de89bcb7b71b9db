"""Loss against training tokens: measured by a callback while any trainer runs, and read off again.

A curve is a list of points `{"tokens": trained on so far, "loss": {text: nats per token}}`, in order.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback

from cbd_trl.trainers.checkpointing import last_checkpoint

Point = dict[str, Any]
Measure = Callable[[PreTrainedModel], dict[str, float]]
Keep = Callable[[list[Point]], None]


class _Points(TrainerCallback):
    """Measures the model after some of the optimizer steps."""

    def __init__(
        self, curve: list[Point], steps: Sequence[int], step_tokens: int, measure: Measure, keep: Keep | None
    ) -> None:
        self.curve, self.steps, self.step_tokens, self.measure = curve, set(steps), step_tokens, measure
        self.keep_curve = keep

    def keep(self, step: int, model: PreTrainedModel) -> None:
        self.curve.append({"tokens": step * self.step_tokens, "loss": self.measure(model)})
        if self.keep_curve is not None:
            self.keep_curve(self.curve)
        losses = {text: round(loss, 3) for text, loss in self.curve[-1]["loss"].items()}
        print(f"{self.curve[-1]['tokens']:>9,} tokens {losses}", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.keep(state.global_step, model)


def measured_curve(
    trainer: Trainer,
    steps: Sequence[int],
    measure: Measure,
    known: Sequence[Point] = (),
    keep: Keep | None = None,
) -> list[Point]:
    """Train, from the last checkpoint in the trainer's folder if there is one, and measure the model at some steps.

    Args:
        trainer: of one process, its rows all of `max_length` tokens (packing="wrapped").
        steps: after how many optimizer steps; 0 is before the first.
        measure: model -> loss of each text, nats per token.
        known: points of the run that left the checkpoint.
        keep: called with the curve so far, after each point.
    """
    args: Any = trainer.args
    step_tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.max_length
    checkpoint = last_checkpoint(args.output_dir)
    done = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    curve = [point for point in known if checkpoint is not None and point["tokens"] <= done * step_tokens]
    points = _Points(curve, steps, step_tokens, measure, keep)
    if 0 in steps and not curve:
        points.keep(0, trainer.model)
    trainer.add_callback(points)
    trainer.train(resume_from_checkpoint=checkpoint)
    return points.curve


def mean_loss(point: Mapping[str, Any]) -> float:
    """Of a point, the mean over the texts."""
    return sum(point["loss"].values()) / len(point["loss"])


def tokens_to_reach(curve: Sequence[Mapping[str, Any]], level: float) -> float | None:
    """Where the mean loss first comes down to a level, on straight lines between the points.

    Returns:
        tokens; None where the whole curve lies above.
    """
    if mean_loss(curve[0]) <= level:
        return float(curve[0]["tokens"])
    for before, after in pairwise(curve):
        above, below = mean_loss(before), mean_loss(after)
        if below <= level:
            share = (above - level) / (above - below)
            return float(before["tokens"] + share * (after["tokens"] - before["tokens"]))
    return None
