"""Exact growth: a wider or deeper model that computes the same logits."""

import math
from collections.abc import Sequence

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Axes, dims_of, from_dims, to_dims
from cbd_trl.surgery.blocks import select_layers, spaced_layers
from cbd_trl.surgery.weights import Weights


def grow_width(weights: Weights, architecture: Architecture, target: Architecture) -> tuple[Weights, Architecture]:
    """Grow every width to `target`'s; logits stay equal.

    RMSNorm: new channels are written as zero, gains times sqrt(d_old / d_new), epsilon times d_old / d_new (q/k norms
    share that epsilon, so what they normalise is scaled to it). LayerNorm: every new channel is written as the mean of
    the old ones, new gains and biases are 0, old gains and epsilon scaled likewise. New heads and neurons get zero
    output projections. What reads a new coordinate, and the inner weights of new heads and neurons, repeat old ones,
    so that training can move away from zero; where a norm goes over all heads (OLMo 2), m copies of a head share its
    square: each has 1 / sqrt(m) of its weights and sqrt(m) times its gain.

    Returns:
        Weights, and the architecture with its new epsilon.
    """
    ratio = architecture.sizes["width"] / target.sizes["width"]
    readers = _reader_axes(architecture)
    centred = architecture.family.norm_type == "layer"
    over_output = {norm.name: norm for norm in architecture.output_norms}
    before_norm = {norm.projection: norm for norm in architecture.output_norms}
    grown = {}
    for key, axes in architecture.tensors.items():
        module, kind = key.rsplit(".", 1)
        array, is_norm = to_dims(weights[key], axes, architecture.sizes), module in architecture.norms
        for dim in dict.fromkeys(dims_of(axes)):
            fill = ("zero" if centred else "repeat") if is_norm else _fill(dim, axes, readers.get(module), centred)
            array = _extend(array, axes, dim, target.sizes[dim], fill)
        if is_norm and kind == "weight":
            array = array * math.sqrt(_old_share(axes[0], architecture, target))
        if module in over_output:
            array = array * _copies(axes, axes[0], architecture, target).sqrt().to(array)
        if module in before_norm:
            axis = before_norm[module].axis
            array = array * math.sqrt(ratio / _old_share(axis, architecture, target))
            array = array / _copies(axes, axis, architecture, target).sqrt().to(array)
        grown[key] = from_dims(array, axes)
    return grown, target.with_eps(architecture.eps * ratio)


def _old_share(axis: Sequence[str], architecture: Architecture, target: Architecture) -> float:
    """Length of an axis before growing over that after it."""
    return math.prod(architecture.sizes[dim] for dim in axis) / math.prod(target.sizes[dim] for dim in axis)


def _copies(axes: Axes, norm_axis: Sequence[str], architecture: Architecture, target: Architecture) -> torch.Tensor:
    """How many of a grown tensor's coordinates along a norm's axis are the same old one, itself included; float64.

    The residual stream's new channels are no copies but zero.
    """
    copies = torch.ones((), dtype=torch.float64)
    for dim in dims_of(axes):
        old = torch.arange(target.sizes[dim]) % architecture.sizes[dim]
        repeated = dim in norm_axis and dim != "width"
        copies = copies[..., None] * (old.bincount()[old] if repeated else torch.ones(1))
    return copies


def grow_depth(weights: Weights, architecture: Architecture, depth: int) -> tuple[Weights, Architecture]:
    """Insert evenly spaced layers that add nothing; logits stay equal.

    Output projections and biases of a new layer are zero, or the gains of the norms that follow them; the rest of it
    is a copy of the layer after it.

    Raises:
        ValueError: `depth` is smaller than the model's.
    """
    if depth < architecture.depth:
        raise ValueError(
            f"Cannot grow {architecture.depth} layers to {depth}. Ask for {architecture.depth} or more, or keep fewer "
            "with `select_layers`."
        )
    old = spaced_layers(depth, architecture.depth)
    following = [next(i for i, position in enumerate(old) if position >= layer) for layer in range(depth)]
    grown, deeper = select_layers(weights, architecture, following)
    for layer in sorted(set(range(depth)) - set(old)):
        _silence(grown, deeper, layer)
    return grown, deeper


def _silence(weights: Weights, architecture: Architecture, layer: int) -> None:
    norms = architecture.family.output_norms(architecture.config)
    for site in architecture.family.sites:
        if site.axis == ("width",):
            continue
        for reader in site.readers:
            for kind in ("weight", "bias"):
                # Through a norm that has only zeros to divide, gradients would be enormous.
                key = architecture.layer_name(layer, f"{norms.get(reader, reader)}.{kind}")
                if key in weights:
                    weights[key] = torch.zeros_like(weights[key])


def _reader_axes(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """{reading module: the axis it reads along}; a tied table counts as what writes the stream."""
    return {reader: site.axis for site in architecture.sites for reader in site.readers}


def _fill(dim: str, axes: Axes, read_axis: Sequence[str] | None, centred: bool) -> str:
    reads = read_axis is not None and dim in read_axis
    if dim == "width":
        if reads:
            return "repeat"
        return "mean" if centred else "zero"
    return "zero" if reads else "repeat"


def _extend(array: torch.Tensor, axes: Axes, dim: str, size: int, fill: str) -> torch.Tensor:
    position = dims_of(axes).index(dim)
    old = array.shape[position]
    if size == old:
        return array
    if fill == "repeat":
        return array.index_select(position, torch.arange(size, device=array.device) % old)
    new_shape = list(array.shape)
    new_shape[position] = size - old
    new = array.mean(position, keepdim=True).expand(new_shape) if fill == "mean" else array.new_zeros(new_shape)
    return torch.cat([array, new], position)


def zero_pad(weights: Weights, architecture: Architecture, target: Architecture) -> Weights:
    """Every tensor padded with zeros to `target`'s widths: not exact; the Trans(theta_small) of arXiv 2605.07783."""
    padded = {}
    for key, axes in architecture.tensors.items():
        array = to_dims(weights[key], axes, architecture.sizes)
        for dim in dict.fromkeys(dims_of(axes)):
            array = _extend(array, axes, dim, target.sizes[dim], "zero")
        padded[key] = from_dims(array, axes)
    return padded
