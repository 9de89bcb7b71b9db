"""What a run has seen: token-weighted means of the loss terms, the tokens so far, and the output of every layer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


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
