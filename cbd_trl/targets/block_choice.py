"""Choose which blocks of the upper anchor a target takes, by the assembled model and not block by block.

What a block is worth depends on what the others are: costs that were measured with every other layer the upper
model's choose well near the upper anchor, and less so where most layers are the lower one's.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState

from cbd_trl.architectures import decoder_layers
from cbd_trl.chain.model import build_model
from cbd_trl.losses.held_out import HeldOutDivergence, held_out_loss
from cbd_trl.shapes.depths import blocks_for_depth
from cbd_trl.surgery.block_search import skipped
from cbd_trl.surgery.weights import LazyWeights, Weights
from cbd_trl.targets.operators import OPERATORS, Pair, Plan, swapped_blocks
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.progress import Progress

# Each measures every block once; the last one mostly finds nothing better.
_ROUNDS = 3

Swapped = frozenset[int]


def blocks_in_context(pair: Pair, plan: Plan, operator: str, tokens: TokenBlocks) -> Plan:
    """Look for blocks that are better than a plan's, on calibration text.

    In float32, on the accelerator if there is one, with both anchors in memory at the target's widths: at most three
    times as many forward passes over the text as there are blocks.

    Args:
        pair: the anchors.
        plan: the target, its blocks and mix.
        operator: that makes it.
        tokens: the text.

    Returns:
        The plan with the blocks that `better_blocks` finds, if its loss is not higher with them; else as it is. So is
        one between whose anchors no depth lies.
    """
    row, depth = OPERATORS[operator], plan.target.depth
    if row.depths != "blocks" or depth in (pair.lower_architecture.depth, pair.upper_architecture.depth):
        return plan
    start = frozenset(swapped_blocks(pair, plan))
    # By the target's size, which may depend on the blocks where layers differ in their tensors.
    mix = row.default_alpha(pair, plan.target) if plan.alpha is None else plan.alpha
    mixed = dataclasses.replace(plan, alpha=mix)
    assembled = Assembled(pair, mixed, operator)
    weights, architecture = OPERATORS["slice"].make(pair, Plan(pair.upper_architecture))
    upper: Any = build_model(architecture, weights, torch.float32)
    divergence = HeldOutDivergence(upper.to(PartialState().device), tokens)
    with Progress("Comparing blocks", total=_ROUNDS * (len(pair.blocks) + 2)) as bar:

        def measure(swapped: Swapped) -> float:
            with assembled.of(swapped) as model:
                found = divergence(model)
            bar.update()
            return found

        found = better_blocks(pair, depth, start, measure)
    if found == start:
        return plan
    losses = []
    for swapped in (start, found):
        with assembled.of(swapped) as model:
            losses.append(held_out_loss(model, tokens))
    return plan if losses[1] > losses[0] else dataclasses.replace(mixed, swapped=found)


def better_blocks(pair: Pair, depth: int, start: Swapped, measure: Callable[[Swapped], float]) -> Swapped:
    """Find blocks that give the depth and of which the divergence is lower than at the start, if there are any.

    Round by round: what each block is worth is how much the divergence of the model as it is now rises, or falls, when
    that block alone is changed, whatever depth that gives. The blocks that are worth most are taken together where
    the divergence, measured, is lower with them. A block of one layer may be taken or not at any depth.

    Args:
        pair: its blocks and architectures.
        depth: of the target.
        start: indices of lower layers that are replaced by their blocks.
        measure: {indices} -> the divergence of the upper anchor from the model with these replaced.
    """
    known: dict[Swapped, float] = {}

    def cost(swapped: Swapped) -> float:
        if swapped not in known:
            known[swapped] = measure(swapped)
        return known[swapped]

    best, single = start, {i for i, block in enumerate(pair.blocks) if len(block) == 1}
    for _ in range(_ROUNDS):
        with_block = [cost(best | {i}) for i in range(len(pair.blocks))]
        worth = [cost(best - {i}) - cost_with for i, cost_with in enumerate(with_block)]
        chosen = frozenset(blocks_for_depth(pair.blocks, depth, worth, pair.kept, pair.upper_architecture.fits))
        alone = [best ^ {i} for i in single]  # these are measured already
        found = min([chosen, chosen | {i for i in single if worth[i] > 0}, *alone], key=cost)
        if cost(found) >= cost(best):
            break
        best = found
    return best


class Assembled:
    """The targets of one plan with any of the pair's blocks, of whatever depth these give.

    One model has the layers of all of them, and leaves out those that are not in use.

    Args:
        pair: the anchors.
        plan: widths, and what is mixed.
        operator: that makes the targets.
    """

    def __init__(self, pair: Pair, plan: Plan, operator: str) -> None:
        row = OPERATORS[operator]
        count = range(len(pair.blocks))
        (lower, _), (upper, _) = (
            row.make(pair, dataclasses.replace(plan, swapped=swapped)) for swapped in ((), count)
        )
        # Of each block the upper layers, then the lower one; which model's each is, and where it is there.
        sources: list[tuple[Weights, int]] = []
        layers: list[int] = []
        self._places: list[tuple[range, int]] = []
        for i, block in enumerate(pair.blocks):
            self._places.append((range(len(layers), len(layers) + len(block)), len(layers) + len(block)))
            sources += [*((upper, layer) for layer in block), (lower, i)]
            layers += [*block, pair.kept[i]]
        whole = pair.upper_architecture.resized(**plan.target.sizes).with_layers(layers)

        def tensor(key: str) -> torch.Tensor:
            layer, name = whole.split_name(key)
            if layer is None:
                return lower[key]
            weights, place = sources[layer]
            return weights[whole.layer_name(place, name)]

        model: Any = build_model(whole, LazyWeights(whole.tensors, tensor), torch.float32)
        self._model = model.to(PartialState().device)
        self._layers = decoder_layers(self._model)

    @contextmanager
    def of(self, swapped: Collection[int]) -> Iterator[Any]:
        """Give the model in which these lower layers are replaced by their blocks.

        Args:
            swapped: their indices.
        """
        unused = [
            place for i, (upper, lower) in enumerate(self._places) for place in ([lower] if i in swapped else upper)
        ]
        with skipped(self._layers[place] for place in unused):
            yield self._model
