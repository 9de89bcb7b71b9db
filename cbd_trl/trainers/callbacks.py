"""The line that says how a training goes: step, tokens per second, time left, and the loss beside the teacher's."""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from cbd_trl.utils.durations import format_seconds
from cbd_trl.utils.progress import Ticker

# Steps that the rates are taken over: enough for hybrids, which are beside some steps only, to even out.
_WINDOW = 50


def show_progress(trainer: Any, label: str) -> None:
    """Put a `ProgressLine` in the place of the Trainer's own bar.

    Where there is none (`disable_tqdm`, or a notebook, which has a table of its own) nothing is changed.

    Args:
        trainer: a `DistillTrainer`.
        label: what the line begins with.
    """
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLine(label, lambda: trainer.tokens_seen))


class ProgressLine(ProgressCallback):
    """`85M 3/5 · step 120/500 · 1,240 tokens/s · 6 min left · ce 2.41 (teacher 2.20)`.

    On a terminal one line, rewritten after every step; elsewhere a line at each training log, and one a minute between
    logs that are far apart. What the Trainer logs is printed as ever, above it. Only the main process says anything;
    the tokens are those of all processes.

    Args:
        label: what the line begins with.
        tokens: how many were trained on so far, those before a checkpoint included.
        clock: seconds, from any moment.
    """

    def __init__(self, label: str, tokens: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._label, self._tokens, self._clock = label, tokens, clock
        # (seconds, step, tokens) at the ends of the last steps. The first is set when a step begins: what a run
        # resumed from a checkpoint has behind it, and the time it took to skip that data, are not its speed.
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW + 1)
        self._losses: dict[str, float] = {}
        self._ticker = Ticker(clock)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the line.

        Args:
            args, state, control, kwargs: as in the Trainer's callbacks; so in all that follow.
        """
        self._marks.clear()
        self._losses.clear()
        self.current_step = state.global_step
        if state.is_world_process_zero:
            # disable=None: where there is no terminal.
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                bar_format="{desc}",
                dynamic_ncols=True,
                miniters=1,
                disable=None,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock with the first step."""
        if state.is_world_process_zero and not self._marks:
            self._mark(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rewrite the line."""
        if state.is_world_process_zero:
            self._mark(state)
            self._show(state)
            super().on_step_end(args, state, control, **kwargs)
            # A log has a line of its own.
            if self._off_screen and not control.should_log and self._ticker.due():
                self._print(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print what is logged, and what it says of the loss; off a terminal, the line below it."""
        super().on_log(args, state, control, logs=logs or {}, **kwargs)
        bar: Any = self.training_bar
        if bar is None or not logs or "loss" not in logs:
            return
        self._losses = {name: logs[name] for name in ("ce", "teacher_ce") if name in logs}
        if self._off_screen:
            self._ticker.reset()
            self._print(state)
        else:
            self._show(state)
            bar.refresh()

    def line(self, state: TrainerState) -> str:
        """What is shown.

        Args:
            state: of the Trainer.
        """
        parts = [self._label, f"step {state.global_step}/{state.max_steps}"]
        if len(self._marks) > 1:
            (begun, first, before), (now, last, tokens) = self._marks[0], self._marks[-1]
            seconds = max(now - begun, 1e-9)
            left = (state.max_steps - state.global_step) * seconds / max(last - first, 1)
            parts += [f"{(tokens - before) / seconds:,.0f} tokens/s", f"{format_seconds(left)} left"]
        if "ce" in self._losses:
            teacher = f" (teacher {self._losses['teacher_ce']:.2f})" if "teacher_ce" in self._losses else ""
            parts.append(f"ce {self._losses['ce']:.2f}{teacher}")
        return " · ".join(parts)

    def _mark(self, state: TrainerState) -> None:
        self._marks.append((self._clock(), state.global_step, self._tokens()))

    @property
    def _off_screen(self) -> bool:
        bar: Any = self.training_bar
        return bool(bar.disable)

    def _print(self, state: TrainerState) -> None:
        print(self.line(state), file=sys.stdout, flush=True)

    def _show(self, state: TrainerState) -> None:
        bar: Any = self.training_bar
        # Drawn at most ten times a second.
        bar.set_description_str(self.line(state), refresh=False)
