"""The line that says how a training goes: step, tokens per second, time left, and the loss beside the teacher's."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from cbd_trl.utils.formatting import format_seconds
from cbd_trl.utils.progress import Ticker


class TokenMeter:
    """Sums per-token terms, and divides by the number of tokens when asked: a mean of batch means would favour the
    tokens of short batches."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, sums: Mapping[str, Tensor], tokens: Tensor) -> None:
        """Add the terms of one batch.

        Args:
            sums: scalar per term, summed over scored tokens.
            tokens: scalar, how many they were.
        """
        self._names = list(sums)
        row = torch.stack([*sums.values(), tokens]).detach()
        # Thousands of batches are added up; MPS has no float64.
        row = row.to(torch.float32 if row.device.type == "mps" else torch.float64)
        self._sums = row if self._sums is None else self._sums + row

    def means(self, add_up: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The mean per token of every term since the last call, and start anew.

        Args:
            add_up: sums a tensor over the processes.

        Returns:
            term -> mean; empty if nothing was added or no token was scored.
        """
        if self._sums is None:
            return {}
        *sums, tokens = add_up(self._sums).tolist()
        self._sums = None
        return {name: value / tokens for name, value in zip(self._names, sums, strict=True)} if tokens else {}


class TokenCounter(TrainerCallback, ExportableState):
    """What training has seen: its tokens, kept in checkpoints and continued on resuming, and the terms since a log.

    With `auto_find_batch_size` the Trainer begins anew where a batch did not fit: nothing of an attempt is left.

    Attributes:
        tokens: seen so far.
        terms: since the last log.
        loss: of the micro-batches since the last optimiser step, as shares of it; scalar.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0
        self.terms = TokenMeter()
        self.loss: Tensor | float = 0.0
        self._before = 0

    def begin(self) -> None:
        """Say that `Trainer.train` is called: what was seen before belongs to the model, whatever is begun anew."""
        self._before = int(self.tokens)

    def state(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return {"args": {}, "attributes": {"tokens": int(self.tokens)}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an attempt that was given up, and continue the count of the checkpoint, if there is one."""
        self.tokens, self.terms, self.loss = self._before, TokenMeter(), 0.0
        # Of a run that does not resume, the state holds what there was when it was made.
        callbacks: Any = state.stateful_callbacks if state.global_step else {}
        if saved := callbacks.get(type(self).__name__):
            self.tokens = saved["attributes"]["tokens"]


class LayerOutputs:
    """Records what layers return, while asked to.

    Forward hooks see the raw output of a layer; the last entry of a model's `hidden_states` is after the final norm.
    They are there during `recording` alone: a recompute under gradient checkpointing leaves no trace, nor does the
    trainer on a model that was given to it.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[int, nn.Module]] = []

    def watch(self, index: int, layer: nn.Module) -> None:
        """Record a layer's output under an index.

        Args:
            index: key of the record.
            layer: returns a tensor (B, T, D), or a tuple that starts with one.
        """
        self._watched.append((index, layer))

    @contextmanager
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Within it outputs are recorded.

        Yields:
            index -> output (B, T, D), filled as the layers run.
        """
        store: dict[int, Tensor] = {}

        def hook_for(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                store[index] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [layer.register_forward_hook(hook_for(index)) for index, layer in self._watched]
        try:
            yield store
        finally:
            for handle in handles:
                handle.remove()


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
