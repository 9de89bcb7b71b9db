"""Change a model's coordinates exactly: permute, sort by importance, mirror, or rotate them; the logits stay equal."""

import math
from dataclasses import dataclass

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Axes, Sizes, axis_length, dims_of, from_dims, select, to_dims
from cbd_trl.surgery.norms import balance_norms, fold_norms, folds
from cbd_trl.surgery.statistics import Change, Statistics
from cbd_trl.surgery.weights import LazyWeights, Weights, from_input_matrix, input_matrix, reader_keys
from cbd_trl.utils.progress import Progress

WIDTH = ("width",)
# A LayerNorm's bias is divided by its gain where a reader has no bias to take it: gains below this share of the median
# would make it so large that half precision loses the rest.
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Order:
    """New coordinates of a model of L layers: entry i is the old position of what comes i-th.

    Args:
        width: (D,) int64, residual channels.
        ffn: (L, F) int64, FFN neurons of each layer; (L, E, F), those of each expert, the experts in their new order.
        group: (L, G) int64, key/value groups of each layer.
        query: (L, G, Q) int64, query heads inside each group, the groups in their new order; None: they stay.
        signs: (D,) of 1 and -1, by which the channels in their new order are multiplied; None: by 1.
        expert: (L, E) int64, experts of each layer; None where the FFN is one.
        conv: (L, C) int64, channels of each layer's convolution; None in a model without.

    Rows of layers that have no such coordinates mean nothing.
    """

    width: torch.Tensor
    ffn: torch.Tensor
    group: torch.Tensor
    query: torch.Tensor | None = None
    signs: torch.Tensor | None = None
    expert: torch.Tensor | None = None
    conv: torch.Tensor | None = None

    def index(self, layer: int | None) -> dict[str, torch.Tensor]:
        """List positions by atomic dimension, for the tensors of one layer or (None) those outside the layers."""
        if layer is None:
            return {"width": self.width}
        ffn = {"ffn": self.ffn} if self.expert is None else {"expert": self.expert}
        orders = {**ffn, "group": self.group, "conv": self.conv}
        return {"width": self.width, **{dim: order[layer] for dim, order in orders.items() if order is not None}}

    def inside(self, layer: int | None) -> dict[tuple[str, str], torch.Tensor]:
        """List positions inside each entry of another dimension, {(other, dimension): (entries, positions)}."""
        orders = {("group", "query"): self.query, ("expert", "ffn"): None if self.expert is None else self.ffn}
        return {dims: order[layer] for dims, order in orders.items() if order is not None and layer is not None}


@dataclass(frozen=True)
class Importance:
    """How much each coordinate matters (any unit, larger is more important).

    Args:
        width: (D,) residual channels.
        ffn: (L, F) FFN neurons of each layer, or (L, E, F) those of each expert.
        group: (L, G) key/value groups of each layer.
        expert: (L, E) experts of each layer; None where the FFN is one.
        conv: (L, C) channels of each layer's convolution; None in a model without.
    """

    width: torch.Tensor
    ffn: torch.Tensor
    group: torch.Tensor
    expert: torch.Tensor | None = None
    conv: torch.Tensor | None = None


def importance(weights: Weights, architecture: Architecture, statistics: Statistics) -> Importance:
    """Score coordinates: root mean square activation times the size of what reads it.

    Channels are summed over all streams that layers read, each divided by its root mean square over all channels
    where no norm does it; neurons and heads are weighted by the norm of their output column. After Minitron, arXiv
    2407.14679, section 2.2, which uses mean |x|. An expert matters by its routed mass, the sum of the weights that its
    router gives it, and its neurons by their activations times these.
    """
    width = torch.zeros(architecture.sizes["width"], dtype=torch.float64)
    sizes, depth = architecture.sizes, architecture.depth
    inner = {dim: width.new_zeros(depth, sizes[dim]) for dim in ("ffn", "group", "expert", "conv") if dim in sizes}
    if "expert" in sizes:
        inner["ffn"] = width.new_zeros(depth, sizes["expert"], sizes["ffn"])
    for site in Progress("Ranking the coordinates", architecture.sites):
        outermost, layer = site.axis[0], architecture.split_name(site.name)[0]
        if site.routed:
            key, _ = reader_keys(site.readers[0], weights, architecture)
            axes = architecture.tensors[key]
            written = to_dims(weights[key], axes, sizes).double().norm(dim=dims_of(axes).index("width"))
            inner["ffn"][layer] = statistics.neurons[site.name].double().sqrt() * written
            inner["expert"][layer] = statistics.mass[site.name].double()
            continue
        rms = statistics.variances(site.name).clamp(min=0).sqrt()
        if site.axis == ("width",):
            gain = weights[f"{site.name}.weight"].double().abs() if site.norm else 1 / rms.square().mean().sqrt()
            # The table that is read with is as many times larger as the gain is smaller.
            tied_final = architecture.tied and site is architecture.sites[-1]
            width += rms * gain * (architecture.embedding_scale if tied_final else 1.0)
            continue
        if outermost not in inner:
            continue
        key, _ = reader_keys(site.readers[0], weights, architecture)
        score = rms * input_matrix(weights[key], architecture.tensors[key], site.axis).double().norm(dim=0)
        inner[outermost][layer] = score.reshape(sizes[outermost], -1).sum(-1)
    return Importance(width, **inner)


def importance_order(scores: Importance) -> Order:
    """Order the coordinates by descending importance."""
    orders = {name: score.argsort(descending=True) for name, score in vars(scores).items() if score is not None}
    if "expert" in orders:
        orders["ffn"] = orders["ffn"].take_along_dim(orders["expert"][..., None], 1)
    return Order(**orders)


def sort_weights(weights: Weights, architecture: Architecture, scores: Importance) -> tuple[Weights, Change]:
    """Permute channels, neurons, experts and key/value groups into descending importance; the logits stay equal.

    Returns:
        The permuted weights and the change of what their readers read.
    """
    order = importance_order(scores)
    axes = {site.name: site.axis for site in architecture.sites}
    axes |= {norm.name: norm.axis for norm in architecture.output_norms}

    def change(name: str, rows: torch.Tensor) -> torch.Tensor:
        index = _site_order(axes[name], architecture.sizes, order.index(architecture.split_name(name)[0]))
        return rows.index_select(1, index.to(rows.device))

    return permute(weights, architecture, order), change


def permute(weights: Weights, architecture: Architecture, order: Order) -> Weights:
    """Permute a model to new coordinates; the logits stay equal.

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

    def tensor(key: str) -> torch.Tensor:
        axes, layer = architecture.tensors[key], architecture.split_name(key)[0]
        permuted = select(weights[key], axes, architecture.sizes, order.index(layer))
        for dims, positions in order.inside(layer).items():
            if set(dims) <= set(dims_of(axes)):
                permuted = _reorder_inside(permuted, axes, architecture.sizes, dims, positions)
        # A norm's gain is the same for a channel and its mirror image.
        if signs is not None and not (axes == (("width",),) and key.endswith(".weight")):
            permuted = _mirrored(permuted, axes, architecture.sizes, signs)
        return permuted

    return LazyWeights(architecture.tensors, tensor)


def to_principal_axes(weights: Weights, architecture: Architecture, second: torch.Tensor) -> tuple[Weights, Change]:
    """Rotate the stream to its principal axes, of which every prefix holds the most that as many can.

    Args:
        weights: of a model that `can_rotate`.
        architecture: of it.
        second: as `principal_axes` takes it.

    Returns:
        The weights, in float64, and the change of what their readers read.
    """
    axes = principal_axes(architecture, second)
    streams = {site.name for site in architecture.sites if site.axis == WIDTH}
    placed: dict[torch.device, torch.Tensor] = {}

    def change(name: str, rows: torch.Tensor) -> torch.Tensor:
        if name not in streams:
            return rows
        if rows.device not in placed:
            placed[rows.device] = axes.to(rows.dtype).to(rows.device)
        return rows @ placed[rows.device]

    return rotate(weights, architecture, axes), change


def can_rotate(weights: Weights, architecture: Architecture) -> bool:
    """Check whether the stream can be rotated: no channel has a gain of its own that no reader takes.

    Not with a tied head, whose table is read by rows and by columns with the final norm's gain between the two; nor
    with norms over what is written to the stream (Gemma 2 and 3, OLMo 2).
    """
    if architecture.tied or any(norm.axis == WIDTH for norm in architecture.output_norms):
        return False
    kept = [site for site in architecture.sites if site.norm and not folds(site, architecture)]
    gains = [weights[f"{site.name}.weight"].abs() for site in kept]
    return all(bool(gain.min() >= _LEAST_GAIN * gain.median()) for gain in gains)


def principal_axes(architecture: Architecture, second: torch.Tensor) -> torch.Tensor:
    """Find the orthogonal axes of the stream that hold most of it, over all that reads it.

    They are the eigenvectors of the streams' second moments E[x x^T], summed, as in SliceGPT (arXiv 2401.15024,
    section 3.2), which has axes of its own for each layer, and matrices in the residual connections for that: these
    are one set for all, and the model stays a stock one. A LayerNorm's mean must stay the mean, so there each axis is
    rotated towards the channels' mean by 1/sqrt(D), and all of them sum to it.

    Args:
        architecture: of the model.
        second: E[x x^T] summed over all that reads the stream, (D, D) float64.

    Returns:
        Q, (D, D) float64, Q^T Q = 1: a column an axis, the one that holds most first.
    """
    size = len(second)
    centered = architecture.family.norm_type == "layer"
    if centered:
        # The mean, which no layer reads, becomes the last axis, for sure.
        mean = second.new_full((size,), 1 / math.sqrt(size))
        second = second - (1 + second.trace()) * torch.outer(mean, mean)
    axes = torch.linalg.eigh(second).eigenvectors.flip(1)
    # A sign is arbitrary: the same on every machine.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * largest.sign()
    if not centered:
        return axes
    mirror = -mean
    mirror[-1] += 1.0
    return axes - 2 / mirror.square().sum() * torch.outer(axes @ mirror, mirror)


def rotate(weights: Weights, architecture: Architecture, axes: torch.Tensor) -> Weights:
    """Rotate the stream x to Q^T x; the logits stay equal.

    Gains are shared with their readers anew (see `balance_norms`) and have the size that they had.

    Args:
        weights: of a model that `can_rotate`.
        architecture: of it.
        axes: Q, (D, D) orthogonal; where the norms are LayerNorms each row sums to 1.

    Returns:
        Weights in float64.
    """
    precise = LazyWeights(architecture.tensors, lambda key: weights[key].double())
    bare = fold_norms(precise, architecture, every=True)

    def tensor(key: str) -> torch.Tensor:
        own, places = bare[key], architecture.tensors[key]
        if WIDTH not in places or (key.endswith(".weight") and key.rsplit(".", 1)[0] in architecture.norms):
            return own
        return from_input_matrix(input_matrix(own, places, WIDTH) @ axes.to(own), own, places, WIDTH)

    return balance_norms(LazyWeights(architecture.tensors, tensor), architecture, precise)


def _site_order(axis: tuple[str, ...], sizes: Sizes, orders: dict[str, torch.Tensor]) -> torch.Tensor:
    return select(torch.arange(axis_length(axis, sizes)), (axis,), sizes, orders)


def _reorder_inside(
    tensor: torch.Tensor, axes: Axes, sizes: Sizes, dims: tuple[str, str], order: torch.Tensor
) -> torch.Tensor:
    positions = tuple(dims_of(axes).index(dim) for dim in dims)
    array = to_dims(tensor, axes, sizes).movedim(positions, (0, 1))
    order = order.to(array.device)
    array = array[torch.arange(len(order), device=array.device)[:, None], order]
    return from_dims(array.movedim((0, 1), positions), axes)


def _mirrored(tensor: torch.Tensor, axes: Axes, sizes: Sizes, signs: torch.Tensor) -> torch.Tensor:
    if "width" not in dims_of(axes):
        return tensor
    array = to_dims(tensor, axes, sizes)
    shape = [-1 if dim == "width" else 1 for dim in dims_of(axes)]
    return from_dims(array * signs.to(array).view(shape), axes)
