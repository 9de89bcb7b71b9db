"""Exact growth: a wider or deeper model that computes the same logits."""

import math
from collections.abc import Sequence

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Axes, dims_of, from_dims, to_dims
from cbd_trl.surgery.blocks import select_layers, spaced_layers
from cbd_trl.surgery.lazy import LazyWeights
from cbd_trl.surgery.weights import Weights, norms_of, working


def grow_width(weights: Weights, architecture: Architecture, target: Architecture) -> tuple[Weights, Architecture]:
    """Grow every width to `target`'s; logits stay equal.

    RMSNorm: new channels are written as zero, gains times sqrt(d_old / d_new), epsilon times d_old / d_new (Qwen3's
    q/k norms share that epsilon, so q and k are scaled by sqrt(d_old / d_new) as well). LayerNorm: every new channel
    is written as the mean of the old ones, new gains and biases are 0, old gains and epsilon scaled likewise. New
    heads and neurons get zero output projections. What reads a new coordinate, and the inner weights of new heads and
    neurons, repeat old ones, so that training can move away from zero.

    Returns:
        Weights, and the architecture with its new epsilon.
    """
    ratio = architecture.sizes["width"] / target.sizes["width"]
    readers = _reader_axes(architecture)
    norms = norms_of(architecture)
    centred = architecture.family.norm_type == "layer"
    shared = architecture.family.shared_eps(architecture.config)

    def tensor(key: str) -> torch.Tensor:
        axes, (module, kind) = architecture.tensors[key], key.rsplit(".", 1)
        array = to_dims(weights[key], axes, architecture.sizes)
        if module in norms:
            fill = "zero" if centred else "repeat"
            array = _extend(array, axes, "width", target.sizes["width"], fill)
        else:
            for dim in dict.fromkeys(dims_of(axes)):
                array = _extend(array, axes, dim, target.sizes[dim], _fill(dim, axes, readers.get(module), centred))
        scales = (module in norms and kind == "weight") or architecture.split_name(module)[1] in shared
        if scales and ratio != 1:
            array = working(array) * math.sqrt(ratio)
        return from_dims(array, axes)

    return LazyWeights(architecture.tensors, tensor), target.with_eps(architecture.eps * ratio)


def grow_depth(weights: Weights, architecture: Architecture, depth: int) -> tuple[Weights, Architecture]:
    """Insert evenly spaced layers that add nothing; logits stay equal.

    Output projections and biases of a new layer are zero; the rest of it is a copy of the layer after it.

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
    repeated, deeper = select_layers(weights, architecture, following)
    outputs = {reader for site in architecture.family.sites if not site.norm for reader in site.readers}
    silent = {deeper.layer_name(layer, reader) for layer in set(range(depth)) - set(old) for reader in outputs}

    def tensor(key: str) -> torch.Tensor:
        return torch.zeros_like(repeated[key]) if key.rsplit(".", 1)[0] in silent else repeated[key]

    return LazyWeights(repeated, tensor), deeper


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

    def tensor(key: str) -> torch.Tensor:
        axes = architecture.tensors[key]
        array = to_dims(weights[key], axes, architecture.sizes)
        for dim in dict.fromkeys(dims_of(axes)):
            array = _extend(array, axes, dim, target.sizes[dim], "zero")
        return from_dims(array, axes)

    return LazyWeights(architecture.tensors, tensor)
