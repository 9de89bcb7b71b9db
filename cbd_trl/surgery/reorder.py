"""Renumbering a model's coordinates: exact, a permutation (and mirror) that nothing outside sees."""

from dataclasses import dataclass

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Axes, Sizes, dims_of, from_dims, select, to_dims
from cbd_trl.surgery.weights import Weights


@dataclass(frozen=True)
class Order:
    """New coordinates of a model of L layers: entry i is the old position of what comes i-th.

    Args:
        width: (D,) int64, residual channels.
        ffn: (L, F) int64, FFN neurons of each layer.
        group: (L, G) int64, key/value groups of each layer.
        query: (L, G, Q) int64, query heads inside each group, the groups in their new order; None: they stay.
        signs: (D,) of 1 and -1, by which the channels in their new order are multiplied; None: by 1.
    """

    width: torch.Tensor
    ffn: torch.Tensor
    group: torch.Tensor
    query: torch.Tensor | None = None
    signs: torch.Tensor | None = None

    def index(self, layer: int | None) -> dict[str, torch.Tensor]:
        """Positions by atomic dimension, for the tensors of one layer or (None) those outside the layers."""
        if layer is None:
            return {"width": self.width}
        return {"width": self.width, "ffn": self.ffn[layer], "group": self.group[layer]}


def permute(weights: Weights, architecture: Architecture, order: Order) -> Weights:
    """The same model in new coordinates; the logits stay equal.

    Whole heads move, never coordinates inside one, because rotary embeddings give those their positions.

    Raises:
        ValueError: channels are to change sign in a model that has a LayerNorm, which subtracts their mean.
    """
    signs = order.signs if order.signs is not None and bool((order.signs < 0).any()) else None
    if signs is not None and architecture.family.norm_type != "rms":
        raise ValueError(
            f"Channels of a {architecture.config.model_type} model cannot change sign: its LayerNorm subtracts the "
            "mean over the channels, which that would change. Leave `signs` out."
        )
    permuted = {}
    for key, axes in architecture.tensors.items():
        layer = architecture.split_name(key)[0]
        tensor = select(weights[key], axes, architecture.sizes, order.index(layer))
        if order.query is not None and layer is not None and "query" in dims_of(axes):
            tensor = _reorder_queries(tensor, axes, architecture.sizes, order.query[layer])
        # A norm's gain is the same for a channel and its mirror image.
        if signs is not None and not (axes == (("width",),) and key.endswith(".weight")):
            tensor = _mirrored(tensor, axes, architecture.sizes, signs)
        permuted[key] = tensor
    return permuted


def _reorder_queries(tensor: torch.Tensor, axes: Axes, sizes: Sizes, query: torch.Tensor) -> torch.Tensor:
    dims = dims_of(axes)
    positions = (dims.index("group"), dims.index("query"))
    array = to_dims(tensor, axes, sizes).movedim(positions, (0, 1))
    query = query.to(array.device)
    array = array[torch.arange(len(query), device=array.device)[:, None], query]
    return from_dims(array.movedim((0, 1), positions), axes)


def _mirrored(tensor: torch.Tensor, axes: Axes, sizes: Sizes, signs: torch.Tensor) -> torch.Tensor:
    if "width" not in dims_of(axes):
        return tensor
    array = to_dims(tensor, axes, sizes)
    shape = [-1 if dim == "width" else 1 for dim in dims_of(axes)]
    return from_dims(array * signs.to(array).view(shape), axes)
