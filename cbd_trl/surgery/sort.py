"""Sorting a model so that every prefix is its best subset: exact, a permutation that nothing outside sees."""

from dataclasses import dataclass

import torch

from cbd_trl.architectures import Architecture, Site
from cbd_trl.architectures.axes import Sizes, dims_of, select
from cbd_trl.surgery.permute import Order, permute
from cbd_trl.surgery.statistics import Statistics
from cbd_trl.surgery.weights import Weights, input_matrix, reader_keys


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

    Channels are summed over all norm outputs of the model; neurons and heads are weighted by the norm of their output
    column. After Minitron, arXiv 2407.14679, section 2.2, which uses mean |x|.
    """
    width = torch.zeros(architecture.sizes["width"], dtype=torch.float64)
    inner: dict[str, list[torch.Tensor]] = {"ffn": [], "group": []}
    for site in architecture.sites:
        rms = statistics.variances(site.name).clamp(min=0).sqrt()
        if site.norm:
            width += rms * weights[f"{site.name}.weight"].double().abs().cpu()
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
    index = {
        site.name: _site_order(site, architecture.sizes, order.index(architecture.split_name(site.name)[0]))
        for site in architecture.sites
    }
    return permute(weights, architecture, order), statistics.reindexed(index)


def _site_order(site: Site, sizes: Sizes, orders: dict[str, torch.Tensor]) -> torch.Tensor:
    length = 1
    for dim in dims_of((site.axis,)):
        length *= sizes[dim]
    return select(torch.arange(length), (site.axis,), sizes, orders)
