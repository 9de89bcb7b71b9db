"""What a run counts, guards and shows: means over tokens, the check of every step's loss, and the progress line."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from cbd_trl.losses.objective import TERMS, TermWeights, combine
from cbd_trl.losses.reduction import sums_per_row
from cbd_trl.teachers.local import Batch
from cbd_trl.trainers.checkpointing import after_divergence
from cbd_trl.utils.formatting import format_seconds
from cbd_trl.utils.modeling import has_float64
from cbd_trl.utils.progress import Ticker

Reduce = Callable[[Tensor], Tensor]


class TokenMeter:
    """Means over tokens of per-token terms: sums are kept, because a mean of batch means would favor the tokens of
    short batches."""

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
        # Thousands of batches are added up.
        row = row.to(torch.float64 if has_float64(row.device) else torch.float32)
        self._sums = row if self._sums is None else self._sums + row

    def means(self, sum_over_processes: Reduce = lambda sums: sums) -> dict[str, float]:
        """Compute the mean per token of every term since the last call, and start anew.

        Args:
            sum_over_processes: of a tensor.

        Returns:
            term -> mean; empty if nothing was added or no token was scored.
        """
        if self._sums is None:
            return {}
        *sums, tokens = sum_over_processes(self._sums).tolist()
        self._sums = None
        return {name: value / tokens for name, value in zip(self._names, sums, strict=True)} if tokens else {}


class EvaluationMeter:
    """Means over the tokens of an evaluation set, however its rows are batched, packed or spread over processes."""

    def __init__(self) -> None:
        self._meter = TokenMeter()

    def add(self, outputs: Mapping[str, Tensor], batch: Batch, weights: TermWeights, gather: Reduce) -> Tensor:
        """Add a batch.

        Args:
            outputs: what `StepLoss` returned for it.
            batch: its labels and row lengths.
            weights: of the terms in the loss.
            gather: collects a tensor (R, K) of R rows from all processes, without rows that fill up the last batch.

        Returns:
            the loss of each of its N scored tokens, (N,) in nats.
        """
        terms = {name: outputs[name] for name in TERMS if name in outputs}
        loss_N = combine(terms, weights)
        terms = {"loss": loss_N, **terms, "tokens": torch.ones_like(loss_N)}
        sums = [
            sums_per_row(term, batch.scored, batch.labels_BT.shape, batch.row_lengths_R) for term in terms.values()
        ]
        # Row by row, because the last batch is filled up with rows already seen, and gathering drops those.
        totals = dict(zip(terms, gather(torch.stack(sums, dim=1)).sum(0), strict=True))
        self._meter.add(totals, totals.pop("tokens"))
        return loss_N

    def metrics(self, prefix: str) -> dict[str, float]:
        """Compute the means.

        Args:
            prefix: of their names.
        """
        return {f"{prefix}_{name}": value for name, value in self._meter.means().items()}


class TokenCounter(TrainerCallback, ExportableState):
    """Counts what training has seen, and ends a run whose loss is not finite.

    Its tokens are kept in checkpoints and continued on resuming; its terms are those since a log.

    With `auto_find_batch_size` the Trainer begins anew where a batch did not fit: nothing of an attempt is left.

    Attributes:
        tokens: seen so far.
        terms: since the last log.
        loss: of the micro-batches since the last optimizer step, as shares of it; scalar.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0
        self.terms = TokenMeter()
        self.loss: Tensor | float = 0.0
        self._before = 0

    def begin(self) -> None:
        """Note that `Trainer.train` is called: what was seen before belongs to the model, whatever is begun anew."""
        self._before = int(self.tokens)

    def add(self, outputs: Mapping[str, Tensor], tokens: Tensor) -> None:
        """Add a micro-batch.

        Args:
            outputs: what `StepLoss` returned for it.
            tokens: how many it has in all processes, scalar.
        """
        sums = {name: outputs[name].sum() for name in (*TERMS, "hybrid") if name in outputs}
        scored = outputs["ce"]
        self.terms.add(sums, torch.full((), float(scored.numel()), device=scored.device))
        self.tokens = self.tokens + tokens

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

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End a run whose loss is not finite, before the step changes a weight.

        One number an optimizer step is read from the device for it; the Trainer reads one a micro-batch, to leave such
        losses out of its logs (`logging_nan_inf_filter`).

        Args:
            args, state, control, kwargs: as in the Trainer's callbacks.

        Raises:
            ValueError: it is not finite, in whichever process.
        """
        total, self.loss = self.loss, 0.0
        if not isinstance(total, Tensor) or math.isfinite(loss := _sum_over_processes(total).item()):
            return
        means = self.terms.means(_sum_over_processes)
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        teacher = " The teacher's own loss (teacher_ce) is not finite either: look at its weights and dtype first."
        raise ValueError(
            f"The loss of step {state.global_step + 1} is {loss} (not finite: {', '.join(wrong) or 'the sum'}). "
            f"Training stopped there, since every later step would be lost.{teacher if 'teacher_ce' in wrong else ''} "
            f"{after_divergence(args)}"
        )


def _sum_over_processes(tensor: Tensor) -> Any:
    return reduce(tensor, "sum")


# Steps that the rates are taken over: enough for hybrids, which are beside some steps only, to even out.
_WINDOW = 50
# As often as tqdm draws.
_SECONDS_SHOWN = 0.1


def show_progress(trainer: Any, label: str) -> None:
    """Put a `ProgressLine` in the place of the Trainer's own bar.

    Where there is none (`disable_tqdm`, or a notebook, which has a table of its own) nothing is changed.

    Args:
        trainer: a `DistillTrainer`.
        label: what the line begins with.
    """
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLine(label, lambda: trainer._counter.tokens))


class ProgressLine(ProgressCallback):
    """`85M 3/5 · step 120/500 · 1,240 tokens/s · 6 min left · ce 2.41 (teacher 2.20)`.

    On a terminal one line, rewritten after every step; elsewhere a line at each training log, and one a minute between
    logs that are far apart. What the Trainer logs is printed as ever, above it. Only the main process prints;
    the tokens are those of all processes.

    Args:
        label: what the line begins with.
        tokens: how many were trained on so far, those before a checkpoint included; a tensor is read once it is shown.
        clock: seconds, from any moment.
    """

    def __init__(
        self, label: str, tokens: Callable[[], Tensor | int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._label, self._tokens, self._clock = label, tokens, clock
        # (seconds, step, tokens) at the ends of the last steps. The first is set when a step begins: what a run
        # resumed from a checkpoint has behind it, and the time it took to skip that data, are not its speed.
        self._marks: deque[tuple[float, int, Tensor | int]] = deque(maxlen=_WINDOW + 1)
        self._shown = -math.inf
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
            # Reading the tokens waits for the device.
            if not self._off_screen and self._clock() - self._shown >= _SECONDS_SHOWN:
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
        """Print what is logged, and keep its losses for the line; off a terminal, print the line below it."""
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
        """Format the line.

        Args:
            state: of the Trainer.
        """
        parts = [self._label, f"step {state.global_step}/{state.max_steps}"]
        if len(self._marks) > 1:
            (begun, first, before), (now, last, tokens) = self._marks[0], self._marks[-1]
            seconds = max(now - begun, 1e-9)
            left = (state.max_steps - state.global_step) * seconds / max(last - first, 1)
            parts += [f"{int(tokens - before) / seconds:,.0f} tokens/s", f"{format_seconds(left)} left"]
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
        self._shown = self._clock()
        bar.set_description_str(self.line(state), refresh=False)
