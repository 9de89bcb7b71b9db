"""Cut a model to a narrower one.

The plain cut keeps prefixes; the least-squares cut also refits what reads them to stand in for what is dropped.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cbd_trl.architectures import Architecture, OutputNorm, Site
from cbd_trl.architectures.axes import axis_length, prefix, prefix_index
from cbd_trl.surgery.norms import fold_norms, folds
from cbd_trl.surgery.statistics import SiteStatistics
from cbd_trl.surgery.weights import (
    LazyWeights,
    Weights,
    from_input_matrix,
    input_matrix,
    readers_of,
    site_norms,
    working,
)

# Rows that are in hand at a time: few enough to stay in the cache, and in memory that the next ones find again.
_ROWS = 1024
TIED_HEAD_SHARE = 0.5
# Scaled embeddings make up most of the stream, so moving the table costs more than it gains: at 0, 1/4 and 1/2 tiny
# trained Gemma 2 and 3 models lost 0.03, 0.05 and 0.14 nats, Llama and OLMo 2 0.08, 0.06 and 0.08 (36 of 48 channels).
SCALED_TIED_HEAD_SHARE = 0.0


def plain_cut(weights: Weights, architecture: Architecture, target: Architecture) -> Weights:
    """Keep the first coordinates of every axis.

    Raises:
        ValueError: `target` is wider or has another depth.
    """
    _check_narrower(architecture, target)
    tensors, old, new = architecture.tensors, architecture.sizes, target.sizes
    return LazyWeights(tensors, lambda key: prefix(weights[key], tensors[key], old, new))


def least_squares_cut(
    weights: Weights,
    architecture: Architecture,
    statistics: SiteStatistics,
    target: Architecture,
    tied_head_share: float | None = None,
    fold: bool = False,
    fits: "Callable[[Site, bool], Fit] | None" = None,
) -> Weights:
    """Cut to the first coordinates, with every reading layer refitted to the stream it used to read.

    With f the features that the cut model still has and y what is missing from the full stream, y ~ Y f + c in least
    squares over the calibration text (see `regress`). A reader W becomes W_kept + W Y, its bias b + W c (no c is
    fitted without a bias). Norm gains are multiplied by the ratio of the kept coordinates' root mean square to the
    full one; a LayerNorm's features are centered over the kept coordinates, so y also holds the kept coordinates'
    mean. Dropped heads and neurons go the same way through the output and down projections. Norms over an output
    (after attention and FFN, over all heads' queries or keys) have their gains multiplied by the same factor. Dropped
    experts, and neurons of experts, are gone: the others stay as they are.

    An approximation (the ratio varies from token to token); exact as ridge -> 0 with an untied head where the dropped
    coordinates are copies of kept ones, each copied equally often.

    Args:
        weights: the full model's; of each tensor only the outputs that stay are read.
        statistics: moments of the full model in the same coordinate order.
        target: same depth, no wider than `architecture` in any dimension.
        tied_head_share: how far a tied table moves towards the refitted head (it is also read as input), 0 to 1; None
            for a half, or 0 where the embeddings are scaled.
        fold: whether norm gains are put into their readers first (see `fold_norms`).
        fits: what `reader_fits` returned, for who reads the cut again and again, of weights on another device or
            rounded otherwise; None: each site is fitted when its readers are read.

    Returns:
        Weights of `target`; what is calculated is so in float32, or in float64 where the weights are.
    """
    _check_narrower(architecture, target)
    if tied_head_share is None:
        tied_head_share = TIED_HEAD_SHARE if architecture.embedding_scale == 1.0 else SCALED_TIED_HEAD_SHARE
    places: list[Site | OutputNorm] = [*architecture.measured_sites, *architecture.output_norms]
    cut = _cut_axes(architecture, target)
    readers, narrower = readers_of(architecture), {place.name: place for place in places if place.axis in cut}
    written = _cut_outputs(weights, architecture, target, stream_ratio(architecture, statistics, target))
    outputs = fold_norms(written, architecture) if fold else written
    folded = {site for site in architecture.sites if fold and folds(site, architecture)}
    fit = fits or reader_fits(weights, architecture, statistics, target, fold)

    @functools.cache
    def ratio(module: str) -> float:
        norm = narrower[module]
        kind = "rms" if isinstance(norm, OutputNorm) else architecture.family.norm_type
        return gain_ratio(statistics, norm, kind, prefix_index(norm.axis, architecture.sizes, target.sizes))

    def tensor(key: str) -> torch.Tensor:
        module, kind = key.rsplit(".", 1)
        if module in architecture.norms:
            if module not in narrower:
                return outputs[key]
            # One over an output is cut already, one at a site is whole.
            own = working(outputs[key])
            if not isinstance(narrower[module], OutputNorm):
                own = prefix(own, architecture.tensors[key], architecture.sizes, target.sizes)
            return own * ratio(module) if kind == "weight" else own
        site = readers.get(module)
        if site is None or site.axis not in cut:
            return outputs[key]
        weight = f"{module}.weight"
        axes = architecture.tensors[weight]
        if kind == "bias":
            return fit(site, True).shifted(input_matrix(outputs[weight], axes, site.axis), working(outputs[key]))
        tied = site is architecture.sites[-1] and architecture.tied
        # Folded by the fit, piece by piece.
        full, gain = written[weight], written[f"{site.name}.weight"] if site in folded else None
        matrix = input_matrix(full, axes, site.axis)
        biased = f"{module}.bias" in architecture.tensors
        refitted = fit(site, biased).refitted(matrix, tied_head_share if tied else 1.0, gain)
        return from_input_matrix(refitted, full, axes, site.axis)

    return LazyWeights(target.tensors, tensor)


def gain_ratio(statistics: SiteStatistics, norm: Site | OutputNorm, norm_type: str, kept: torch.Tensor) -> float:
    """Compute what the gain of a norm is multiplied by when only the kept coordinates stay: the root mean square of
    what it makes of these (LayerNorm: their standard deviation) over that of all.

    Args:
        norm: a site with a norm, or a norm over an output.
        norm_type: "rms" or "layer".
        kept: positions that stay, (n,) int64; the first ones for a LayerNorm.
    """
    variances = statistics.variances(norm.name)
    full, part = variances.mean(), variances[kept].mean()
    if norm_type == "layer":
        # The kept ones have a mean of their own, which the cut model's LayerNorm removes.
        part = part - statistics.prefix_squares(norm.name)[len(kept) - 1] / len(kept) ** 2
    return float((part / full).sqrt())


def stream_ratio(architecture: Architecture, statistics: SiteStatistics, target: Architecture) -> float:
    """Compute what a cut multiplies the stream by: 1, or, where the embeddings are normalized, their root mean square
    over that of the coordinates that stay. What layers add to the stream has to follow."""
    if not architecture.family.bare_norms or target.sizes["width"] == architecture.sizes["width"]:
        return 1.0
    # What the first norm reads is what the norm of the embeddings has made.
    kept = prefix_index(("width",), architecture.sizes, target.sizes)
    return 1 / gain_ratio(statistics, architecture.sites[0], architecture.family.norm_type, kept)


@dataclass(frozen=True)
class Fit:
    """y ~ matrix f + constant, for the entries `rows` of the full stream (the others of y are zero).

    Args:
        kept: the P entries of the full stream that are features: a slice, or (P,) int64.
        rows: the R entries, likewise.
        matrix: (R, P).
        constant: (R,); None without an intercept.
    """

    kept: slice | torch.Tensor
    rows: slice | torch.Tensor
    matrix: torch.Tensor
    constant: torch.Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Fit":
        """Move it to where readers are, its matrix in a dtype; in half precision that of its products too."""
        constant = None if self.constant is None else self.constant.to(device)
        kept, rows = (each if isinstance(each, slice) else each.to(device) for each in (self.kept, self.rows))
        return Fit(kept, rows, self.matrix.to(device, dtype), constant)

    def refitted(self, matrix: torch.Tensor, share: float, gain: torch.Tensor | None = None) -> torch.Tensor:
        """Refit a reader's matrix to the coordinates that stay.

        Args:
            matrix: (outputs, D).
            share: how far to go towards the fit, 0 to 1.
            gain: (D,) to multiply the columns by first; None: they are as they are to be.

        Returns:
            (outputs, P) in the working dtype.
        """
        made: torch.Tensor = _Refit.apply(matrix, gain, self, share)
        return made

    def _compute(self, matrix: torch.Tensor, gain: torch.Tensor | None, share: float) -> torch.Tensor:
        dtype = working(matrix[:0]).dtype
        fit = self._gained(gain, dtype)
        made = matrix.new_empty(len(matrix), fit.shape[1], dtype=dtype)
        # In pieces: the parts in the working dtype never exist as a whole.
        for out, piece in zip(made.split(_ROWS), matrix.split(_ROWS), strict=True):
            own, other = working(piece[:, self.kept]), piece[:, self.rows]
            if gain is not None:
                own = torch.mul(own, gain[self.kept].to(dtype), out=out)
            if fit.dtype.itemsize < 4:
                torch.add(own, other.to(fit.dtype) @ fit, alpha=share, out=out)
            else:
                torch.addmm(own, working(other), fit, alpha=share, out=out)
        return made

    def _gained(self, gain: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in the dtype of its products, its rows multiplied by the gain."""
        fit = self.matrix if self.matrix.dtype.itemsize < 4 else self.matrix.to(dtype)
        return fit if gain is None else (fit * gain[self.rows, None].to(dtype)).to(fit.dtype)

    def shifted(self, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Refit the reader's bias, (outputs,) or, of experts, (E, outputs of each)."""
        if self.constant is None:
            return bias
        constant = self.constant.to(working(matrix[:0]).dtype)
        parts = [working(piece[:, self.rows]) @ constant for piece in matrix.split(_ROWS)]
        return bias + torch.cat(parts).to(bias.dtype).view_as(bias)


class _Refit(torch.autograd.Function):
    """`Fit.refitted`. A function of autograd, because the parts that it is computed in never exist as a whole, and
    autograd would keep them."""

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, gain: torch.Tensor | None, fit: Fit, share: float) -> torch.Tensor:
        """Compute (outputs, P); see `Fit.refitted`."""
        ctx.save_for_backward(matrix if gain is not None and gain.requires_grad else None, gain)
        ctx.work = fit, share, matrix.shape, matrix.dtype
        return fit._compute(matrix, gain, share)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of the matrix and of the gain; the fit has none.

        Args:
            ctx: of the forward.
            gradient: (outputs, P).
        """
        (matrix, gain), (fit, share, shape, dtype) = ctx.saved_tensors, ctx.work
        # Of the matrix times the gain, all of whose columns are read: those that stay, and those that the fit reads.
        whole = gradient.new_zeros(shape)
        whole[:, fit.kept] = gradient
        product = fit._gained(None, gradient.dtype)
        whole[:, fit.rows] += share * (gradient.to(product.dtype) @ product.T).to(gradient.dtype)
        to_matrix = (whole if gain is None else whole * gain.to(whole.dtype)).to(dtype)
        to_gain = None if matrix is None else (whole * matrix.to(whole.dtype)).sum(0).to(gain.dtype)
        return to_matrix, to_gain, None, None


def regress(
    statistics: SiteStatistics,
    site: str,
    kept: torch.Tensor,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    centered: bool,
    intercept: bool,
) -> Fit:
    """Regress what a cut stream misses on what it has, in least squares.

    The stored stream is x, the full one that is read u = gain x + shift. The features are f = u[kept], or, where the
    cut norm centers over the kept entries, f = gain (x - mu) + shift with mu the mean of x[kept]; then y also has the
    rows gain mu at `kept`.

    With K the kept and R the dropped entries and cov(x) + ridge = L L^T, L lower triangular, x_R is regressed on x_K
    by Y = L_RK L_KK^-1: the stored factor solves for every prefix. The rest are corrections of rank one: centering
    takes away the constant direction, Y <- Y - (Y 1) w^T with w = cov^-1 1 / (1^T cov^-1 1), and fitting without an
    intercept adds the means to the moments (Sherman-Morrison).

    Args:
        statistics: moments of x.
        site: whose.
        kept: (P,) int64, ascending.
        gain, shift: (D,) of the norm, None for 1 and 0.
        centered: whether the norm subtracts the mean of the kept entries.
        intercept: whether a constant is fitted too.
    """
    factor = statistics.factor(site, kept)
    mean, has_gain = statistics.mean(site).to(factor.dtype), gain is not None
    gain = torch.ones_like(mean) if gain is None else gain.to(factor)
    shift = torch.zeros_like(mean) if shift is None else shift.to(factor)
    rest = _others(kept, len(mean))
    triangle = factor[_span(kept)]
    matrix = torch.linalg.solve_triangular(triangle, factor[_span(rest)], upper=False, left=False)
    missing, features = gain * mean + shift, (gain * mean + shift)[kept]
    rows, weighting = rest, None
    if centered:
        weighting = _solve(triangle, torch.ones_like(features))
        weighting = weighting / weighting.sum()
        rows, matrix = torch.arange(len(mean)), _centered(matrix, kept, rest, weighting)
        missing[kept] = gain[kept] * mean[kept].mean()
        features = features - missing[kept]
    # A feature of gain 0 carries no information.
    inverse = torch.where(gain[kept].abs() > 1e-6 * gain.abs().max(), 1 / gain[kept], 0)
    if has_gain:
        matrix.mul_(gain[rows, None]).mul_(inverse)
    missing = missing[rows]
    if intercept:
        return Fit(_span(kept), _span(rows), matrix, missing - matrix @ features)
    scaled = inverse * features
    direction = _solve(triangle, scaled)
    if weighting is not None:
        # Along the constant direction the centered features do not vary: there only the ridge holds.
        floor = statistics.ridge * triangle.square().sum(1).mean()
        direction = direction - weighting * direction.sum() + scaled.mean() / floor
    direction = inverse * direction
    gap = missing - matrix @ features
    return Fit(_span(kept), _span(rows), matrix.addr_(gap, direction / (1 + features @ direction)), None)


def reader_fits(
    weights: Weights, architecture: Architecture, statistics: SiteStatistics, target: Architecture, fold: bool = False
) -> Callable[[Site, bool], Fit]:
    """Build the function that fits each site that a cut makes narrower, with an intercept or without, with the norm
    gains of these weights.

    Args:
        weights, architecture, statistics, target, fold: as in `least_squares_cut`.
    """
    outputs, family = fold_norms(weights, architecture) if fold else weights, architecture.family
    inner = family.layer_tensors(architecture.config)
    kinds = {(site.name, f"{reader}.bias" in inner) for site in family.sites for reader in site.readers}

    # As many as a layer has: the readers of one site follow each other, their biases may come after other sites.
    @functools.lru_cache(maxsize=len(kinds))
    def fit(site: Site, intercept: bool) -> Fit:
        gain, shift = None, None
        if site.norm and not (fold and folds(site, architecture)):
            gain, shift = outputs[f"{site.name}.weight"], outputs.get(f"{site.name}.bias")
        centered = site.norm and family.norm_type == "layer"
        kept = prefix_index(site.axis, architecture.sizes, target.sizes)
        return regress(statistics, site.name, kept, gain, shift, centered, intercept)

    return fit


def cut_fits(architecture: Architecture, target: Architecture) -> list[tuple[Site, bool]]:
    """List the fits that a cut makes: each site whose readers it fits anew, and whether with an intercept. Both, where
    some of its readers have a bias and some have none."""
    cut, tensors = _cut_axes(architecture, target), architecture.tensors
    readers = [(site, module) for module, site in readers_of(architecture).items() if site.axis in cut]
    return list(dict.fromkeys((site, f"{module}.bias" in tensors) for site, module in readers))


def _cut_axes(architecture: Architecture, target: Architecture) -> set[tuple[str, ...]]:
    axes = {site.axis for site in architecture.measured_sites} | {norm.axis for norm in architecture.output_norms}
    return {axis for axis in axes if axis_length(axis, target.sizes) < axis_length(axis, architecture.sizes)}


def _cut_outputs(weights: Weights, architecture: Architecture, target: Architecture, ratio: float) -> Weights:
    """Cut all that is written, times `ratio` where layers add to the stream; the axes that readers read along, norms
    included, stay whole."""
    norms, readers, sizes = site_norms(architecture), readers_of(architecture), architecture.sizes

    def tensor(key: str) -> torch.Tensor:
        module, kind = key.rsplit(".", 1)
        whole = readers[module].axis if module in readers and kind == "weight" else ()
        if module in norms:
            whole = norms[module].axis
        part = prefix(weights[key], architecture.tensors[key], sizes, target.sizes, whole)
        return part if ratio == 1 or module not in architecture.writers else working(part) * ratio

    return LazyWeights(architecture.tensors, tensor)


def _check_narrower(architecture: Architecture, target: Architecture) -> None:
    wider = [dim for dim, size in target.sizes.items() if size > architecture.sizes[dim]]
    if wider or target.depth != architecture.depth:
        raise ValueError(
            f"Cannot cut {architecture.shape} to {target.shape}: a cut keeps the depth and makes nothing larger "
            f"(larger: {', '.join(wider) or 'nothing'}). Select layers with `select_layers`, grow with `grow_width`."
        )


def _others(kept: torch.Tensor, size: int) -> torch.Tensor:
    """List the positions that are not kept, ascending."""
    dropped = torch.ones(size, dtype=torch.bool)
    dropped[kept] = False
    return dropped.nonzero().flatten()


def _centered(matrix: torch.Tensor, kept: torch.Tensor, rest: torch.Tensor, weighting: torch.Tensor) -> torch.Tensor:
    """Take the constant direction out of the fit of the dropped entries (R, P), and add rows for what centering took
    from the kept ones: (D, P)."""
    made = matrix.new_empty(len(kept) + len(rest), len(kept))
    made[rest] = matrix - torch.outer(matrix.sum(1), weighting)
    made[kept] = 1 / len(kept) - weighting
    return made


def _solve(triangle: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Compute (L L^T)^-1 v, without the copy of L that `cholesky_solve` makes."""
    half = torch.linalg.solve_triangular(triangle, vector[:, None], upper=False)
    return torch.linalg.solve_triangular(triangle.mT, half, upper=True)[:, 0]


def _span(index: torch.Tensor) -> slice | torch.Tensor:
    """Turn ascending positions into a slice where they are neighbors, which gives views instead of copies."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index
