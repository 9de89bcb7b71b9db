"""Cutting a model to a narrower one.

The plain cut keeps prefixes; the least-squares cut keeps prefixes that also speak for what is dropped.
"""

from dataclasses import dataclass

import torch

from cbd_trl.architectures import Architecture, OutputNorm, Site
from cbd_trl.architectures.axes import prefix, prefix_index
from cbd_trl.surgery.statistics import Statistics
from cbd_trl.surgery.weights import Weights, from_input_matrix, input_matrix, reader_keys

RIDGE = 1e-3
TIED_HEAD_SHARE = 0.5
# Scaled embeddings make up most of the stream, so moving the table costs more than it gains: at 0, 1/4 and 1/2 tiny
# trained Gemma 2 and 3 models lost 0.03, 0.05 and 0.14 nats, Llama and OLMo 2 0.08, 0.06 and 0.08 (36 of 48 channels).
SCALED_TIED_HEAD_SHARE = 0.0


def plain_cut(weights: Weights, architecture: Architecture, target: Architecture) -> Weights:
    """The first coordinates of every axis.

    Raises:
        ValueError: `target` is wider or has another depth.
    """
    _check_narrower(architecture, target)
    return {
        key: prefix(weights[key], axes, architecture.sizes, target.sizes) for key, axes in architecture.tensors.items()
    }


def least_squares_cut(
    weights: Weights,
    architecture: Architecture,
    statistics: Statistics,
    target: Architecture,
    ridge: float = RIDGE,
    tied_head_share: float | None = None,
) -> Weights:
    """The plain cut with every reading layer refitted to the stream it used to read.

    With f the features that the cut model still has and y what is missing from the full stream, y ~ Y f + c in least
    squares over the calibration text (Y = E[y f^T] (E[f f^T] + ridge)^-1; moments centred where the readers have a
    bias to take c). A reader W becomes W_kept + W Y. Norm gains are multiplied by the ratio of the kept coordinates'
    root mean square to the full one; a LayerNorm's features are centred over the kept coordinates, so y also holds the
    kept coordinates' mean. Dropped heads and neurons go the same way through the output and down projections. Norms
    over an output (after attention and FFN, over all heads' queries or keys) have their gains multiplied alike.

    An approximation (the ratio varies from token to token); exact as ridge -> 0 with an untied head where the dropped
    coordinates are copies of kept ones, each copied equally often.

    Args:
        weights: the full model's.
        statistics: moments of the full model in the same coordinate order.
        target: same depth, no wider than `architecture` in any dimension.
        ridge: times the mean diagonal of E[f f^T].
        tied_head_share: how far a tied table moves towards the refitted head (it is also read as input), 0 to 1; None
            for a half, or 0 where the embeddings are scaled.

    Returns:
        Weights of `target`.
    """
    _check_narrower(architecture, target)
    if tied_head_share is None:
        tied_head_share = TIED_HEAD_SHARE if architecture.embedding_scale == 1.0 else SCALED_TIED_HEAD_SHARE
    refitted = dict(weights)
    for site in architecture.sites:
        kept = prefix_index(site.axis, architecture.sizes, target.sizes)
        if len(kept) < len(statistics.means[site.name]):
            _refit_site(refitted, weights, architecture, statistics, site, kept, ridge, tied_head_share)
    for norm in architecture.output_norms:
        kept = prefix_index(norm.axis, architecture.sizes, target.sizes)
        key = f"{norm.name}.weight"
        if len(kept) < len(weights[key]):
            refitted[key] = weights[key] * gain_ratio(statistics, norm, "rms", kept)
    return _cut_rest(refitted, architecture, target)


def _check_narrower(architecture: Architecture, target: Architecture) -> None:
    wider = [dim for dim, size in target.sizes.items() if size > architecture.sizes[dim]]
    if wider or target.depth != architecture.depth:
        raise ValueError(
            f"Cannot cut {architecture.shape} to {target.shape}: a cut keeps the depth and makes nothing larger "
            f"(larger: {', '.join(wider) or 'nothing'}). Select layers with `select_layers`, grow with `grow_width`."
        )


def gain_ratio(statistics: Statistics, norm: Site | OutputNorm, norm_type: str, kept: torch.Tensor) -> float:
    """Root mean square (LayerNorm: standard deviation) of what a norm makes of the kept coordinates over that of all:
    what the gain of a norm of the kept ones alone is multiplied by.

    Args:
        norm: a site with a norm, or a norm over an output.
        norm_type: "rms" or "layer".
        kept: positions that stay, (n,) int64.
    """
    variances = statistics.variances(norm.name)
    full, part = variances.mean(), variances[kept].mean()
    if norm_type == "layer":
        # The kept ones have a mean of their own, which the cut model's LayerNorm removes.
        part = part - statistics.second(norm.name)[kept][:, kept].mean()
    return float((part / full).sqrt())


@dataclass(frozen=True)
class _Refit:
    """y ~ matrix f + constant, for the entries `rows` of the full stream (the others of y are zero)."""

    rows: torch.Tensor
    matrix: torch.Tensor
    constant: torch.Tensor


def _regress(
    mean: torch.Tensor,
    second: torch.Tensor,
    gain: torch.Tensor,
    shift: torch.Tensor,
    kept: torch.Tensor,
    centred: bool,
    intercept: bool,
    ridge: float,
) -> _Refit:
    """Least squares of what a cut stream misses on what it has.

    The full stream is u = gain x + shift with moments (mean, second) of x. The features are f = u[kept], or, where
    the cut norm centres over the kept entries, f = gain (x - mu) + shift with mu the mean of x[kept]; then y also has
    the rows gain mu at `kept`.
    """
    dropped = torch.ones(len(mean), dtype=torch.bool)
    dropped[kept] = False
    rows = torch.arange(len(mean)) if centred else dropped.nonzero().flatten()
    covariance = second - torch.outer(mean, mean)
    with_mu = covariance[:, kept].mean(1) if centred else torch.zeros_like(mean)
    mu_variance = with_mu[kept].mean()
    mu_mean = mean[kept].mean() if centred else mean.new_zeros(())
    kept_gain, mu_kept = gain[kept], with_mu[kept]

    ff = covariance[kept][:, kept] - mu_kept[:, None] - mu_kept[None, :] + mu_variance
    ff = kept_gain[:, None] * ff * kept_gain[None, :]
    yf = covariance[rows][:, kept] - with_mu[rows][:, None]
    yf = gain[rows][:, None] * yf * kept_gain[None, :]
    missing_mean = (gain * mean + shift)[rows]
    if centred:
        yf[kept] = torch.outer(kept_gain, kept_gain * (mu_kept - mu_variance))
        missing_mean[kept] = kept_gain * mu_mean
    feature_mean = kept_gain * (mean[kept] - mu_mean) + shift[kept]
    if not intercept:
        ff = ff + torch.outer(feature_mean, feature_mean)
        yf = yf + torch.outer(missing_mean, feature_mean)
    ff.diagonal().add_(ridge * ff.diagonal().mean())
    matrix = torch.linalg.solve(ff, yf.T).T
    constant = missing_mean - matrix @ feature_mean if intercept else torch.zeros_like(missing_mean)
    return _Refit(rows, matrix, constant)


def _refit_site(
    refitted: Weights,
    weights: Weights,
    architecture: Architecture,
    statistics: Statistics,
    site: Site,
    kept: torch.Tensor,
    ridge: float,
    tied_head_share: float,
) -> None:
    """Write one site's readers, and its norm's gain, into `refitted`."""
    mean, second = statistics.mean(site.name), statistics.second(site.name)
    gain, shift, centred = torch.ones_like(mean), torch.zeros_like(mean), False
    if site.norm:
        gain = weights[f"{site.name}.weight"].double()
        shift = weights[f"{site.name}.bias"].double() if f"{site.name}.bias" in weights else shift
        centred = architecture.family.norm_type == "layer"
        ratio = gain_ratio(statistics, site, architecture.family.norm_type, kept)
        refitted[f"{site.name}.weight"] = weights[f"{site.name}.weight"] * ratio
    intercept = all(reader_keys(reader, weights, architecture)[1] is not None for reader in site.readers)
    refit = _regress(mean, second, gain, shift, kept, centred, intercept, ridge)
    tied = site is architecture.sites[-1] and architecture.tied
    share = tied_head_share if tied else 1.0
    for reader in site.readers:
        key, bias = reader_keys(reader, weights, architecture)
        axes = architecture.tensors[key]
        matrix = input_matrix(weights[key], axes, site.axis)
        # A vocabulary's worth of rows stays in float32: the solution is what needs the precision.
        matrix = matrix.float() if matrix.numel() > 2**24 else matrix.double()
        new = matrix[:, kept] + share * (matrix[:, refit.rows] @ refit.matrix.to(matrix.dtype))
        refitted[key] = from_input_matrix(new, weights[key], axes, site.axis)
        if bias is not None and intercept:
            offset = matrix[:, refit.rows].double() @ refit.constant
            refitted[bias] = (refitted[bias].double() + offset).to(weights[bias].dtype)


def _cut_rest(refitted: Weights, architecture: Architecture, target: Architecture) -> Weights:
    """Prefixes of every axis that the refit has not shortened already."""
    shortened = {
        reader_keys(reader, refitted, architecture)[0]: site.axis
        for site in architecture.sites
        for reader in site.readers
    }
    cut = {}
    for key, axes in architecture.tensors.items():
        axis = shortened.get(key)
        sizes = architecture.sizes
        if axis is not None and refitted[key].shape[axes.index(axis)] == len(prefix_index(axis, sizes, target.sizes)):
            sizes = {**sizes, **{dim: target.sizes[dim] for dim in axis}}
        cut[key] = prefix(refitted[key], axes, sizes, target.sizes)
    return cut
