"""Choosing how to interpolate by measured loss, when calibration text is given."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from cbd_trl.chain.model import build_model
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.shapes.depths import blocks_for_depth
from cbd_trl.targets.operators import OPERATORS, Pair, Plan, layer_stack, swapped_blocks
from cbd_trl.targets.request import ANCHOR, Target
from cbd_trl.utils.blocks import TokenBlocks, calibration_length, token_blocks
from cbd_trl.utils.datasets import sft_dataset
from cbd_trl.utils.progress import Progress

CALIBRATION_TOKENS = 4096
_ALPHAS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0)


def calibration_tokens(target: Target, dataset: Dataset) -> TokenBlocks | None:
    """Take the first tokens of a dataset, to choose a target by its loss; None for an anchor, which has no choice."""
    if target.operator == ANCHOR:
        return None
    upper, dataset = target.anchors[0], sft_dataset(dataset, "calibration_dataset")
    return token_blocks(dataset, upper.load_tokenizer(), CALIBRATION_TOKENS, calibration_length(upper.config()))


def mean_loss(pair: Pair, plan: Plan, operator: str, tokens: TokenBlocks) -> float:
    """Measure the loss of the target that `operator` makes, on calibration text: mean nats per predicted token.

    In float32, on the accelerator if there is one.
    """
    weights, architecture = OPERATORS[operator].make(pair, plan)
    model: Any = build_model(architecture, weights, torch.float32)
    return held_out_loss(model.to(PartialState().device), tokens)


def choose_plan(pair: Pair, plan: Plan, operator: str, tokens: TokenBlocks) -> tuple[str, Plan]:
    """Choose the best of the operator's own candidates, `expand` and `slice`, by loss on calibration text.

    The candidates vary which blocks are swapped where it swaps blocks, and how much is mixed where it mixes; both ends
    included.
    """
    candidates = [(operator, candidate) for candidate in _candidates(pair, plan, operator)]
    candidates += [(end, dataclasses.replace(plan, alpha=None, swapped=None)) for end in ("expand", "slice")]
    losses = [mean_loss(pair, candidate, name, tokens) for name, candidate in Progress("Calibrating", candidates)]
    return candidates[min(range(len(candidates)), key=losses.__getitem__)]


def _candidates(pair: Pair, plan: Plan, operator: str) -> Iterator[Plan]:
    alphas: tuple[float | None, ...] = (None,)
    if OPERATORS[operator].default_alpha(pair, plan.target) is not None:
        alphas = (None, *_ALPHAS) if plan.alpha is None else (plan.alpha,)
    for swapped in _swaps(pair, plan, operator):
        for alpha in alphas:
            yield dataclasses.replace(plan, alpha=alpha, swapped=swapped)


def _swaps(pair: Pair, plan: Plan, operator: str) -> Iterator[frozenset[int] | None]:
    """List sets of blocks to swap: the default, the last, the first, and every other one if that gives the depth.

    Where the default leaves every layer where engines take it for what it is, so do all.
    """
    if OPERATORS[operator].depths != "blocks":
        yield None
        return
    usual = frozenset(swapped_blocks(pair, plan))
    last = frozenset(blocks_for_depth(pair.blocks, plan.target.depth))
    mirrored = [list(block) for block in reversed(pair.blocks)]
    count = len(pair.blocks)
    orders = {
        usual,
        last,
        frozenset(count - 1 - i for i in blocks_for_depth(_renumbered(mirrored), plan.target.depth)),
    }
    long = [i for i, block in enumerate(pair.blocks) if len(block) > 1]
    chosen = [i for i in last if i in long]
    if chosen:
        spread = frozenset(long[round(j * (len(long) - 1) / max(len(chosen) - 1, 1))] for j in range(len(chosen)))
        if sum(len(pair.blocks[i]) - 1 for i in spread) == sum(len(pair.blocks[i]) - 1 for i in chosen):
            orders.add(spread)
    if _fit(pair, plan, usual):
        orders = {order for order in orders if _fit(pair, plan, order)}
    yield from sorted(orders, key=sorted)


def _fit(pair: Pair, plan: Plan, swapped: frozenset[int]) -> bool:
    """Check whether engines that tell layers apart by position take those of a target for what they are."""
    stack = layer_stack(pair, dataclasses.replace(plan, swapped=swapped))
    return all(pair.upper_architecture.fits(layer, position) for position, (_, layer) in enumerate(stack))


def _renumbered(blocks: list[list[int]]) -> list[list[int]]:
    """Renumber the layers of blocks as 0, 1, 2, ..."""
    numbered, start = [], 0
    for block in blocks:
        numbered.append(list(range(start, start + len(block))))
        start += len(block)
    return numbered
