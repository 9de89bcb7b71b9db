"""Operators: the rules that make a target's weights from two anchors. Pure functions, one table.

What they return works out each tensor when it is asked for, from the few of the anchors' tensors that it needs.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from cbd_trl.architectures import Architecture, OutputNorm, Site
from cbd_trl.architectures.axes import Axes, Sizes, dims_of, from_dims, prefix_index, to_dims
from cbd_trl.chain.depths import blocks_for_depth
from cbd_trl.surgery.blocks import check_blocks, select_layers, spaced_layers, swap_blocks
from cbd_trl.surgery.cut import gain_ratio, least_squares_cut, plain_cut
from cbd_trl.surgery.grow import grow_depth, grow_width, zero_pad
from cbd_trl.surgery.lazy import LazyWeights
from cbd_trl.surgery.norms import balance_norms, fold_norms, folds
from cbd_trl.surgery.statistics import SiteStatistics
from cbd_trl.surgery.weights import Weights, readers_of, site_norms

# Of 0.25, 0.5, 0.75 and 1 the best alpha was 0.5, 0.75 and 1 at 0.32, 0.61 and 0.81 of the way down (SmolLM2-135M).
NESTED_ALPHA_POWER = 0.75
# What reads the heads (attention's output projection) is better left to the upper anchor: with alpha to the power of 1,
# 1.6, 2.3 and 4 there alone 3.368, 3.352, 3.346 and 3.342 nats (504 and 432 channels, mean of two texts). Queries and
# keys, the table and the norms do not matter; feed-forwards are best as they are.
NESTED_OUTPUT_POWER = 3.0


@dataclass(frozen=True)
class Pair:
    """Two neighbouring anchors.

    Args:
        upper, lower: weights, the lower cut from the upper in shared coordinates.
        upper_architecture, lower_architecture: what the weights mean.
        statistics: the upper anchor's moments; None only where no width differs.
        blocks: for each lower layer the upper layers it stands for.
        kept: the one of them that it was cut from.
        costs: what it costs, in nats per token, that it stands for them; None = unknown.
    """

    upper: Weights
    upper_architecture: Architecture
    lower: Weights
    lower_architecture: Architecture
    statistics: SiteStatistics | None
    blocks: Sequence[Sequence[int]]
    kept: Sequence[int]
    costs: Sequence[float] | None = None

    @property
    def equal_widths(self) -> bool:
        return self.upper_architecture.sizes == self.lower_architecture.sizes

    def fraction(self, target: Architecture) -> float:
        """(N_large - N) / (N_large - N_small) in parameters: 0 at the upper anchor, 1 at the lower one."""
        large, small = self.upper_architecture.num_parameters, self.lower_architecture.num_parameters
        return (large - target.num_parameters) / (large - small)


@dataclass(frozen=True)
class Plan:
    """What an operator is asked to make.

    Args:
        target: depth and widths.
        alpha: weight of the lower anchor in the mix, 0 to 1; None = the operator's own rule.
        swapped: lower layers replaced by their upper blocks; None = as `blocks_for_depth` has it.
    """

    target: Architecture
    alpha: float | None = None
    swapped: Collection[int] | None = None


Operator = Callable[[Pair, Plan], tuple[Weights, Architecture]]


def default_alpha(operator: str, pair: Pair, target: Architecture) -> float | None:
    """The weight that `operator` gives the lower anchor at this target, None where it mixes nothing."""
    if operator == "linear":
        return pair.fraction(target)
    if operator == "nested" and not pair.equal_widths:
        return pair.fraction(target) ** NESTED_ALPHA_POWER
    return None


def nested(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Whole upper blocks for depth; in width the least-squares cut of the upper anchor, mixed with the lower one
    where they share coordinates (see `cut_upper` and `mixer`)."""
    if pair.equal_widths:
        return patch(pair, plan)
    cut, architecture = cut_upper(pair, plan)
    mixed = mixer(pair, plan)(cut, pair.lower)
    return _balanced(mixed, architecture, pair, [layer for _, layer in layer_stack(pair, plan)]), architecture


def cut_upper(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """The upper anchor's part in `nested`: the least-squares cut of those of its layers that the target is made of,
    norm gains folded into the readers."""
    widths = pair.upper_architecture.resized(**plan.target.sizes)
    cut = least_squares_cut(pair.upper, pair.upper_architecture, _needed(pair), widths, fold=True)
    return select_layers(cut, widths, [layer for _, layer in layer_stack(pair, plan)])


def mixer(pair: Pair, plan: Plan) -> Callable[[Weights, Weights], Weights]:
    """The mix that `nested` makes of the cut of the upper anchor and the lower one, for any weights of the two.

    Every output that the lower anchor has is alpha * lower + (1 - alpha) * cut, with what the cut reads from new
    coordinates in its part; new outputs are the cut's at full strength. A swapped block is the cut of its upper
    layers; an unswapped layer is mixed with the cut of the upper layer it came from. For what reads the heads alpha is
    taken to the power of `NESTED_OUTPUT_POWER`.

    Returns:
        (weights of `cut_upper`, weights of the lower anchor) -> the target's weights, float32 where they are mixed.
        Gradients flow to both.
    """
    alpha = default_alpha("nested", pair, plan.target) if plan.alpha is None else plan.alpha
    assert alpha is not None
    stack, below = layer_stack(pair, plan), pair.lower_architecture
    target = pair.upper_architecture.resized(**plan.target.sizes).with_layers([layer for _, layer in stack])
    scale, inputs = _target_gauge(pair, target), _input_dims(target)
    outputs = {reader for site in target.sites if "dim" in site.axis for reader in site.readers}

    def mix(cut: Weights, lower: Weights) -> Weights:
        folded = fold_norms(lower, below)

        def tensor(key: str) -> torch.Tensor:
            layer, name = target.split_name(key)
            source = layer if layer is None else stack[layer][0]
            if layer is not None and source is None:
                return cut[key]
            own = key if source is None else below.layer_name(source, name)
            axes, base, small = target.tensors[key], cut[key].float(), folded[own].float() * scale(own)
            share = alpha**NESTED_OUTPUT_POWER if key.rsplit(".", 1)[0] in outputs else alpha
            return _mix(base, small, axes, (target.sizes, below.sizes), inputs.get(key, ()), share)

        return LazyWeights(target.tensors, tensor)

    return mix


def layer_stack(pair: Pair, plan: Plan) -> list[tuple[int | None, int]]:
    """For each layer of a target the lower layer that is mixed into it, None in a swapped block, and the upper one."""
    check_blocks(pair.blocks, pair.lower_architecture.depth, pair.upper_architecture.depth)
    swapped, stack = _swapped(pair, plan), list[tuple[int | None, int]]()
    for i, block in enumerate(pair.blocks):
        stack += [(None, layer) for layer in block] if i in swapped else [(i, pair.kept[i])]
    return stack


def patch(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Whole blocks of the upper anchor in place of lower layers (boomerang distillation, arXiv 2510.05064); equal
    widths only."""
    check_patch(pair, plan.target)
    return swap_blocks(
        pair.lower,
        pair.lower_architecture,
        pair.upper,
        pair.upper_architecture,
        pair.blocks,
        _swapped(pair, plan),
        pair.kept,
    )


def check_patch(pair: Pair, target: Architecture) -> None:
    """Refuse widths that differ, which `patch` cannot make.

    Raises:
        ValueError: any width does.
    """
    if not pair.equal_widths or target.sizes != pair.upper_architecture.sizes:
        raise ValueError(
            "operator='patch' swaps whole blocks between anchors of equal widths, and these differ "
            f"({pair.upper_architecture.shape} and {pair.lower_architecture.shape}; target {target.shape}). "
            "Use operator='nested', which also interpolates widths."
        )


def slice_upper(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """The upper anchor alone: evenly spaced layers, least-squares cut in width."""
    widths = pair.upper_architecture.resized(**plan.target.sizes)
    layers = spaced_layers(widths.depth, plan.target.depth)
    if widths.sizes == pair.upper_architecture.sizes:
        return select_layers(pair.upper, widths, layers)
    cut = least_squares_cut(pair.upper, pair.upper_architecture, _needed(pair), widths)
    weights, architecture = select_layers(cut, widths, layers)
    return _balanced(weights, architecture, pair, layers), architecture


def expand(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """The lower anchor alone, grown exactly: the same logits at the target's size."""
    target = pair.lower_architecture.resized(**plan.target.sizes)
    return grow_depth(*grow_width(pair.lower, pair.lower_architecture, target), plan.target.depth)


def linear(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """theta = alpha * Trans(theta_small) + (1 - alpha) * Trans(theta_large) (arXiv 2605.07783): plain cut, zero
    padding, layers at equal relative depth; what kind of layer each is, as in the anchor of the greater weight."""
    alpha = pair.fraction(plan.target) if plan.alpha is None else plan.alpha
    depth = plan.target.depth

    def at_relative_depth(weights: Weights, architecture: Architecture) -> tuple[Weights, Architecture]:
        layers = [round(i * (architecture.depth - 1) / max(depth - 1, 1)) for i in range(depth)]
        return select_layers(weights, architecture, layers)

    large, architecture = at_relative_depth(pair.upper, pair.upper_architecture)
    small, small_architecture = at_relative_depth(pair.lower, pair.lower_architecture)
    target = (architecture if alpha < 0.5 else small_architecture).resized(**plan.target.sizes)
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


def _needed(pair: Pair) -> SiteStatistics:
    if pair.statistics is None:
        raise ValueError(
            "Changing a width needs the upper anchor's statistics, which this chain does not hold. Build the chain "
            "again."
        )
    return pair.statistics


def _balanced(weights: Weights, architecture: Architecture, pair: Pair, layers: Sequence[int]) -> Weights:
    """The same function in the gauge of the upper anchor, from whose layers it is made: ready for training."""
    like, _ = select_layers(pair.upper, pair.upper_architecture, layers)
    return balance_norms(weights, architecture, like)


def _swapped(pair: Pair, plan: Plan) -> Collection[int]:
    return plan.swapped if plan.swapped is not None else blocks_for_depth(pair.blocks, plan.target.depth, pair.costs)


def _target_gauge(pair: Pair, target: Architecture) -> Callable[[str], float]:
    """What each tensor of the lower anchor, its norms folded, is multiplied by on the shared prefix of a target.

    The target's norms divide a stream or an output by the root mean square of more coordinates than the lower anchor's
    do; measured on the upper anchor, the two differ by the ratio of the prefixes' root mean squares, which is taken
    out here.
    """
    architecture, upper, statistics = pair.lower_architecture, pair.upper_architecture, _needed(pair)
    norms, readers = site_norms(architecture), readers_of(architecture)
    output_norms = {norm.name: norm for norm in architecture.output_norms if norm.axis != ("dim",)}

    def ratios(norm: Site | OutputNorm, norm_type: str) -> list[float]:
        """What the gains of the lower anchor and of the target lose to their root mean squares."""
        layer, name = architecture.split_name(norm.name)
        above = replace(norm, name=norm.name if layer is None else upper.layer_name(pair.kept[layer], name))
        prefixes = [prefix_index(norm.axis, upper.sizes, sizes) for sizes in (architecture.sizes, target.sizes)]
        return [gain_ratio(statistics, above, norm_type, prefix) for prefix in prefixes]

    @functools.cache
    def scale(key: str) -> float:
        module, kind = key.rsplit(".", 1)
        if kind == "bias":
            return 1.0
        if module in output_norms:
            ratio, target_ratio = ratios(output_norms[module], "rms")
            return target_ratio / ratio
        if module in norms:
            ratio, target_ratio = ratios(norms[module], architecture.family.norm_type)
            return target_ratio if folds(norms[module], architecture) else target_ratio / ratio
        if module in readers and folds(readers[module], architecture):
            return 1.0 / ratios(readers[module], architecture.family.norm_type)[0]
        return 1.0

    return scale


def _mix(
    base: torch.Tensor,
    lower: torch.Tensor,
    axes: Axes,
    sizes: tuple[Sizes, Sizes],
    inputs: tuple[str, ...],
    alpha: float,
) -> torch.Tensor:
    """One tensor of the target: the outputs that the lower anchor has are mixed, the others are the cut's.

    Reading from inputs that the lower anchor lacks is the cut's part alone, so it counts 1 - alpha on mixed outputs.
    """
    array, small = to_dims(base, axes, sizes[0]).clone(), to_dims(lower, axes, sizes[1])
    dims, shared = dims_of(axes), {dim: slice(0, sizes[1][dim]) for dim in dims_of(axes)}
    array[tuple(slice(None) if dim in inputs else shared[dim] for dim in dims)] *= 1 - alpha
    array[tuple(shared.values())].add_(small, alpha=alpha)
    return from_dims(array, axes)


def _input_dims(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """{key: the dimensions along which a tensor reads}, where it does; a tied head reads through the final norm's
    gain and bias."""
    reads = {f"{reader}.weight": site.axis for site in architecture.sites for reader in site.readers}
    if architecture.tied:
        final = architecture.family.final_site.name
        reads |= {f"{final}.weight": ("width",), f"{final}.bias": ("width",)}
    return reads
