"""Cutting a model to a narrower one.

The plain cut keeps prefixes; the least-squares cut keeps prefixes that also speak for what is dropped.
"""

import functools

import torch

from cbd_trl.architectures import Architecture, Site
from cbd_trl.architectures.axes import prefix, prefix_index
from cbd_trl.surgery.lazy import LazyWeights
from cbd_trl.surgery.norms import fold_norms
from cbd_trl.surgery.regression import Fit, regress
from cbd_trl.surgery.statistics import SiteStatistics
from cbd_trl.surgery.weights import Weights, from_input_matrix, input_matrix, norms_of, readers_of, working

TIED_HEAD_SHARE = 0.5


def plain_cut(weights: Weights, architecture: Architecture, target: Architecture) -> Weights:
    """The first coordinates of every axis.

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
    tied_head_share: float = TIED_HEAD_SHARE,
    fold: bool = False,
) -> Weights:
    """The plain cut with every reading layer refitted to the stream it used to read.

    With f the features that the cut model still has and y what is missing from the full stream, y ~ Y f + c in least
    squares over the calibration text (see `regress`). A reader W becomes W_kept + W Y, its bias, where all readers of
    the stream have one, b + W c. Norm gains are multiplied by the ratio of the kept coordinates' root mean square to
    the full one; a LayerNorm's features are centred over the kept coordinates, so y also holds the kept coordinates'
    mean. Dropped heads and neurons go the same way through the output and down projections.

    An approximation (the ratio varies from token to token); exact as ridge -> 0 with an untied head where the dropped
    coordinates are copies of kept ones, each copied equally often.

    Args:
        weights: the full model's; of each tensor only the outputs that stay are read.
        statistics: moments of the full model in the same coordinate order.
        target: same depth, no wider than `architecture` in any dimension.
        tied_head_share: how far a tied table moves towards the refitted head (it is also read as input), 0 to 1.
        fold: whether norm gains are put into their readers first (see `fold_norms`).

    Returns:
        Weights of `target`; what is calculated is so in float32, or in float64 where the weights are.
    """
    _check_narrower(architecture, target)
    norms, readers = norms_of(architecture), readers_of(architecture)
    outputs = _cut_outputs(weights, architecture, target)
    if fold:
        outputs = fold_norms(outputs, architecture)
    kept = {site.axis: prefix_index(site.axis, architecture.sizes, target.sizes) for site in architecture.sites}
    cut = {axis for axis, index in kept.items() if len(index) < _length(axis, architecture)}

    # As many as a layer has: the readers of one site follow each other, their biases may come after other sites.
    @functools.lru_cache(maxsize=len(architecture.family.sites))
    def fit(site: Site) -> Fit:
        gain, shift = None, None
        if site.norm:
            gain, shift = outputs[f"{site.name}.weight"], outputs.get(f"{site.name}.bias")
        centred = site.norm and architecture.family.norm_type == "layer"
        intercept = all(f"{reader}.bias" in architecture.tensors for reader in site.readers)
        return regress(statistics, site.name, kept[site.axis], gain, shift, centred, intercept)

    def tensor(key: str) -> torch.Tensor:
        module, kind = key.rsplit(".", 1)
        if module in norms and norms[module].axis in cut:
            part = working(outputs[key])[kept[norms[module].axis]]
            size = len(part)
            ratio = rms_ratio(statistics, norms[module], architecture.family.norm_type, size)
            return part * ratio if kind == "weight" else part
        site = readers.get(module)
        if site is None or site.axis not in cut:
            return outputs[key]
        weight = f"{module}.weight"
        axes = architecture.tensors[weight]
        full = outputs[weight]
        matrix = input_matrix(full, axes, site.axis)
        if kind == "bias":
            return fit(site).shifted(matrix, working(outputs[key]))
        tied = site is architecture.sites[-1] and architecture.tied
        refitted = fit(site).refitted(matrix, tied_head_share if tied else 1.0)
        return from_input_matrix(refitted, full, axes, site.axis)

    return LazyWeights(target.tensors, tensor)


def _length(axis: tuple[str, ...], architecture: Architecture) -> int:
    return len(prefix_index(axis, architecture.sizes, architecture.sizes))


def _check_narrower(architecture: Architecture, target: Architecture) -> None:
    wider = [dim for dim, size in target.sizes.items() if size > architecture.sizes[dim]]
    if wider or target.depth != architecture.depth:
        raise ValueError(
            f"Cannot cut {architecture.shape} to {target.shape}: a cut keeps the depth and makes nothing larger "
            f"(larger: {', '.join(wider) or 'nothing'}). Select layers with `select_layers`, grow with `grow_width`."
        )


def _cut_outputs(weights: Weights, architecture: Architecture, target: Architecture) -> Weights:
    """The plain cut of all that is written; what readers read along, norms included, stays whole."""
    norms, readers, sizes = norms_of(architecture), readers_of(architecture), architecture.sizes

    def tensor(key: str) -> torch.Tensor:
        module, kind = key.rsplit(".", 1)
        whole = readers[module].axis if module in readers and kind == "weight" else ()
        if module in norms:
            whole = norms[module].axis
        return prefix(weights[key], architecture.tensors[key], sizes, target.sizes, whole)

    return LazyWeights(architecture.tensors, tensor)


def rms_ratio(statistics: SiteStatistics, site: Site, norm_type: str, kept: int) -> float:
    """Root mean square (LayerNorm: standard deviation) of a normalised stream's first channels over that of all."""
    variances = statistics.variances(site.name)
    full, part = variances.mean(), variances[:kept].mean()
    if norm_type == "layer":
        # The prefix has a mean of its own, which the cut model's LayerNorm removes.
        part = part - statistics.prefix_squares(site.name)[kept - 1] / kept**2
    return float((part / full).sqrt())
