"""Operators: the rules that make a target's weights from two anchors. Pure functions, one table.

The weights they return compute each tensor when it is read, from the few of the anchors' tensors that it needs.
"""

from collections.abc import Callable, Sequence

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.surgery.blocks import select_layers, spaced_layers, swap_blocks
from cbd_trl.surgery.grow import grow_depth, grow_width, zero_pad
from cbd_trl.surgery.least_squares import least_squares_cut, plain_cut
from cbd_trl.surgery.norms import balance_norms
from cbd_trl.surgery.weights import LazyWeights, Weights
from cbd_trl.targets.nested import cut_upper, mixer, nested_alpha
from cbd_trl.targets.pair import Pair, Plan, layer_stack, swapped_blocks

Operator = Callable[[Pair, Plan], tuple[Weights, Architecture]]


def default_alpha(operator: str, pair: Pair, target: Architecture) -> float | None:
    """Compute the weight that `operator` gives the lower anchor at this target, None where it mixes nothing."""
    if operator == "linear":
        return pair.fraction(target)
    if operator == "nested" and not pair.equal_widths:
        return nested_alpha(pair, target)
    return None


def planned_architecture(operator: str, pair: Pair, target: Architecture) -> Architecture:
    """Compute the architecture that an operator makes of a shape, with the per-layer entries of the layers it takes.

    Args:
        operator: its name.
        pair: the anchors; no weight is read.
        target: depth and widths.
    """
    if operator in ("nested", "patch"):
        layers = [layer for _, layer in layer_stack(pair, Plan(target))]
        return pair.upper_architecture.resized(**target.sizes).with_layers(layers)
    if operator == "expand":
        return grow_depth({}, pair.lower_architecture.resized(**target.sizes), target.depth)[1]
    # Their tensors are made only when they are read.
    return linear(pair, Plan(target))[1] if operator == "linear" else target


def nested(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Take whole upper blocks for depth; in width the least-squares cut of the upper anchor, mixed with the lower one
    where they share coordinates (see `cut_upper` and `mixer`)."""
    if pair.equal_widths:
        return patch(pair, plan)
    cut, architecture = cut_upper(pair, plan)
    mixed = mixer(pair, plan)(cut, pair.lower)
    return _balanced(mixed, architecture, pair, [layer for _, layer in layer_stack(pair, plan)]), architecture


def patch(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Put whole blocks of the upper anchor in place of lower layers (boomerang distillation, arXiv 2510.05064); equal
    widths only."""
    check_patch(pair, plan.target)
    return swap_blocks(
        pair.lower,
        pair.lower_architecture,
        pair.upper,
        pair.upper_architecture,
        pair.blocks,
        swapped_blocks(pair, plan),
        pair.kept,
    )


def check_patch(pair: Pair, target: Architecture) -> None:
    """Check that no width differs: `patch` makes none.

    Raises:
        ValueError: a width differs.
    """
    if not pair.equal_widths or target.sizes != pair.upper_architecture.sizes:
        raise ValueError(
            "operator='patch' swaps whole blocks between anchors of equal widths, and these differ "
            f"({pair.upper_architecture.shape} and {pair.lower_architecture.shape}; target {target.shape}). "
            "Use operator='nested', which also interpolates widths."
        )


def slice_upper(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Cut the upper anchor alone: evenly spaced layers, least-squares cut in width."""
    widths = pair.upper_architecture.resized(**plan.target.sizes)
    layers = spaced_layers(widths.depth, plan.target.depth, widths.fits)
    if widths.sizes == pair.upper_architecture.sizes:
        return select_layers(pair.upper, widths, layers)
    cut = least_squares_cut(pair.upper, pair.upper_architecture, pair.moments(), widths)
    weights, architecture = select_layers(cut, widths, layers)
    return _balanced(weights, architecture, pair, layers), architecture


def expand(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Grow the lower anchor alone, exactly: the same logits at the target's size."""
    target = pair.lower_architecture.resized(**plan.target.sizes)
    return grow_depth(*grow_width(pair.lower, pair.lower_architecture, target), plan.target.depth)


def linear(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Average the anchors: theta = alpha * Trans(theta_small) + (1 - alpha) * Trans(theta_large) (arXiv 2605.07783).

    Trans is a plain cut or zero padding, and takes layers at equal relative depth. Layer types are those of the anchor
    of the greater weight or, if engines tell layers apart by position (`Architecture.fits`), as these have it.
    """
    alpha = pair.fraction(plan.target) if plan.alpha is None else plan.alpha
    depth = plan.target.depth

    def at_relative_depth(weights: Weights, architecture: Architecture) -> tuple[Weights, Architecture]:
        layers = [round(i * (architecture.depth - 1) / max(depth - 1, 1)) for i in range(depth)]
        return select_layers(weights, architecture, layers)

    large, architecture = at_relative_depth(pair.upper, pair.upper_architecture)
    small, small_architecture = at_relative_depth(pair.lower, pair.lower_architecture)
    target = (architecture if alpha < 0.5 else small_architecture).resized(**plan.target.sizes)
    if not pair.upper_architecture.off_pattern and not pair.lower_architecture.off_pattern:
        target = target.on_pattern()
    large = plain_cut(large, architecture, target)
    small = zero_pad(small, small_architecture, target)
    return LazyWeights(large, lambda key: torch.lerp(large[key].float(), small[key].float(), alpha)), target


OPERATORS: dict[str, Operator] = {
    "nested": nested,
    "patch": patch,
    "slice": slice_upper,
    "expand": expand,
    "linear": linear,
}
MIXING_OPERATORS = ("nested", "linear")


def _balanced(weights: Weights, architecture: Architecture, pair: Pair, layers: Sequence[int]) -> Weights:
    """Rescale to the norm gains of the upper anchor, from whose layers it is made, without changing the function."""
    like, _ = select_layers(pair.upper, pair.upper_architecture, layers)
    return balance_norms(weights, architecture, like)
