"""Held-out loss of the models of a benchmark, each measured once on each text, and eta of those between two anchors.

Benchmarks that are given the same folder share what they measured, so far as chain, shape, method and text agree.

A measurement is `{"num_parameters", "seconds" (to make the model), "loss": {text: nats per token}}`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.curves import mean_loss
from cbd_trl import Chain
from cbd_trl.chain.anchor import Anchor
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.report.sweep import fingerprint
from cbd_trl.targets.request import Request, find_target
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.files import Results

Measurement = dict[str, Any]
Make = Callable[[], PreTrainedModel]
MEAN = "mean"


class HeldOut:
    """Losses on named texts, kept by what they depend on.

    Args:
        texts: {name: held-out text}.
        results: what was measured already.
        bf16: whether forward passes run in bf16 mixed precision.
    """

    def __init__(self, texts: Mapping[str, TokenBlocks], results: Results, bf16: bool = False) -> None:
        self.texts, self.results, self.bf16 = texts, results, bf16
        self._keys = {name: fingerprint(text.input_ids, text.labels, bf16) for name, text in texts.items()}

    def __call__(self, model: PreTrainedModel, texts: Sequence[str] | None = None) -> dict[str, float]:
        """Measure a model now, {text: nats per token}, on some texts or all; nothing is kept."""
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            return {name: held_out_loss(model, self.texts[name]) for name in (self.texts if texts is None else texts)}

    def anchor(self, anchor: Anchor) -> Measurement:
        """Measure an anchor of a chain."""
        return self.once(f"anchor {anchor.name}", [anchor.files], anchor.load_model)

    def target(self, chain: Chain, fields: Mapping[str, int], method: str, make: Make, *parts: Any) -> Measurement:
        """Measure a model between two anchors.

        Args:
            chain: the chain.
            fields: config fields of the model, as `from_chain` takes them.
            method: the operator, or another name of how it is made.
            make: makes it.
            parts: what else it depends on, as `fingerprint` takes it.
        """
        target = find_target(chain, Request(config=fields))
        files, shape = [anchor.files for anchor in target.anchors], target.architecture.shape
        return self.once(f"{dict(fields)} {method}", ["target", files, shape, method, *parts], make)

    def once(self, label: str, parts: Sequence[Any], make: Make) -> Measurement:
        """Measure a model on the texts that it was not measured on.

        Args:
            label: of the line that is printed.
            parts: all that the model depends on, as `fingerprint` takes it.
            make: makes it, where it is needed.
        """
        keys = {text: fingerprint(key, *parts) for text, key in self._keys.items()}
        missing = [text for text, key in keys.items() if self.results.get(key) is None]
        if missing:
            started = time.perf_counter()
            model = make()
            seconds = time.perf_counter() - started
            losses = self(model, missing)
            print(label, {text: round(loss, 3) for text, loss in losses.items()}, f"{seconds:.1f} s", flush=True)
            for text, loss in losses.items():
                found = {"num_parameters": model.num_parameters(), "seconds": seconds, "loss": loss}
                self.results.put(keys[text], found)
        entries = {text: self.results.get(key) for text, key in keys.items()}
        return {**next(iter(entries.values())), "loss": {text: entry["loss"] for text, entry in entries.items()}}


def divided(blocks: Mapping[str, TokenBlocks], count: int) -> tuple[dict[str, TokenBlocks], dict[str, TokenBlocks]]:
    """The first blocks of each text, on which a recipe is chosen, and the others, on which it is measured."""

    def part(text: TokenBlocks, rows: slice) -> TokenBlocks:
        return replace(text, input_ids=text.input_ids[rows], labels=text.labels[rows])

    first, others = (
        {name: part(text, rows) for name, text in blocks.items()} for rows in (slice(count), slice(count, None))
    )
    return first, others


def loss_on(measured: Mapping[str, Any], text: str) -> float:
    """Loss of a measurement on a text, or the mean over them for `MEAN`."""
    return mean_loss(measured) if text == MEAN else float(measured["loss"][text])


def share_of_way(smaller: Mapping[str, Any], larger: Mapping[str, Any], between: Mapping[str, Any]) -> float:
    """(N_t - N_S) / (N_L - N_S) of measurements: 0 at the smaller anchor, 1 at the larger one."""
    low, high, size = (float(measured["num_parameters"]) for measured in (smaller, larger, between))
    return (size - low) / (high - low)


def eta_on(
    text: str, smaller: Mapping[str, Any], larger: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]
) -> float | None:
    """eta of measurements on a text, or on the mean over the texts for `MEAN`.

    Returns:
        None where the larger anchor is not the better one, and there is no line to compare with.
    """
    low, high = loss_on(smaller, text), loss_on(larger, text)
    if high >= low:
        return None
    sizes = [share_of_way(smaller, larger, target) for target in targets]
    return eta(low, high, [loss_on(target, text) for target in targets], sizes)


def eta(smaller: float, larger: float, losses: Sequence[float], sizes: Sequence[float]) -> float:
    """The measure of merit.

    Args:
        smaller, larger: loss of the two anchors, nats per token.
        losses: of the targets.
        sizes: (N_t - N_S) / (N_L - N_S) of the targets, in (0, 1).

    Returns:
        1 on the straight line between the anchors.

    Raises:
        ValueError: the larger anchor is not the better one, so there is no line to be on.
    """
    if not larger < smaller:
        raise ValueError(
            f"The larger anchor's loss is {larger:.3f} and the smaller one's {smaller:.3f}: eta compares with what "
            "the larger one gains. Measure on text that it is better on."
        )
    return sum((smaller - loss) / (smaller - larger) for loss in losses) / sum(sizes)
