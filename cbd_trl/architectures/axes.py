"""Named axes: a tensor axis is a product of atomic dimensions, written `"group.query.dim width"`.

Seen through its atomic dimensions, a matrix of grouped-query heads is a plain (groups, queries per group, head dim,
width) array, so permuting, cutting and growing are indexing, whatever the family's storage order, fusing or
transposition.
"""

from collections.abc import Mapping

import torch

Axes = tuple[tuple[str, ...], ...]
Sizes = Mapping[str, int]


def parse_axes(text: str) -> Axes:
    """`"group.query.dim width"` -> `(("group", "query", "dim"), ("width",))`."""
    return tuple(tuple(axis.split(".")) for axis in text.split())


def axis_length(axis: tuple[str, ...], sizes: Sizes) -> int:
    """Multiply the sizes of the dimensions of an axis."""
    length = 1
    for dim in axis:
        length *= sizes[dim]
    return length


def tensor_shape(axes: Axes, sizes: Sizes) -> tuple[int, ...]:
    """The stored shape of a tensor with these axes."""
    return tuple(axis_length(axis, sizes) for axis in axes)


def dims_of(axes: Axes) -> tuple[str, ...]:
    """The atomic dimensions in storage order."""
    return tuple(dim for axis in axes for dim in axis)


def to_dims(tensor: torch.Tensor, axes: Axes, sizes: Sizes) -> torch.Tensor:
    """View a stored tensor as an array over its atomic dimensions.

    Raises:
        ValueError: the tensor does not have the shape of its axes and the config's sizes.
    """
    expected = tensor_shape(axes, sizes)
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"A tensor of shape {tuple(tensor.shape)} was given where the config has {expected} (axes {axes}). "
            "The weights do not belong to this config; load both from the same folder."
        )
    return tensor.reshape([sizes[dim] for dim in dims_of(axes)])


def from_dims(array: torch.Tensor, axes: Axes) -> torch.Tensor:
    """Back from atomic dimensions to the stored shape (inverse of `to_dims` at the array's own sizes)."""
    shape, position = [], 0
    for axis in axes:
        length = 1
        for _ in axis:
            length *= array.shape[position]
            position += 1
        shape.append(length)
    return array.reshape(shape).contiguous()


def select(tensor: torch.Tensor, axes: Axes, sizes: Sizes, index: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Take entries along atomic dimensions: `index[dim]` holds the positions to keep, in their new order."""
    array = to_dims(tensor, axes, sizes)
    for position, dim in enumerate(dims_of(axes)):
        if dim in index:
            array = array.index_select(position, index[dim].to(array.device))
    return from_dims(array, axes)


def prefix(
    tensor: torch.Tensor, axes: Axes, sizes: Sizes, new_sizes: Sizes, whole: tuple[str, ...] = ()
) -> torch.Tensor:
    """The first `new_sizes[dim]` entries along every atomic dimension; the stored axis `whole` stays as it is.

    Where the entries lie in one piece the result is a view.
    """
    array = to_dims(tensor, axes, sizes)
    kept = tuple(slice(0, sizes[dim] if axis == whole else new_sizes[dim]) for axis in axes for dim in axis)
    return from_dims(array[kept], axes)


def prefix_index(axis: tuple[str, ...], sizes: Sizes, new_sizes: Sizes) -> torch.Tensor:
    """Positions along one stored axis that survive the prefix cut, in order: (new length,) int64."""
    positions = torch.arange(axis_length(axis, sizes)).reshape([sizes[dim] for dim in axis])
    return positions[tuple(slice(0, new_sizes[dim]) for dim in axis)].reshape(-1)
