"""Operators: the rules that make a target's weights from two neighboring anchors. Pure functions, one table.

The weights they return compute each tensor when it is read, from the few of the anchors' tensors that it needs. A new
operator is a function and a row of `OPERATORS`; `from_chain`, calibration, the command line, model cards and reports
follow from the row.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cbd_trl.architectures import Architecture, OutputNorm, Site
from cbd_trl.architectures.axes import Axes, Sizes, dims_of, from_dims, prefix_index, to_dims
from cbd_trl.shapes.depths import blocks_for_depth
from cbd_trl.shapes.solve import DepthRule
from cbd_trl.surgery.blocks import check_blocks, select_layers, spaced_layers, swap_blocks
from cbd_trl.surgery.grow import check_experts, grow_depth, grow_width, zero_pad
from cbd_trl.surgery.least_squares import (
    Fit,
    cut_fits,
    gain_ratio,
    least_squares_cut,
    plain_cut,
    reader_fits,
    stream_ratio,
)
from cbd_trl.surgery.norms import balance_norms, fold_norms, folds
from cbd_trl.surgery.statistics import SiteStatistics
from cbd_trl.surgery.weights import LazyWeights, Weights, readers_of, site_norms

# Of 0.25, 0.5, 0.75 and 1 the best alpha was 0.5, 0.75 and 1 at 0.32, 0.61 and 0.81 of the way down (SmolLM2-135M).
NESTED_ALPHA_POWER = 0.75
# What reads the heads (attention's output projection) is better left to the upper anchor: with alpha to the power of
# 1, 1.6, 2.3 and 4 there alone 3.368, 3.352, 3.346 and 3.342 nats (504 and 432 channels, mean of two texts). Queries
# and keys, the table and the norms do not matter; feed-forwards are best as they are.
NESTED_OUTPUT_POWER = 3.0


@dataclass(frozen=True)
class Pair:
    """Two neighboring anchors.

    Args:
        upper, lower: weights, the lower cut from the upper in shared coordinates.
        upper_architecture, lower_architecture: of the weights.
        statistics: the upper anchor's moments; None only where no width differs.
        blocks: for each lower layer the upper layers it stands for.
        kept: the one of them that it was cut from.
        costs: what it costs, in nats per token, that it stands for them; None = unknown.
        alpha_power: power of the way down that the weight of the lower one is in `nested`; None for that of an anchor
            that was cut from the upper one. With 0 it counts in full everywhere: halfway between models that were
            trained apart may be worse than either.
    """

    upper: Weights
    upper_architecture: Architecture
    lower: Weights
    lower_architecture: Architecture
    statistics: SiteStatistics | None
    blocks: Sequence[Sequence[int]]
    kept: Sequence[int]
    costs: Sequence[float] | None = None
    alpha_power: float | None = None

    @property
    def equal_widths(self) -> bool:
        """Whether the anchors differ in depth alone."""
        return self.upper_architecture.sizes == self.lower_architecture.sizes

    def moments(self) -> SiteStatistics:
        """Return the upper anchor's statistics.

        Raises:
            ValueError: the pair has none.
        """
        if self.statistics is None:
            raise ValueError(
                "Changing a width needs the upper anchor's statistics, which this chain does not hold. Build the "
                "chain again."
            )
        return self.statistics

    def fraction(self, target: Architecture) -> float:
        """Compute (N_large - N) / (N_large - N_small) in parameters: 0 at the upper anchor, 1 at the lower one."""
        large, small = self.upper_architecture.num_parameters, self.lower_architecture.num_parameters
        return (large - target.num_parameters) / (large - small)


@dataclass(frozen=True)
class Plan:
    """What an operator is to make.

    Args:
        target: depth and widths.
        alpha: weight of the lower anchor in the mix, 0 to 1; None = the operator's own rule.
        swapped: lower layers replaced by their upper blocks; None = as `blocks_for_depth` chooses.
    """

    target: Architecture
    alpha: float | None = None
    swapped: Collection[int] | None = None


@dataclass(frozen=True)
class Operator:
    """An operator, and what others need to know of it.

    Args:
        make: (pair, plan) -> the target's weights and their architecture.
        label: its name in legends and tables.
        summary: one line that explains it in a report.
        sources: "upper", "lower" or both: the anchors it reads. At the shape of one of these `from_chain` returns that
            anchor as it is.
        depths: which depths it can make (`cbd_trl.shapes.solve.DepthRule`).
        alpha: (pair, target) -> the weight of the lower anchor that it takes by default, None where nothing is mixed;
            None for an operator that never mixes.
        architecture: (pair, target) -> the architecture it makes of a shape, with the per-layer entries of the layers
            it takes; the pair has no weights. It raises ValueError for a target that it cannot make.
        reported: whether a report measures it by default.
    """

    make: Callable[[Pair, Plan], tuple[Weights, Architecture]]
    label: str
    summary: str
    sources: tuple[str, ...] = ("upper", "lower")
    depths: DepthRule = "any"
    alpha: Callable[[Pair, Architecture], float | None] | None = None
    architecture: Callable[[Pair, Architecture], Architecture] = lambda pair, target: target
    reported: bool = True

    def default_alpha(self, pair: Pair, target: Architecture) -> float | None:
        """Compute the weight of the lower anchor at this target, None where nothing is mixed."""
        return None if self.alpha is None else self.alpha(pair, target)


def nested(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Take whole upper blocks for depth; in width the least-squares cut of the upper anchor, mixed with the lower one
    where they share coordinates (see `cut_upper` and `mixer`)."""
    if pair.equal_widths:
        return patch(pair, plan)
    cut, architecture = cut_upper(pair, plan)
    mixed = mixer(pair, plan)(cut, pair.lower)
    return _balanced(mixed, architecture, pair, _upper_layers(pair, plan)), architecture


def nested_alpha(pair: Pair, target: Architecture) -> float | None:
    """Compute the weight of the lower anchor in a target: None where only depth differs, and blocks are swapped."""
    return None if pair.equal_widths else _lower_share(pair, target)


def _lower_share(pair: Pair, target: Architecture) -> float:
    return pair.fraction(target) ** (NESTED_ALPHA_POWER if pair.alpha_power is None else pair.alpha_power)


def patch(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Put whole blocks of the upper anchor in place of lower layers (boomerang distillation, arXiv 2510.05064); equal
    widths only."""
    _check_patch(pair, plan.target)
    return swap_blocks(
        pair.lower,
        pair.lower_architecture,
        pair.upper,
        pair.upper_architecture,
        pair.blocks,
        swapped_blocks(pair, plan),
        pair.kept,
    )


def linear(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Average the anchors: theta = alpha * Trans(theta_small) + (1 - alpha) * Trans(theta_large) (arXiv 2605.07783).

    Trans is a plain cut or zero padding, and takes layers at equal relative depth. Layer types are those of the anchor
    of the greater weight or, if engines tell layers apart by position (`Architecture.fits`), as these have it; where
    layers of different types have different tensors, the nearest layers of the type are averaged.
    """
    alpha = pair.fraction(plan.target) if plan.alpha is None else plan.alpha
    depth = plan.target.depth

    def at_relative_depth(architecture: Architecture) -> list[int]:
        return [round(i * (architecture.depth - 1) / max(depth - 1, 1)) for i in range(depth)]

    greater = pair.upper_architecture if alpha < 0.5 else pair.lower_architecture
    target = greater.with_layers(at_relative_depth(greater)).resized(**plan.target.sizes)
    if not pair.upper_architecture.off_pattern and not pair.lower_architecture.off_pattern:
        target = target.on_pattern()

    def like_target(weights: Weights, architecture: Architecture) -> tuple[Weights, Architecture]:
        return select_layers(weights, architecture, architecture.of_kinds(at_relative_depth(architecture), target))

    large, architecture = like_target(pair.upper, pair.upper_architecture)
    small, small_architecture = like_target(pair.lower, pair.lower_architecture)
    large = plain_cut(large, architecture, target)
    small = zero_pad(small, small_architecture, target)
    return LazyWeights(large, lambda key: torch.lerp(large[key].float(), small[key].float(), alpha)), target


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


def _block_architecture(pair: Pair, target: Architecture) -> Architecture:
    """Give a target the per-layer entries of the upper layers that whole blocks put there."""
    return pair.upper_architecture.resized(**target.sizes).with_layers(_upper_layers(pair, Plan(target)))


def _patch_architecture(pair: Pair, target: Architecture) -> Architecture:
    _check_patch(pair, target)
    return _block_architecture(pair, target)


def _grown_architecture(pair: Pair, target: Architecture) -> Architecture:
    check_experts(pair.lower_architecture, target)
    return grow_depth({}, pair.lower_architecture.resized(**target.sizes), target.depth)[1]


def _linear_architecture(pair: Pair, target: Architecture) -> Architecture:
    # Its tensors are made only when they are read.
    return linear(pair, Plan(target))[1]


# The first is the default of `from_chain`; reports draw them in this order.
OPERATORS = {
    "nested": Operator(
        nested,
        "nested (default)",
        "The default: blocks of the upper anchor for depth; its least-squares cut, mixed with the lower anchor, for "
        "width.",
        depths="blocks",
        alpha=nested_alpha,
        architecture=_block_architecture,
    ),
    "patch": Operator(
        patch,
        "patch",
        "Blocks of the upper anchor, nothing mixed.",
        depths="blocks",
        architecture=_patch_architecture,
        reported=False,
    ),
    "linear": Operator(
        linear,
        "linear: the paper's formula",
        "Control: the formula of the paper (arXiv 2605.07783), an average of both anchors.",
        alpha=Pair.fraction,
        architecture=_linear_architecture,
    ),
    "slice": Operator(
        slice_upper,
        "slice: upper anchor alone",
        "Control: the upper anchor alone, cut.",
        sources=("upper",),
        depths="cut",
    ),
    "expand": Operator(
        expand,
        "expand: lower anchor alone",
        "Control: the lower anchor alone, grown without changing its function.",
        sources=("lower",),
        depths="grown",
        architecture=_grown_architecture,
    ),
}
DEFAULT_OPERATOR = next(iter(OPERATORS))


def cut_upper(pair: Pair, plan: Plan, fits: Callable[[Site, bool], Fit] | None = None) -> tuple[Weights, Architecture]:
    """Cut the upper anchor for `nested`: the least-squares cut of those of its layers that the target is made of,
    norm gains folded into the readers.

    Args:
        pair: the anchors.
        plan: the target.
        fits: of the sites, with an intercept or without, if they are there already (see `upper_fits`).
    """
    widths = pair.upper_architecture.resized(**plan.target.sizes)
    cut = least_squares_cut(pair.upper, pair.upper_architecture, pair.moments(), widths, fold=True, fits=fits)
    return select_layers(cut, widths, _upper_layers(pair, plan))


def upper_fits(pair: Pair, plan: Plan) -> dict[tuple[Site, bool], Fit]:
    """Compute the fits that `cut_upper` reads, by site and intercept: all that is expensive in it but one matrix
    product a tensor."""
    upper, used = pair.upper_architecture, {None, *_upper_layers(pair, plan)}
    widths = upper.resized(**plan.target.sizes)
    fit = reader_fits(pair.upper, upper, pair.moments(), widths, fold=True)
    wanted = [key for key in cut_fits(upper, widths) if upper.split_name(key[0].name)[0] in used]
    return {key: fit(*key) for key in wanted}


def mixer(pair: Pair, plan: Plan) -> Callable[[Weights, Weights], Weights]:
    """Build the function that mixes the cut of the upper anchor with the lower one, for any weights of the two.

    Every output that the lower anchor has is alpha * lower + (1 - alpha) * cut, with what the cut reads from new
    coordinates in its part; new outputs are the cut's at full strength. A swapped block is the cut of its upper
    layers; an unswapped layer is mixed with the cut of the upper layer it came from. For what reads the heads alpha is
    taken to the power of `NESTED_OUTPUT_POWER`.

    Returns:
        (weights of `cut_upper`, weights of the lower anchor) -> the target's weights, float32 where they are mixed.
        Gradients flow to both.
    """
    stack, below = layer_stack(pair, plan), pair.lower_architecture
    target = pair.upper_architecture.resized(**plan.target.sizes).with_layers([layer for _, layer in stack])
    alpha = _lower_share(pair, target) if plan.alpha is None else plan.alpha
    scale, inputs = _lower_scale(pair, target), _input_dims(target)
    outputs = {reader for site in target.sites if "dim" in site.axis for reader in site.readers}

    def mix(cut: Weights, lower: Weights) -> Weights:
        folded = fold_norms(lower, below)

        def tensor(key: str) -> torch.Tensor:
            layer, name = target.split_name(key)
            source = layer if layer is None else stack[layer][0]
            if layer is not None and source is None:
                return cut[key]
            own = key if source is None else below.layer_name(source, name)
            sizes = (target.sizes, below.sizes)
            share = alpha**NESTED_OUTPUT_POWER if key.rsplit(".", 1)[0] in outputs else alpha
            shares = (1 - share, share * scale(own))
            made: torch.Tensor = _Mix.apply(
                cut[key], folded[own], target.tensors[key], sizes, inputs.get(key, ()), shares
            )
            return made

        return LazyWeights(target.tensors, tensor)

    return mix


def swapped_blocks(pair: Pair, plan: Plan) -> Collection[int]:
    """Choose the lower layers that are replaced by their upper blocks."""
    if plan.swapped is not None:
        return plan.swapped
    return blocks_for_depth(pair.blocks, plan.target.depth, pair.costs, pair.kept, pair.upper_architecture.fits)


def layer_stack(pair: Pair, plan: Plan) -> list[tuple[int | None, int]]:
    """List for each layer of a target the lower layer mixed into it, None in a swapped block, and the upper one."""
    check_blocks(pair.blocks, pair.lower_architecture.depth, pair.upper_architecture.depth)
    swapped, stack = swapped_blocks(pair, plan), list[tuple[int | None, int]]()
    for i, block in enumerate(pair.blocks):
        stack += [(None, layer) for layer in block] if i in swapped else [(i, pair.kept[i])]
    return stack


def _upper_layers(pair: Pair, plan: Plan) -> list[int]:
    """List for each layer of a target the upper layer that it is made of."""
    return [layer for _, layer in layer_stack(pair, plan)]


def _check_patch(pair: Pair, target: Architecture) -> None:
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


def _balanced(weights: Weights, architecture: Architecture, pair: Pair, layers: Sequence[int]) -> Weights:
    """Rescale to the norm gains of the upper anchor, from whose layers it is made, without changing the function."""
    like, _ = select_layers(pair.upper, pair.upper_architecture, layers)
    return balance_norms(weights, architecture, like)


def _lower_scale(pair: Pair, target: Architecture) -> Callable[[str], float]:
    """Build the function that scales each tensor of the lower anchor, norms folded, on the shared prefix of a target.

    The target's norms divide a stream or an output by the root mean square of more coordinates than the lower anchor's
    do; measured on the upper anchor, the two differ by the ratio of the prefixes' root mean squares, which is taken
    out here.
    """
    architecture, upper, statistics = pair.lower_architecture, pair.upper_architecture, pair.moments()
    norms, readers = site_norms(architecture), readers_of(architecture)
    output_norms = {norm.name: norm for norm in architecture.cut_output_norms}
    stream = [stream_ratio(upper, statistics, cut) for cut in (architecture, target)]

    @functools.cache
    def prefixes(axis: tuple[str, ...]) -> list[torch.Tensor]:
        return [prefix_index(axis, upper.sizes, sizes) for sizes in (architecture.sizes, target.sizes)]

    @functools.cache
    def ratios(norm: Site | OutputNorm, norm_type: str) -> list[float]:
        """Compute what the gains of the lower anchor and of the target lose to their root mean squares."""
        layer, name = architecture.split_name(norm.name)
        above = replace(norm, name=norm.name if layer is None else upper.layer_name(pair.kept[layer], name))
        return [gain_ratio(statistics, above, norm_type, prefix) for prefix in prefixes(norm.axis)]

    @functools.cache
    def scale(key: str) -> float:
        module, kind = key.rsplit(".", 1)
        if module in architecture.writers:
            return stream[1] / stream[0]
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


class _Mix(torch.autograd.Function):
    """Mix one tensor of the target, in float32: the outputs that the lower anchor has are mixed, the others are the
    cut's.

    Reading from inputs that the lower anchor lacks is the cut's part alone, so it counts by its share on mixed
    outputs. A function of autograd, because the gradient of the lower tensor is a part of the mix's, and autograd's
    own way to it copies the whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        lower: torch.Tensor,
        axes: Axes,
        sizes: tuple[Sizes, Sizes],
        inputs: tuple[str, ...],
        shares: tuple[float, float],
    ) -> torch.Tensor:
        """Compute the mix.

        Args:
            ctx: for the gradient.
            base, lower: the cut's and the lower anchor's tensor.
            axes: of both.
            sizes: of the target and of the lower anchor.
            inputs: the dimensions along which the tensor reads.
            shares: what each of the two is multiplied by where they are mixed.
        """
        ctx.work, ctx.dtypes = (axes, sizes, inputs, shares), (base.dtype, lower.dtype)
        array, small = to_dims(base, axes, sizes[0]), to_dims(lower, axes, sizes[1])
        mixed = (array if array.dtype.itemsize <= 4 else array.float()) * _base_share(array.device, *ctx.work)
        mixed[_shared(axes, sizes[1])].add_(small, alpha=shares[1])
        return from_dims(mixed, axes)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of both tensors.

        Args:
            ctx: of the forward.
            gradient: of the mix.
        """
        axes, sizes, _, shares = ctx.work
        array, to_base, to_lower = to_dims(gradient, axes, sizes[0]), None, None
        if ctx.needs_input_grad[0]:
            to_base = from_dims(array * _base_share(array.device, *ctx.work), axes).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            to_lower = from_dims(array[_shared(axes, sizes[1])] * shares[1], axes).to(ctx.dtypes[1])
        return to_base, to_lower, None, None, None, None


def _shared(axes: Axes, narrow: Sizes) -> tuple[slice, ...]:
    """Where the lower anchor's tensor lies in the target's."""
    return tuple(slice(0, narrow[dim]) for dim in dims_of(axes))


def _base_share(
    device: torch.device,
    axes: Axes,
    sizes: tuple[Sizes, Sizes],
    inputs: tuple[str, ...],
    shares: tuple[float, float],
) -> torch.Tensor:
    """What the cut is multiplied by, float32; of length 1 where all that a dimension has is mixed."""
    wide, narrow = sizes
    partial = [wide[dim] if dim not in inputs and narrow[dim] < wide[dim] else 1 for dim in dims_of(axes)]
    share = torch.ones(partial, device=device)
    share[_shared(axes, narrow)] = shares[0]
    return share


def _input_dims(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Map {key: the dimensions along which a tensor reads}, where it does; a tied head reads through the final norm's
    gain and bias."""
    reads = {f"{reader}.weight": site.axis for site in architecture.sites for reader in site.readers}
    if architecture.tied:
        final = architecture.family.final_site.name
        reads |= {f"{final}.weight": ("width",), f"{final}.bias": ("width",)}
    return reads
