"""Score shapes of one size: without data by the energy that the stored statistics say is lost, or on calibration text.

Both compare shapes at an equal size, in parameters or in what the request's budget counts: a shape larger or smaller
than requested is charged or credited what the line between the anchors gives for the difference.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState

from cbd_trl.architectures import Architecture, Site
from cbd_trl.architectures.axes import Sizes, axis_length, prefix_index
from cbd_trl.chain.model import build_model
from cbd_trl.losses.held_out import HeldOutDivergence
from cbd_trl.targets.operators import OPERATORS, Pair, Plan, layer_stack
from cbd_trl.targets.request import ANCHOR, Request, Target, open_pair
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.progress import Progress


class LostEnergy:
    """What a target loses of the upper anchor, as a share of what the lower anchor loses; no weight is read.

    A layer that is left out loses all it adds, a layer that is cut the mean over its sites of the share of the
    variance that no linear map of the kept coordinates gives back (the sites' moments are the upper anchor's). The two
    are sums of the same thing: layers, each weighted by what it costs, in nats, to do without it (`Block.cost`, over
    the layers that the block leaves out; the mean of these for layers that no block leaves out, and for what reads the
    stream behind the last layer; 1 where no cost is known).

    Args:
        pair: architectures, statistics, blocks and costs of the two anchors; its weights may be empty.
    """

    def __init__(self, pair: Pair) -> None:
        self._pair, self._upper = pair, pair.upper_architecture
        self._worth = _worth_of_layers(pair)
        self._sites: dict[int | None, list[Site]] = {}
        for site in self._upper.sites:
            self._sites.setdefault(self._upper.split_name(site.name)[0], []).append(site)
        self._energies = functools.cache(self._column_energies)
        self._all = self._lost(pair.lower_architecture)

    def __call__(self, target: Architecture) -> float:
        """Compute the share: 0 for the upper anchor, 1 for the lower one.

        Args:
            target: of a depth that whole blocks give, widths between those of the anchors.

        Raises:
            ValueError: a width differs, and the pair has no statistics.
        """
        return self._lost(target) / self._all

    def _lost(self, target: Architecture) -> float:
        kept = {None, *(layer for _, layer in layer_stack(self._pair, Plan(target)))}
        lost = sum(worth for layer, worth in self._worth.items() if layer not in kept)
        return lost + sum(self._worth[layer] * self._mean_share(layer, target.sizes) for layer in kept)

    def _mean_share(self, layer: int | None, sizes: Sizes) -> float:
        sites = self._sites[layer]
        return sum(self._share(site, sizes) for site in sites) / len(sites)

    def _share(self, site: Site, sizes: Sizes) -> float:
        """Compute the share of a site's variance that its kept coordinates do not give."""
        length, whole = axis_length(site.axis, sizes), axis_length(site.axis, self._upper.sizes)
        if length == whole:
            return 0.0
        if site.routed:
            # Experts' neurons have no moments on disk: each counts the same.
            return 1 - length / whole
        energies, kept = self._energies(site.name), prefix_index(site.axis, self._upper.sizes, sizes)
        total = float(energies.sum())
        if total == 0:
            return 0.0
        if int(kept[-1]) == length - 1:
            return float(energies[length:].sum()) / total
        given = float(self._pair.moments().factor(site.name, kept).double().square().sum())
        return max(0.0, 1 - given / total)

    def _column_energies(self, site: str) -> torch.Tensor:
        """Compute for each coordinate the variance of all that it gives beyond those before it, (D,) float64.

        The columns of the Cholesky factor: of any prefix, the later columns are what it does not give.
        """
        statistics = self._pair.moments()
        return statistics.factor(site, torch.arange(len(statistics.mean(site)))).double().square().sum(0)


def _worth_of_layers(pair: Pair) -> dict[int | None, float]:
    """Weigh the upper layers, and None: what is behind the last of them."""
    worth: dict[int | None, float] = {}
    for block, kept, cost in zip(pair.blocks, pair.kept, pair.costs or [0.0] * len(pair.kept), strict=True):
        worth |= {layer: max(cost, 0.0) / (len(block) - 1) for layer in block if layer != kept}
    mean = sum(worth.values()) / max(len(worth), 1)
    if mean == 0:
        return dict.fromkeys([*range(pair.upper_architecture.depth), None], 1.0)
    return {layer: worth.get(layer, mean) for layer in (*range(pair.upper_architecture.depth), None)}


def score_by_statistics(targets: Sequence[Target], request: Request) -> list[Target]:
    """Score targets of one size without data, best first.

    Args:
        targets: of `find_targets`.
        request: theirs.

    Returns:
        the targets with their `score`: the share of what the lower anchor loses (`LostEnergy`), at the requested size.
    """
    if targets[0].operator == ANCHOR:
        return list(targets)
    pair, upper = open_pair(*targets[0].anchors), targets[0].anchors[0]
    lost = LostEnergy(pair if pair.equal_widths else replace(pair, statistics=upper.load_statistics()))
    return _sorted(targets, request, [lost(target.architecture) for target in targets], 1.0)


def score_on_text(targets: Sequence[Target], request: Request, tokens: TokenBlocks, pair: Pair) -> list[Target]:
    """Score targets of one size on calibration text, best first.

    Each is made in float32, on the accelerator if there is one, beside the upper anchor.

    Args:
        targets: of `find_targets`, between two anchors.
        request: theirs.
        tokens: the text.
        pair: the anchors.

    Returns:
        the targets with their `score`: KL(upper anchor || target) in nats per scored token, at the requested size.
    """
    device = PartialState().device

    def made(operator: str, plan: Plan) -> Any:
        weights, architecture = OPERATORS[operator].make(pair, plan)
        model: Any = build_model(architecture, weights, torch.float32)
        return model.to(device)

    divergence = HeldOutDivergence(made("slice", Plan(pair.upper_architecture)), tokens)
    lower = divergence(made("expand", Plan(pair.lower_architecture)))
    scores = [
        divergence(made(target.operator, Plan(target.architecture, request.alpha)))
        for target in Progress("Comparing shapes", targets)
    ]
    return _sorted(targets, request, scores, lower)


def _sorted(targets: Sequence[Target], request: Request, scores: Sequence[float], lower: float) -> list[Target]:
    """Give the targets their scores at exactly the requested size, and sort them.

    Args:
        lower: score of the lower anchor; that of the upper one is 0.
    """
    wanted, budget = request.size, request.budget
    assert wanted is not None
    above, below = (anchor.size(budget) for anchor in targets[0].anchors)
    # All that keeps a limit may be compared as it is.
    slope = lower / (above - below) if request.limits is None else 0.0
    scored = [
        replace(target, score=score + slope * (budget.of(target.architecture) - wanted))
        for target, score in zip(targets, scores, strict=True)
    ]
    return sorted(scored, key=lambda target: target.score or 0.0)
