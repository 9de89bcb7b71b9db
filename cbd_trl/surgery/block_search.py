"""Which layers a shallower model keeps, and which others each of them stands for: the cheapest blocks, by measure.

Of two neighbours the wrong one can cost many times as much: the layer that makes the attention sink has no stand-in,
wherever an even spacing happens to put it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div
from tqdm.auto import tqdm

from cbd_trl.architectures import Architecture, decoder_layers
from cbd_trl.surgery.blocks import Block, Fits, anywhere, spaced_blocks
from cbd_trl.surgery.refit import OutputProjection, refit_layer
from cbd_trl.surgery.stream import layer_inputs

# First and last layer of a block -> what it costs to keep the one or the other of them.
_Costs = dict[tuple[int, int], dict[int, float]]


@torch.no_grad()
def cheapest_blocks(
    model: nn.Module,
    architecture: Architecture,
    depth: int,
    batches: Sequence[Mapping[str, torch.Tensor]],
    held_out: Mapping[str, torch.Tensor],
    progress: bool = False,
) -> list[Block]:
    """Split the layers of a model into consecutive blocks, one for each layer of a shallower model.

    Every block considered is measured alone: its first or its last layer, refitted (`refit_layers`) to end where the
    block ends, takes the place of the block, and the cost is the divergence KL(model || changed model) on held-out
    text. Of all ways to split the layers the one with the least sum of costs is found by dynamic programming: of those
    that keep each layer where engines take it for what it is (`Architecture.fits`), if there are any. The last layer,
    which writes what the head reads, is a block of its own.

    Args:
        model: the model; the same after as before.
        architecture: its.
        depth: number of blocks, 1 to the model's own depth.
        batches: model inputs of text to refit on, without padding.
        held_out: model inputs of other text to measure on.
        progress: show a progress bar.

    Returns:
        the blocks in order, with the layer that each keeps and what it costs, in nats per token.

    Raises:
        ValueError: the depth is out of range, or there is no text.
    """
    total = architecture.depth
    even = spaced_blocks(total, depth, architecture.fits)
    if depth in (1, total):
        return even
    if not batches:
        raise ValueError("There is no calibration text to choose the layers by. Give at least one batch.")
    measure = _Measure(model, architecture, batches, held_out)
    costs = _single(total)
    blocks = measured_blocks(architecture, depth)
    for first, last in tqdm(blocks, desc="Choosing layers", disable=not progress, leave=False):
        costs[first, last] = {kept: measure.cost(range(first, last + 1), kept) for kept in (first, last)}
    splits = (_shortest_path(costs, total, depth, *rule) for rule in _rules(architecture))
    return next(split for split in splits if split)


def measured_blocks(architecture: Architecture, depth: int) -> list[tuple[int, int]]:
    """First and last layer of every block of more than one that `cheapest_blocks` measures: each of them twice.

    Args:
        architecture: of the model; its blocks are as long as it takes for a split that keeps the pattern of its layers
            (`Architecture.fits`), if there is one.
        depth: number of blocks.
    """
    total = architecture.depth
    if depth in (1, total):
        return []
    for rule in _rules(architecture):
        for longest in range(ceil((total - 1) / (depth - 1)), total):
            blocks = [(first, first + more) for more in range(1, longest) for first in range(total - 1 - more)]
            costs: _Costs = {**_single(total), **{block: dict.fromkeys(block, 0.0) for block in blocks}}
            if _shortest_path(costs, total, depth, *rule):
                return blocks
    raise AssertionError("without a rule the shortest blocks split the layers")


def _rules(architecture: Architecture) -> list[tuple[Fits, Fits]]:
    """Which layer may be kept at a position, and begin a block there; the first rule that leaves a split counts.

    Where whole periods of a pattern stand for whole periods, targets between the two depths keep it, too.
    """
    return [(architecture.fits, architecture.begins_alike), (architecture.fits, anywhere), (anywhere, anywhere)]


def _single(total: int) -> _Costs:
    """Every layer as a block of its own."""
    return {(i, i): {i: 0.0} for i in range(total)}


def _shortest_path(costs: _Costs, total: int, depth: int, fits: Fits, begins: Fits) -> list[Block]:
    """The cheapest `depth` blocks that split `total` layers; empty where the rule leaves none."""
    ways: dict[tuple[int, int], tuple[float, list[Block]]] = {(0, 0): (0.0, [])}
    for (first, last), by_kept in sorted(costs.items()):
        for number in range(depth):
            allowed = [(cost, kept) for kept, cost in by_kept.items() if fits(kept, number)]
            if (first, number) not in ways or not allowed or not begins(first, number):
                continue
            cost, kept = min(allowed)
            sum_before, before = ways[first, number]
            way = (sum_before + cost, [*before, Block(tuple(range(first, last + 1)), kept, cost)])
            if (last + 1, number + 1) not in ways or way[0] < ways[last + 1, number + 1][0]:
                ways[last + 1, number + 1] = way
    return ways[total, depth][1] if (total, depth) in ways else []


class _Measure:
    """What it costs to let one layer stand for a block.

    Args:
        model, architecture: where the block is.
        batches: text to refit the layer on.
        held_out: text to measure on.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        batches: Sequence[Mapping[str, torch.Tensor]],
        held_out: Mapping[str, torch.Tensor],
    ) -> None:
        self._model, self._architecture, self._held_out = model, architecture, held_out
        self._layers = decoder_layers(model)
        self._recorded = [layer_inputs(model, self._layers, batch) for batch in batches]
        self._streams, _ = layer_inputs(model, self._layers, held_out)
        self._reference = self._log_probabilities()

    def cost(self, layers: Sequence[int], kept: int) -> float:
        """KL(model || model with the block replaced by its layer `kept`, refitted), nats per token."""
        ffn = OutputProjection(self._layers[kept], kept, self._architecture)
        with _unchanged(ffn.layer), self._in_place_of(layers, kept):
            streams = [into[layers[0]] for into, _ in self._recorded]
            calls = [calls[kept] for _, calls in self._recorded]
            # The last layer is never in a longer block, so there is a layer that reads the end of this one.
            refit_layer(ffn, streams, calls, [into[layers[-1] + 1] for into, _ in self._recorded])
            with self._starting_at(kept, self._streams[layers[0]]):
                changed = self._log_probabilities()
        return kl_div(changed, self._reference, log_target=True, reduction="sum").item() / changed[..., 0].numel()

    def _log_probabilities(self) -> torch.Tensor:
        """(B, T, V), float32."""
        return self._model(**self._held_out, use_cache=False).logits.float().log_softmax(-1)

    @contextmanager
    def _in_place_of(self, layers: Sequence[int], kept: int) -> Iterator[None]:
        """Within it the other layers of the block, and all before it, pass the stream on as it is."""
        skipped = [layer for i, layer in enumerate(self._layers) if i <= layers[-1] and i != kept]
        for layer in skipped:
            layer.forward = _pass_on  # of this object; the class's own comes back when it is deleted
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward

    @contextmanager
    def _starting_at(self, index: int, stream: torch.Tensor) -> Iterator[None]:
        """Within it this layer reads the given stream, (B, T, D)."""

        def instead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (stream, *args[1:]), kwargs

        handle = self._layers[index].register_forward_pre_hook(instead, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@contextmanager
def _unchanged(layer: nn.Module) -> Iterator[None]:
    """After it the layer's parameters are what they were."""
    before = [(parameter, parameter.detach().clone()) for parameter in layer.parameters()]
    try:
        yield
    finally:
        for parameter, values in before:
            parameter.copy_(values)
