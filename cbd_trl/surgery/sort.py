"""Sorting a model so that every prefix is its best subset: exact, a permutation that nothing outside sees."""

from dataclasses import dataclass

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Sizes, axis_length, select
from cbd_trl.surgery.reorder import Order, permute
from cbd_trl.surgery.statistics import Statistics
from cbd_trl.surgery.weights import Weights, input_matrix, reader_keys
from cbd_trl.utils.progress import Progress


@dataclass(frozen=True)
class Importance:
    """How much each coordinate matters (any unit, larger is more important).

    Args:
        width: (D,) residual channels.
        ffn: (L, F) FFN neurons of each layer.
        group: (L, G) key/value groups of each layer.
    """

    width: torch.Tensor
    ffn: torch.Tensor
    group: torch.Tensor


def importance(weights: Weights, architecture: Architecture, statistics: Statistics) -> Importance:
    """Root mean square activation times the size of what reads it.

    Channels are summed over all streams that layers read, each divided by its root mean square over all channels
    where no norm does it; neurons and heads are weighted by the norm of their output column. After Minitron, arXiv
    2407.14679, section 2.2, which uses mean |x|.
    """
    width = torch.zeros(architecture.sizes["width"], dtype=torch.float64)
    inner: dict[str, list[torch.Tensor]] = {"ffn": [], "group": []}
    for site in Progress("Ranking the coordinates", architecture.sites):
        rms = statistics.variances(site.name).clamp(min=0).sqrt()
        if site.axis == ("width",):
            gain = weights[f"{site.name}.weight"].double().abs().cpu() if site.norm else 1 / rms.square().mean().sqrt()
            # The table that is read with is as many times larger as the gain is smaller.
            tied_final = architecture.tied and site is architecture.sites[-1]
            width += rms * gain * (architecture.embedding_scale if tied_final else 1.0)
            continue
        key, _ = reader_keys(site.readers[0], weights, architecture)
        score = rms * input_matrix(weights[key], architecture.tensors[key], site.axis).double().norm(dim=0).cpu()
        outermost = site.axis[0]
        inner[outermost].append(score.reshape(architecture.sizes[outermost], -1).sum(-1))
    return Importance(width, torch.stack(inner["ffn"]), torch.stack(inner["group"]))


def importance_order(scores: Importance) -> Order:
    """The coordinates in descending importance."""
    return Order(*(score.argsort(descending=True) for score in (scores.width, scores.ffn, scores.group)))


def sort_weights(
    weights: Weights, architecture: Architecture, statistics: Statistics, scores: Importance
) -> tuple[Weights, Statistics]:
    """Permute channels, neurons and key/value groups into descending importance; the logits stay equal.

    Returns:
        The permuted weights and the statistics in the new order.
    """
    order = importance_order(scores)
    axes = {site.name: site.axis for site in architecture.sites}
    axes |= {norm.name: norm.axis for norm in architecture.output_norms}
    index = {
        name: _site_order(axis, architecture.sizes, order.index(architecture.split_name(name)[0]))
        for name, axis in axes.items()
    }
    return permute(weights, architecture, order), statistics.reindexed(index)


def _site_order(axis: tuple[str, ...], sizes: Sizes, orders: dict[str, torch.Tensor]) -> torch.Tensor:
    return select(torch.arange(axis_length(axis, sizes)), (axis,), sizes, orders)
