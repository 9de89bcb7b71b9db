"""Grow a model exactly: a wider or deeper one that computes the same logits."""

import math
from collections.abc import Sequence

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Axes, dims_of, from_dims, to_dims
from cbd_trl.surgery.blocks import select_layers, spaced_layers
from cbd_trl.surgery.weights import LazyWeights, Weights, working

# What only a router's bias has, and what is taken from that of a new expert: more than logits differ by.
ROUTER_BIAS: Axes = (("expert",),)
_NEVER = 1e4


def check_experts(architecture: Architecture, target: Architecture) -> None:
    """Check that the number of experts can grow to a target's without changing what is computed.

    Raises:
        ValueError: it cannot: only a router with a bias can be kept from choosing a new expert.
    """
    old, new = (one.sizes.get("expert", 0) for one in (architecture, target))
    if new > old and ROUTER_BIAS not in architecture.tensors.values():
        raise ValueError(
            f"Cannot grow {old} experts to {new}: the router of {architecture.config.model_type} has no bias, and "
            "what it would give a new expert depends on the token, so some would be sent there. Keep the number of "
            "experts, or cut the model above (operator='nested' or 'slice')."
        )


def grow_width(weights: Weights, architecture: Architecture, target: Architecture) -> tuple[Weights, Architecture]:
    """Grow every width to `target`'s; logits stay equal.

    RMSNorm: new channels are written as zero, gains times sqrt(d_old / d_new), epsilon times d_old / d_new (norms over
    an output share that epsilon, so what they normalize is scaled to it). LayerNorm: every new channel is written as
    the mean of the old ones, new gains and biases are 0, old gains and epsilon scaled likewise. Where the epsilon is
    fixed (OPT, nanochat) the whole stream is multiplied by sqrt(d_new / d_old) instead, which leaves its root mean
    square what it was. New heads and neurons get zero output projections. What reads a new coordinate, and the inner
    weights of new heads and neurons, repeat old ones, so that training can move away from zero; where a norm goes over
    all heads (OLMo 2), m copies of a head share its square: each has 1 / sqrt(m) of its weights and sqrt(m) times its
    gain. New experts are copies that their router's bias keeps from being chosen.

    Returns:
        Weights, and the architecture with its new epsilon.

    Raises:
        ValueError: there are to be more experts, and the router has no bias.
    """
    check_experts(architecture, target)
    fixed_eps = architecture.fixed_eps
    eps_ratio = 1.0 if fixed_eps else architecture.sizes["width"] / target.sizes["width"]
    scales = _Scales(architecture, target, eps_ratio)
    readers = _reader_axes(architecture)
    centered = architecture.family.norm_type == "layer"

    def tensor(key: str) -> torch.Tensor:
        axes, module = architecture.tensors[key], key.rsplit(".", 1)[0]
        array = to_dims(weights[key], axes, architecture.sizes)
        for dim in dict.fromkeys(dims_of(axes)):
            if module in architecture.norms:
                fill = "zero" if centered else "repeat"
            else:
                fill = _fill(dim, axes, readers.get(module), centered)
            array = _extend(array, axes, dim, target.sizes[dim], fill)
        if axes == ROUTER_BIAS:
            array = array.clone()
            array[architecture.sizes["expert"] :] -= _NEVER
        scale = scales.of(key, axes)
        # Most tensors stay what they are, bit for bit and without a pass over them.
        if (scale != 1).any():
            array = working(array)
            array = array * scale.to(array)
        return from_dims(array, axes)

    grown = target if fixed_eps else target.with_eps(architecture.eps * eps_ratio)
    return LazyWeights(architecture.tensors, tensor), grown


def grow_depth(weights: Weights, architecture: Architecture, depth: int) -> tuple[Weights, Architecture]:
    """Insert evenly spaced layers that add nothing; logits stay equal.

    Output projections and biases of a new layer are zero, or the gains of the norms that follow them; the rest of it
    is a copy of the layer after it, or, where layers are of several kinds, of the nearest of its kind. Where engines
    tell layers apart by position (`Architecture.fits`), they are put where the old layers keep their places in the
    pattern, if that can be.

    Raises:
        ValueError: `depth` is smaller than the model's.
    """
    if depth < architecture.depth:
        raise ValueError(
            f"Cannot grow {architecture.depth} layers to {depth}. Give {architecture.depth} or more, or keep fewer "
            "with `select_layers`."
        )
    old = spaced_layers(depth, architecture.depth, lambda layer, position: architecture.fits(position, layer))
    following = [next(i for i, position in enumerate(old) if position >= layer) for layer in range(depth)]
    deeper = architecture.with_layers(following)
    if not architecture.off_pattern and all(architecture.fits(layer, position) for layer, position in enumerate(old)):
        # What adds nothing may be a layer of any type.
        deeper = deeper.on_pattern()
    repeated, _ = select_layers(weights, architecture, architecture.of_kinds(following, deeper))
    last = _last_modules(architecture)
    silent = {deeper.layer_name(layer, module) for layer in set(range(depth)) - set(old) for module in last}

    def tensor(key: str) -> torch.Tensor:
        return torch.zeros_like(repeated[key]) if key.rsplit(".", 1)[0] in silent else repeated[key]

    return LazyWeights(repeated, tensor), deeper


def zero_pad(weights: Weights, architecture: Architecture, target: Architecture) -> Weights:
    """Pad every tensor with zeros to `target`'s widths: not exact; the Trans(theta_small) of arXiv 2605.07783."""

    def tensor(key: str) -> torch.Tensor:
        axes = architecture.tensors[key]
        array = to_dims(weights[key], axes, architecture.sizes)
        for dim in dict.fromkeys(dims_of(axes)):
            array = _extend(array, axes, dim, target.sizes[dim], "zero")
        return from_dims(array, axes)

    return LazyWeights(architecture.tensors, tensor)


class _Scales:
    """The factors of growth: the scale of what a tensor puts out over the scale of what it reads.

    Of a norm's coordinates let a share p be old ones, and m copies stand for each of those, every copy 1 / sqrt(m) of
    it. Times sqrt(e / p), their mean square is e times what it was, as the epsilon is; the norm divides by sqrt(e), so
    each coordinate of what it gives is 1 / sqrt(p m) times what it was.

    Args:
        architecture, target: before and after.
        eps_ratio: e. As p, for the stream's norms, it leaves the stream as it is.
    """

    def __init__(self, architecture: Architecture, target: Architecture, eps_ratio: float) -> None:
        self._old, self._new, self._eps_ratio = architecture, target, eps_ratio
        self._readers = _reader_axes(architecture)
        self._before_norm = {norm.projection: norm.axis for norm in architecture.output_norms}
        self._stream_norms = {site.name for site in architecture.sites if site.norm}

    def of(self, key: str, axes: Axes) -> torch.Tensor:
        """Compute the factor of one tensor, float64, broadcast over its atomic dimensions."""
        module, kind = key.rsplit(".", 1)
        written = self._written(module, axes)
        return written / self._read(module, axes) if kind == "weight" else written

    def _written(self, module: str, axes: Axes) -> torch.Tensor:
        """Compute the scale of what a module puts out."""
        if module in self._before_norm:
            return self._normed(axes, self._before_norm[module], self._eps_ratio)
        stream = self._normed(axes, ("width",), self._eps_ratio)
        if module in self._stream_norms:
            # A tied head reads with the table, which writes the stream.
            tied = module == self._old.family.final_site.name and self._old.tied
            return 1 / stream if tied else torch.ones_like(stream)
        writes_stream = "width" in dims_of(axes) and "width" not in self._readers.get(module, ())
        return stream if writes_stream else torch.ones_like(stream)

    def _read(self, module: str, axes: Axes) -> torch.Tensor:
        """Compute the scale of what a module reads; a norm's gain reads what is normalized."""
        if module in self._old.norms:
            return self._normed(axes, axes[0], 1.0)
        return torch.ones((), dtype=torch.float64)

    def _normed(self, axes: Axes, norm_axis: Sequence[str], eps_ratio: float) -> torch.Tensor:
        """Compute sqrt(e / (p m)) for the coordinates of a tensor: of what goes into a norm over this axis, and with
        e = 1 of what comes out of it."""
        copies = torch.ones((), dtype=torch.float64)
        for dim in dims_of(axes):
            copies = copies[..., None]
            # The residual stream's new channels are no copies.
            if dim in norm_axis and dim != "width":
                old = torch.arange(self._new.sizes[dim]) % self._old.sizes[dim]
                copies = copies * old.bincount()[old]
        share = math.prod(self._old.sizes[dim] / self._new.sizes[dim] for dim in norm_axis)
        return (eps_ratio / share / copies).sqrt()


def _reader_axes(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Map {reading module: the axis it reads along}; a tied table counts as what writes the stream."""
    return {reader: site.axis for site in architecture.sites for reader in site.readers}


def _fill(dim: str, axes: Axes, read_axis: Sequence[str] | None, centered: bool) -> str:
    reads = read_axis is not None and dim in read_axis
    if dim == "width":
        if reads:
            return "repeat"
        return "mean" if centered else "zero"
    return "zero" if reads else "repeat"


def _extend(array: torch.Tensor, axes: Axes, dim: str, size: int, fill: str) -> torch.Tensor:
    position = dims_of(axes).index(dim)
    old = array.shape[position]
    if size == old:
        return array
    if fill == "repeat":
        return array.index_select(position, torch.arange(size, device=array.device) % old)
    if fill == "mean":
        array = working(array)
    new_shape = list(array.shape)
    new_shape[position] = size - old
    new = array.mean(position, keepdim=True).expand(new_shape) if fill == "mean" else array.new_zeros(new_shape)
    return torch.cat([array, new], position)


def _last_modules(architecture: Architecture) -> set[str]:
    """List the modules of a layer whose output is added to the stream."""
    norms = architecture.family.output_norms(architecture.config)
    projections = [reader for site in architecture.family.sites if site.axis != ("width",) for reader in site.readers]
    # Through a norm that has only zeros to divide, gradients would be enormous: the norm is silenced then.
    return {norms.get(projection, projection) for projection in projections}
