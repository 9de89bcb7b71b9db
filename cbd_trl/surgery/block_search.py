"""Choose the layers that a shallower model keeps, and the blocks that they stand for, by measured cost.

Of two neighbors the wrong one can cost many times as much: the layer that makes the attention sink has no stand-in,
wherever an even spacing happens to put it.

Shapes: N positions of the held-out text, D width, V vocabulary rows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div

from cbd_trl.architectures import Architecture, decoder_layers
from cbd_trl.architectures.backbone import Head, last_hidden, output_head
from cbd_trl.losses.fused import default_chunk
from cbd_trl.surgery.blocks import Block, Fits, anywhere, spaced_blocks
from cbd_trl.surgery.refit import layer_inputs, output_projection, refit_layer
from cbd_trl.utils.progress import Progress

# Positions, evenly spaced, on which candidates are compared first; the best are measured on all.
# The head is most of the work where the vocabulary is large.
_SAMPLE = 64
# Standard errors that a candidate's cost may lie below that of its sample.
_ERRORS = 2.0
# Logits compared at a time: what fits a CPU's caches.
_BLOCK_ELEMENTS = 2**19
# First and last layer of a block -> what it costs to keep the one or the other of them.
_Costs = dict[tuple[int, int], dict[int, float]]


class BlockSearch:
    """Splits the layers of a model into consecutive blocks, one for each layer of a shallower model.

    Every block considered is measured alone: its first or its last layer, refitted (`refit_layers`) to end where the
    block ends, takes the place of the block, and the cost is the divergence KL(model || changed model) on held-out
    text. Of all ways to split the layers the one with the least sum of costs is found by dynamic programming: of those
    that keep each layer where engines take it for what it is (`Architecture.fits`), if there are any. The last layer,
    which writes what the head reads, is a block of its own.

    A sample of the positions bounds each cost from below. The best way by these bounds is measured on all positions,
    again and again, until the best way is one that is measured whole: what cannot be a part of it is not. What was
    measured for one depth is known for the next.

    Args:
        model: the model; the same after as before.
        architecture: of the model.
        batches: model inputs of text to refit on, without padding.
        held_out: model inputs of other text to measure on.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        batches: Sequence[Mapping[str, torch.Tensor]],
        held_out: Mapping[str, torch.Tensor],
    ) -> None:
        self._model, self._architecture, self._batches, self._held_out = model, architecture, batches, held_out
        self._measure: _Measure | None = None
        self._candidates: dict[tuple[int, int], dict[int, _Candidate]] = {}

    @torch.no_grad()
    def cheapest(self, depth: int) -> list[Block]:
        """Find the cheapest way to split the layers.

        Args:
            depth: number of blocks, 1 to the model's own depth.

        Returns:
            the blocks in order, with the layer that each keeps and what it costs, in nats per token.

        Raises:
            ValueError: the depth is out of range, or there is no text.
        """
        total = self._architecture.depth
        even = spaced_blocks(total, depth, self._architecture.fits)
        if depth in (1, total):
            return even
        if not self._batches:
            raise ValueError("There is no calibration text to choose the layers by. Give at least one batch.")
        rule, blocks = _rule_and_blocks(self._architecture, depth)
        candidates = {
            block: self._candidates.setdefault(block, {kept: _Candidate(block, kept) for kept in block})
            for block in blocks
        }
        # A step for each candidate's bound and, at most, for its whole cost.
        with Progress("Choosing layers", total=4 * len(blocks)) as bar:
            measure = self._measure or _Measure(self._model, self._architecture, self._batches, self._held_out)
            self._measure = measure
            while True:
                costs = _single(total)
                costs |= {block: {kept: one.cost for kept, one in pair.items()} for block, pair in candidates.items()}
                found = _shortest_path(costs, total, depth, *rule)
                chosen = [candidates[b.layers[0], b.layers[-1]][b.kept] for b in found if len(b.layers) > 1]
                unknown = [candidate for candidate in chosen if not candidate.whole]
                if not unknown:
                    return found
                unbounded = [candidate for candidate in unknown if candidate.hidden_ND is None]
                for candidate in unbounded:
                    measure.bound(candidate)
                    bar.update()
                if not unbounded:
                    measure.measure_whole(unknown)
                    bar.update(len(unknown))


def measured_blocks(architecture: Architecture, depth: int) -> list[tuple[int, int]]:
    """List the blocks of more than one layer that `BlockSearch` may measure, each of them twice.

    Args:
        architecture: of the model; its blocks are as long as it takes for a split that keeps the pattern of its layers
            (`Architecture.fits`), if there is one.
        depth: number of blocks.
    """
    return [] if depth in (1, architecture.depth) else _rule_and_blocks(architecture, depth)[1]


def _rule_and_blocks(architecture: Architecture, depth: int) -> tuple[tuple[Fits, Fits], list[tuple[int, int]]]:
    """Find the first of the rules that leaves a split, and the blocks of more than one layer that it takes."""
    total = architecture.depth
    for rule in _rules(architecture):
        for longest in range(ceil((total - 1) / (depth - 1)), total):
            blocks = [(first, first + more) for more in range(1, longest) for first in range(total - 1 - more)]
            costs: _Costs = {**_single(total), **{block: dict.fromkeys(block, 0.0) for block in blocks}}
            if _shortest_path(costs, total, depth, *rule):
                return rule, blocks
    raise AssertionError("without a rule the shortest blocks split the layers")


def _rules(architecture: Architecture) -> list[tuple[Fits, Fits]]:
    """List the rules for which layer may be kept at a position, and begin a block there, the strictest first.

    Where whole periods of a pattern stand for whole periods, targets between the two depths keep it, too.
    """
    return [(architecture.fits, architecture.starts_period), (architecture.fits, anywhere), (anywhere, anywhere)]


def _single(total: int) -> _Costs:
    """Make every layer a block of its own."""
    return {(i, i): {i: 0.0} for i in range(total)}


def _shortest_path(costs: _Costs, total: int, depth: int, fits: Fits, begins: Fits) -> list[Block]:
    """Find the cheapest `depth` blocks that split `total` layers; empty where the rule leaves none."""
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


@dataclass
class _Candidate:
    """One layer standing for a block.

    Attributes:
        block: its first and its last layer.
        kept: the one of them that stays.
        cost: KL(model || changed model), nats per token; at least, where it is not measured whole.
        whole: whether it is measured on all positions.
        hidden_ND: last hidden states of the model so changed, (N, D), once there is a bound.
    """

    block: tuple[int, int]
    kept: int
    cost: float = 0.0
    whole: bool = False
    hidden_ND: torch.Tensor | None = None


class _Measure:
    """Measures the cost of letting one layer stand for a block.

    Never holds the logits of more than a chunk of positions.

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
        with output_head(model, keep=True) as head:
            self._head = head.to(_product_dtype(head))
        self._reference_ND = self._last_hidden()
        step = ceil(len(self._reference_ND) / _SAMPLE)
        self._sample = torch.arange(step // 2, len(self._reference_ND), step, device=self._reference_ND.device)
        # What every candidate is first compared with, (64, V): 67 MB for 262,144 tokens.
        self._sampled_nV = self._reference(self._sample)

    def bound(self, candidate: _Candidate) -> None:
        """Replace the block by the layer that stays, refitted, and bound what it costs."""
        (first, last), kept = candidate.block, candidate.kept
        ffn = output_projection(self._layers[kept], kept, self._architecture)
        with _unchanged(ffn.layer), self._in_place_of(last, kept):
            streams = [into[first] for into, _ in self._recorded]
            calls = [calls[kept] for _, calls in self._recorded]
            # The last layer is never in a longer block, so there is a layer that reads the end of this one.
            refit_layer(ffn, streams, calls, [into[last + 1] for into, _ in self._recorded])
            with self._starting_at(kept, self._streams[first]):
                hidden_ND = self._last_hidden()
        found = _divergence(self._sampled_nV, self._head, hidden_ND[self._sample])
        count, total = len(found), len(hidden_ND)
        error = found.std() * ((1 - count / total) / count) ** 0.5 if count < total else 0.0
        candidate.hidden_ND, candidate.whole = hidden_ND, count == total
        candidate.cost = max(0.0, float(found.mean() - _ERRORS * error))

    def measure_whole(self, candidates: Sequence[_Candidate]) -> None:
        """Measure the costs of candidates that have a bound on all positions."""
        hidden = [candidate.hidden_ND for candidate in candidates if candidate.hidden_ND is not None]
        parts: list[list[torch.Tensor]] = [[] for _ in hidden]
        positions = torch.arange(len(self._reference_ND), device=self._reference_ND.device)
        for part in positions.split(default_chunk(self._head.rows, positions.device)):
            reference_nV = self._reference(part)
            for found, hidden_ND in zip(parts, hidden, strict=True):
                found.append(_divergence(reference_nV, self._head, hidden_ND[part]))
        for candidate, found in zip(candidates, parts, strict=True):
            candidate.cost, candidate.whole = torch.cat(found).mean().item(), True

    def _reference(self, positions: torch.Tensor) -> torch.Tensor:
        """Compute log-probabilities of the unchanged model, (n, V)."""
        return self._head.logits(self._reference_ND[positions]).log_softmax(-1)

    def _last_hidden(self) -> torch.Tensor:
        """Compute the last hidden states, (N, D), in the dtype that the head multiplies in."""
        return last_hidden(self._model, **self._held_out).flatten(0, 1).to(self._head.weight_VD.dtype)

    def _in_place_of(self, last: int, kept: int) -> AbstractContextManager[None]:
        """Skip all layers up to the block's last one but for the one kept."""
        return skipped(layer for i, layer in enumerate(self._layers) if i <= last and i != kept)

    @contextmanager
    def _starting_at(self, index: int, stream: torch.Tensor) -> Iterator[None]:
        """Let this layer read the given stream, (B, T, D)."""

        def instead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (stream, *args[1:]), kwargs

        handle = self._layers[index].register_forward_pre_hook(instead, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _divergence(reference_nV: torch.Tensor, head: Head, hidden_nD: torch.Tensor) -> torch.Tensor:
    """Compute KL(reference || what the head makes of the hidden states), (n,), from log-probabilities (n, V)."""
    rows = reference_nV.shape[0] if reference_nV.is_cuda else max(1, _BLOCK_ELEMENTS // head.rows)
    pairs = zip(reference_nV.split(rows), head.logits(hidden_nD).split(rows), strict=True)
    found = [kl_div(logits.log_softmax(-1), log, log_target=True, reduction="none").sum(-1) for log, logits in pairs]
    return torch.cat(found)


def _product_dtype(head: Head) -> torch.dtype:
    """Choose the dtype of products with the head."""
    # bfloat16 where the CPU has instructions for it: 2.5 times as fast as float32, and a cost is off by 0.002.
    weight = head.weight_VD
    fast = weight.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast and weight.dtype == torch.float32 else weight.dtype


def _pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@contextmanager
def skipped(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let these layers of a model pass on the stream as it is."""
    layers = list(layers)
    for layer in layers:
        layer.forward = _pass_on  # of this object; the class's own comes back when it is deleted
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _unchanged(layer: nn.Module) -> Iterator[None]:
    """Restore the layer's parameters at the end."""
    before = [(parameter, parameter.detach().clone()) for parameter in layer.parameters()]
    try:
        yield
    finally:
        for parameter, values in before:
            parameter.copy_(values)
