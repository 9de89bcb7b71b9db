"""Turning a model's residual stream onto its principal axes.

Exact where each norm's gain has a reader to go to: with a head of its own, no norm over what is written to the stream.

Shapes: D channels.
"""

import math

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.surgery.lazy import LazyWeights
from cbd_trl.surgery.norms import balance_norms, fold_norms, folds
from cbd_trl.surgery.statistics import Statistics
from cbd_trl.surgery.weights import Weights, from_input_matrix, input_matrix

_WIDTH = ("width",)
# A LayerNorm's bias is divided by its gain where a reader has no bias to take it: gains below this share of the median
# would make it so large that half precision loses the rest.
_LEAST_GAIN = 0.01


def can_rotate(weights: Weights, architecture: Architecture) -> bool:
    """Whether the stream can be turned: no channel has a gain of its own that no reader takes.

    Not with a tied head, whose table is read by rows and by columns with the final norm's gain between the two; nor
    with norms over what is written to the stream (Gemma 2 and 3, OLMo 2).
    """
    if architecture.tied or any(norm.axis == _WIDTH for norm in architecture.output_norms):
        return False
    kept = [site for site in architecture.sites if site.norm and not folds(site, architecture)]
    gains = [weights[f"{site.name}.weight"].abs() for site in kept]
    return all(bool(gain.min() >= _LEAST_GAIN * gain.median()) for gain in gains)


def principal_axes(architecture: Architecture, statistics: Statistics) -> torch.Tensor:
    """The orthogonal axes of the stream that hold most of it, over all that reads it.

    They are the eigenvectors of the streams' second moments E[x x^T], summed, as in SliceGPT (arXiv 2401.15024,
    section 3.2), which has axes of its own for each layer, and matrices in the residual connections for that: these
    are one set for all, and the model stays a stock one. A LayerNorm's mean must stay the mean, so there each axis is
    turned towards the channels' mean by 1/sqrt(D), and all of them sum to it.

    Returns:
        Q, (D, D) float64, Q^T Q = 1: a column an axis, the one that holds most first.
    """
    second = sum(statistics.second(site.name) for site in architecture.sites if site.axis == _WIDTH)
    assert isinstance(second, torch.Tensor)
    size = len(second)
    centred = architecture.family.norm_type == "layer"
    if centred:
        # The mean, which no layer reads, becomes the last axis, for sure.
        mean = second.new_full((size,), 1 / math.sqrt(size))
        second = second - (1 + second.trace()) * torch.outer(mean, mean)
    axes = torch.linalg.eigh(second).eigenvectors.flip(1)
    # A sign is arbitrary: the same on every machine.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * largest.sign()
    if not centred:
        return axes
    mirror = -mean
    mirror[-1] += 1.0
    return axes - 2 / mirror.square().sum() * torch.outer(axes @ mirror, mirror)


def rotate(weights: Weights, architecture: Architecture, axes: torch.Tensor) -> Weights:
    """The same model with the stream x turned to Q^T x; the logits stay equal.

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
        if _WIDTH not in places or (key.endswith(".weight") and key.rsplit(".", 1)[0] in architecture.norms):
            return own
        return from_input_matrix(input_matrix(own, places, _WIDTH) @ axes.to(own), own, places, _WIDTH)

    return balance_norms(LazyWeights(architecture.tensors, tensor), architecture, precise)


def to_principal_axes(
    weights: Weights, architecture: Architecture, statistics: Statistics
) -> tuple[Weights, Statistics]:
    """The same model with its stream on its principal axes, of which every prefix holds the most that as many can.

    Args:
        weights: of a model that `can_rotate`.
        architecture: of it.
        statistics: its moments.

    Returns:
        The weights, in float64, and the statistics in the new coordinates.
    """
    axes = principal_axes(architecture, statistics)
    streams = [site.name for site in architecture.sites if site.axis == _WIDTH]
    return rotate(weights, architecture, axes), statistics.rotated(streams, axes)
