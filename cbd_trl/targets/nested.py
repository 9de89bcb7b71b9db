"""The mix of two anchors in width, for any weights of theirs: operator `nested` and the hybrids in training use it."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from cbd_trl.architectures import Architecture, OutputNorm, Site
from cbd_trl.architectures.axes import Axes, Sizes, dims_of, from_dims, prefix_index, to_dims
from cbd_trl.surgery.blocks import select_layers
from cbd_trl.surgery.least_squares import gain_ratio, least_squares_cut
from cbd_trl.surgery.norms import fold_norms, folds
from cbd_trl.surgery.weights import LazyWeights, Weights, readers_of, site_norms
from cbd_trl.targets.pair import Pair, Plan, layer_stack

# Of 0.25, 0.5, 0.75 and 1 the best alpha was 0.5, 0.75 and 1 at 0.32, 0.61 and 0.81 of the way down (SmolLM2-135M).
NESTED_ALPHA_POWER = 0.75
# What reads the heads (attention's output projection) is better left to the upper anchor: with alpha to the power of
# 1, 1.6, 2.3 and 4 there alone 3.368, 3.352, 3.346 and 3.342 nats (504 and 432 channels, mean of two texts). Queries
# and keys, the table and the norms do not matter; feed-forwards are best as they are.
NESTED_OUTPUT_POWER = 3.0


def nested_alpha(pair: Pair, target: Architecture) -> float:
    """Compute the weight of the lower anchor in a target."""
    return pair.fraction(target) ** NESTED_ALPHA_POWER


def cut_upper(pair: Pair, plan: Plan) -> tuple[Weights, Architecture]:
    """Cut the upper anchor for `nested`: the least-squares cut of those of its layers that the target is made of,
    norm gains folded into the readers."""
    widths = pair.upper_architecture.resized(**plan.target.sizes)
    cut = least_squares_cut(pair.upper, pair.upper_architecture, pair.moments(), widths, fold=True)
    return select_layers(cut, widths, [layer for _, layer in layer_stack(pair, plan)])


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
    alpha = nested_alpha(pair, plan.target) if plan.alpha is None else plan.alpha
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
            base, small, sizes = cut[key].float(), folded[own].float(), (target.sizes, below.sizes)
            share = alpha**NESTED_OUTPUT_POWER if key.rsplit(".", 1)[0] in outputs else alpha
            shares = (1 - share, share * scale(own))
            return _mix(base, small, target.tensors[key], sizes, inputs.get(key, ()), shares)

        return LazyWeights(target.tensors, tensor)

    return mix


def _target_gauge(pair: Pair, target: Architecture) -> Callable[[str], float]:
    """Build the function that scales each tensor of the lower anchor, norms folded, on the shared prefix of a target.

    The target's norms divide a stream or an output by the root mean square of more coordinates than the lower anchor's
    do; measured on the upper anchor, the two differ by the ratio of the prefixes' root mean squares, which is taken
    out here.
    """
    architecture, upper, statistics = pair.lower_architecture, pair.upper_architecture, pair.moments()
    norms, readers = site_norms(architecture), readers_of(architecture)
    output_norms = {norm.name: norm for norm in architecture.cut_output_norms}

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
    shares: tuple[float, float],
) -> torch.Tensor:
    """Mix one tensor of the target: the outputs that the lower anchor has are mixed, the others are the cut's.

    Reading from inputs that the lower anchor lacks is the cut's part alone, so it counts by its share on mixed
    outputs.

    Args:
        base, lower: the cut's and the lower anchor's tensor.
        axes: of both.
        sizes: of the target and of the lower anchor.
        inputs: the dimensions along which the tensor reads.
        shares: what each of the two is multiplied by where they are mixed.
    """
    array, small = to_dims(base, axes, sizes[0]), to_dims(lower, axes, sizes[1])
    dims, (wide, narrow) = dims_of(axes), sizes
    # Broadcast: of length 1 where all that a dimension has is mixed.
    partial = [wide[dim] if dim not in inputs and narrow[dim] < wide[dim] else 1 for dim in dims]
    share = array.new_ones(partial)
    share[tuple(slice(0, narrow[dim]) for dim in dims)] = shares[0]
    mixed = array * share
    mixed[tuple(slice(0, narrow[dim]) for dim in dims)].add_(small, alpha=shares[1])
    return from_dims(mixed, axes)


def _input_dims(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Map {key: the dimensions along which a tensor reads}, where it does; a tied head reads through the final norm's
    gain and bias."""
    reads = {f"{reader}.weight": site.axis for site in architecture.sites for reader in site.readers}
    if architecture.tied:
        final = architecture.family.final_site.name
        reads |= {f"{final}.weight": ("width",), f"{final}.bias": ("width",)}
    return reads
