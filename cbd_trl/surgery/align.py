"""Match the coordinates of two models that were trained apart, by their activations on the same text.

Shapes: L layers of the upper model, with D channels, F neurons, G key/value groups of Q query heads and C channels of
a convolution in a layer; l, d, f, g, q and c of the lower one. Rows of layers without such coordinates mean nothing.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from cbd_trl.architectures import Architecture, Site
from cbd_trl.surgery.reorder import WIDTH, Importance, Order
from cbd_trl.surgery.statistics import Statistics, collect_statistics, watched
from cbd_trl.surgery.weights import Weights, input_matrix, reader_keys, weights_of
from cbd_trl.utils.progress import Progress


@dataclass(frozen=True)
class MeasuredModel:
    """One of the two models: its weights, its architecture, and its moments on the common text."""

    weights: Weights
    architecture: Architecture
    statistics: Statistics


@dataclass(frozen=True)
class Quality:
    """How well one kind of coordinate was matched.

    Args:
        matched: mean |correlation| of the matched pairs, 0 to 1.
        random: the same to be expected of a random assignment (the mean over all pairs).
    """

    matched: float
    random: float


@dataclass(frozen=True)
class Match:
    """For each coordinate of the lower model one of the upper model's, none used twice.

    Args:
        width: (d,) int64, channels; one match for the whole model.
        signs: (d,) of 1 and -1: whether the two channels are each other's mirror image.
        ffn: (l, f) int64, neurons of the upper layer beside each lower one.
        group: (l, g) int64, key/value groups.
        query: (l, g, q) int64, query heads inside the matched group.
        quality: "width", "ffn", "heads" and, where there are any, "conv".
        conv: (l, c) int64, channels of a layer's convolution; None in models without.
    """

    width: torch.Tensor
    signs: torch.Tensor
    ffn: torch.Tensor
    group: torch.Tensor
    query: torch.Tensor
    quality: dict[str, Quality]
    conv: torch.Tensor | None = None

    def record(self) -> dict[str, dict[str, float]]:
        """The quality, rounded for chain.json."""
        return {
            kind: {name: round(value, 4) for name, value in dataclasses.asdict(quality).items()}
            for kind, quality in self.quality.items()
        }


def measured_model(
    model: nn.Module, architecture: Architecture, batches: Iterable[Mapping[str, torch.Tensor]]
) -> MeasuredModel:
    """Collect the moments that matching needs.

    Args:
        model: a causal LM, on any device.
        architecture: of it.
        batches: `input_ids` (B, T) without padding.
    """
    heads = {site.name: site.name for site in architecture.sites if site.axis[0] == "group"}
    statistics = collect_statistics(model, architecture, Progress("Collecting statistics", batches), seconds=heads)
    return MeasuredModel(weights_of(model, architecture), architecture, statistics)


@torch.no_grad()
def collect_cross_moments(
    upper: nn.Module,
    upper_architecture: Architecture,
    lower: nn.Module,
    lower_architecture: Architecture,
    kept: Sequence[int],
    batches: Iterable[Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Run the same text through two models and average the products of what they read at paired sites.

    One pass; in memory are the moments (float32, upper x lower width for every site) and the upper streams of one
    batch.

    Args:
        upper, lower: causal LMs in eval mode, on any device.
        upper_architecture, lower_architecture: of the two models.
        kept: for each lower layer the upper layer beside it.
        batches: `input_ids` (B, T) without padding.

    Returns:
        {lower site: E[x y^T], (D, d)}, x and y the upper and the lower model's stream there: normalized before gain
        and bias at a norm, the raw input elsewhere.

    Raises:
        ValueError: there are no batches.
    """
    pairs = paired_sites(upper_architecture, lower_architecture, kept)
    partner = {below.name: above.name for above, below in pairs}
    seen: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def keep(name: str, stream: torch.Tensor) -> None:
        seen[name] = stream.float()

    def multiply(name: str, stream: torch.Tensor) -> None:
        rows = stream.float()
        product = seen[partner[name]].to(rows.device).T @ rows
        sums[name] = sums[name].add_(product) if name in sums else product

    above_sites = {above.name: above for above, _ in pairs}.values()
    with (
        watched(upper, upper_architecture, above_sites, keep),
        watched(lower, lower_architecture, lower_architecture.sites, multiply),
    ):
        for batch in batches:
            for model in (upper, lower):
                device = next(model.parameters()).device
                model(input_ids=batch["input_ids"].to(device), use_cache=False, logits_to_keep=1)
            tokens += batch["input_ids"].numel()
    if tokens == 0:
        raise ValueError("There is no text to match the two models on. Give a dataset with text in it.")
    return {name: (total / tokens).cpu() for name, total in sums.items()}


def match_models(
    upper: MeasuredModel,
    lower: MeasuredModel,
    cross: Mapping[str, torch.Tensor],
    kept: Sequence[int],
    prefix: bool = False,
) -> Match:
    """Find the assignments (scipy's, rectangular) with the largest sum of correlations.

    Channels by the correlation of the streams as layers read them, averaged over the model; where all norms are
    RMSNorm a channel may also match the mirror image of another, because there a change of sign is exact. Neurons by
    the correlation of their activations. Heads by the correlation of what they write into the matched channels, which
    does not depend on the basis inside a head; groups by their best match of query heads.

    Args:
        upper, lower: models of one family; the lower one is no larger in any dimension and has the same head size.
        cross: moments of both streams (see `collect_cross_moments`).
        kept: for each lower layer the upper layer beside it.
        prefix: match with the first coordinates of the upper model only, as many as the lower one has.
    """
    pairs = paired_sites(upper.architecture, lower.architecture, kept)

    def within(scores: torch.Tensor) -> torch.Tensor:
        return scores[: scores.shape[1]] if prefix else scores

    def correlation(above: Site, below: Site) -> torch.Tensor:
        return _correlation(cross[below.name], upper.statistics, lower.statistics, above.name, below.name)

    reads = [correlation(above, below) for above, below in pairs if below.axis == ("width",)]
    streams = within(torch.stack(reads).mean(0))
    mirrors = upper.architecture.family.norm_type == "rms"
    width = assignment(streams.abs() if mirrors else streams)
    signs = torch.where(mirrors & (_picked(streams, width) < 0), -1.0, 1.0)
    sizes = lower.architecture.sizes
    shapes: dict[str, tuple[int, ...]] = {dim: (sizes[dim],) for dim in ("ffn", "group", "conv") if dim in sizes}
    shapes["query"] = (sizes["group"], sizes["query"])
    found = {dim: torch.arange(shape[-1]).expand(len(kept), *shape).clone() for dim, shape in shapes.items()}
    qualities = {"width": [_quality(streams, width)]}
    for above, below in Progress("Matching coordinates", pairs):
        layer, dim = lower.architecture.split_name(below.name)[0], below.axis[0]
        if dim in ("ffn", "conv"):
            activations = within(correlation(above, below))
            found[dim][layer] = assignment(activations)
            qualities.setdefault(dim, []).append(_quality(activations, found[dim][layer]))
        elif dim == "group":
            heads = _head_correlation(upper, lower, cross[below.name], above, below, width, signs)
            each = heads.view(*(one.architecture.sizes[dim] for one in (upper, lower) for dim in ("group", "query")))
            if prefix:
                each = each[: sizes["group"], : sizes["query"]]
            group, query = _match_groups(each)
            found["group"][layer], found["query"][layer] = group, query
            flat = group[:, None] * each.shape[1] + query
            qualities.setdefault("heads", []).append(_quality(each.flatten(0, 1).flatten(1), flat.flatten()))
    mean = {kind: _mean_quality(each) for kind, each in qualities.items()}
    return Match(width, signs, **found, quality=mean)


def order_above(match: Match, lower: Order, upper: Architecture, scores: Importance, kept: Sequence[int]) -> Order:
    """Reorder the upper model so that the lower one lies on a prefix of its coordinates.

    Matched coordinates come first, in the lower model's order; the others follow by importance, as do all neurons and
    groups of the layers that no lower layer stands beside.

    Args:
        match: of the two models in their present coordinates.
        lower: the lower model's new coordinates.
        upper: architecture of the upper model.
        scores: the upper model's importance in its present coordinates.
        kept: for each lower layer the upper layer beside it.
    """
    width = _then_rest(match.width[lower.width], scores.width)
    signs = torch.ones(len(width))
    signs[: len(match.signs)] = match.signs[lower.width] * (1 if lower.signs is None else lower.signs)
    ranks = {dim: score for dim in ("ffn", "group", "conv") if (score := getattr(scores, dim)) is not None}
    orders = {dim: score.argsort(descending=True) for dim, score in ranks.items()}
    group = orders["group"]
    query = torch.arange(upper.sizes["query"]).expand(*group.shape, -1).clone()
    for below, above in enumerate(kept):
        for dim, score in ranks.items():
            first = getattr(match, dim)[below][getattr(lower, dim)[below]]
            orders[dim][above] = _then_rest(first, score[above])
        for place, served in enumerate(lower.group[below]):
            inside = match.query[below][served]
            inside = inside if lower.query is None else inside[lower.query[below][place]]
            query[above][place] = _then_rest(inside, torch.zeros(query.shape[-1]))
    return Order(width, query=query, signs=signs, **orders)


def order_below(match: Match) -> Order:
    """Reorder the lower model so that each coordinate has the number of the upper one that it was matched with.

    Args:
        match: made with `prefix`.
    """
    width, group = match.width.argsort(), match.group.argsort()
    query = match.query.argsort().gather(1, group[..., None].expand_as(match.query))
    conv = None if match.conv is None else match.conv.argsort()
    return Order(width, match.ffn.argsort(), group, query, match.signs[width], conv=conv)


def stream_axes(
    cross: Mapping[str, torch.Tensor], upper: Architecture, lower: Architecture, kept: Sequence[int]
) -> torch.Tensor:
    """Find the rotation of the lower model's stream that brings it nearest to the first channels of the upper one's
    (orthogonal Procrustes, summed over all that reads the stream).

    Args:
        cross: moments of both streams (see `collect_cross_moments`).
        upper, lower: architectures of the two models.
        kept: for each lower layer the upper layer beside it.

    Returns:
        Q, (d, d) float64, as `rotate` takes it: of a LayerNorm's stream the mean stays the mean.
    """
    size, reads = lower.sizes["width"], [one for _, one in paired_sites(upper, lower, kept) if one.axis == WIDTH]
    product = sum(cross[site.name][:size].double() for site in reads)
    assert isinstance(product, torch.Tensor)
    if lower.family.norm_type != "layer":
        left, _, right = torch.linalg.svd(product.T)
        return left @ right
    mean = product.new_full((size, 1), 1 / size**0.5)
    apart = torch.eye(size, dtype=product.dtype) - mean @ mean.T
    left, _, right = torch.linalg.svd(apart @ product.T @ apart)
    # The last singular value is the mean's, which is 0.
    return left[:, :-1] @ right[:-1] + mean @ mean.T


def layer_similarity(streams: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compare the streams behind the layers of two models by linear CKA (Kornblith et al., arXiv 1905.00414,
    equation 5), which no rotation of either changes.

    Args:
        streams: of the upper model, behind each of its L layers, on the same N tokens: (N, D).
        others: of the lower model, l times (N, d).

    Returns:
        (l, L) of 0 to 1.
    """

    def gram(stream: torch.Tensor) -> torch.Tensor:
        centered = stream.float() - stream.float().mean(0)
        product = (centered @ centered.T).flatten()
        # What writes nothing is like nothing.
        return product / product.norm().clamp(min=torch.finfo(product.dtype).tiny)

    grams = torch.stack([gram(stream) for stream in streams])
    return torch.stack([grams @ gram(other) for other in others])


def paired_sites(upper: Architecture, lower: Architecture, kept: Sequence[int]) -> list[tuple[Site, Site]]:
    """Pair the sites of two models of one family that stand for each other, (upper, lower).

    Args:
        upper, lower: architectures of the two models.
        kept: for each lower layer the upper layer beside it.
    """
    above = {site.name: site for site in upper.sites}
    pairs = []
    for site in lower.sites:
        layer, name = lower.split_name(site.name)
        pairs.append((above[site.name if layer is None else upper.layer_name(kept[layer], name)], site))
    return pairs


def assignment(scores: torch.Tensor) -> torch.Tensor:
    """Assign a row to each column, no row twice, so that the sum of scores is largest.

    Args:
        scores: (R, C), C <= R.

    Returns:
        (C,) int64.
    """
    columns, rows = linear_sum_assignment(scores.T.numpy(), maximize=True)
    assert len(columns) == scores.shape[1]
    return torch.from_numpy(rows)


def _match_groups(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Match groups (g,) by the sum over their best match of query heads (G, Q, g, q), and return those matches (g, q),
    too."""
    pairs = heads.transpose(1, 2)
    query = torch.stack([torch.stack([assignment(scores) for scores in row]) for row in pairs])
    total = pairs.gather(2, query[:, :, None]).sum((2, 3))
    group = assignment(total)
    return group, query[group, torch.arange(len(group))]


def _head_correlation(
    upper: MeasuredModel,
    lower: MeasuredModel,
    cross: torch.Tensor,
    above: Site,
    below: Site,
    width: torch.Tensor,
    signs: torch.Tensor,
) -> torch.Tensor:
    """Compute the correlation of what every pair of heads writes into the matched channels: (G Q, g q) float64."""
    written = _output_matrix(upper, above)[width] * signs[:, None], _output_matrix(lower, below)
    dim = upper.architecture.sizes["dim"]
    means = upper.statistics.mean(above.name), lower.statistics.mean(below.name)
    covariance = _blocks(cross.double() - torch.outer(*means), dim)
    weights = [matrix.view(len(width), -1, dim) for matrix in written]
    inner = torch.einsum("wad,wbe,abde->ab", *weights, covariance)
    variances = []
    for model, site, mean, weight in zip((upper, lower), (above, below), means, weights, strict=True):
        own = _blocks(model.statistics.second(site.name) - torch.outer(mean, mean), dim)
        each = torch.arange(len(own))
        variances.append(torch.einsum("wad,wae,ade->a", weight, weight, own[each, each]))
    return _normed(inner, *variances)


def _output_matrix(model: MeasuredModel, site: Site) -> torch.Tensor:
    """Read the weight of an output projection, (width, inputs) float64."""
    key, _ = reader_keys(site.readers[0], model.weights, model.architecture)
    return input_matrix(model.weights[key], model.architecture.tensors[key], site.axis).double()


def _blocks(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """Split a matrix by heads: (heads x dim, heads x dim) -> (heads, heads, dim, dim)."""
    return matrix.view(matrix.shape[0] // dim, dim, matrix.shape[1] // dim, dim).transpose(1, 2)


def _correlation(cross: torch.Tensor, upper: Statistics, lower: Statistics, above: str, below: str) -> torch.Tensor:
    """Compute the correlation of two models' coordinates at a site, (D, d) float64; 0 for what never varies."""
    covariance = cross.double() - torch.outer(upper.mean(above), lower.mean(below))
    return _normed(covariance, _variance(upper, above), _variance(lower, below))


def _normed(covariance: torch.Tensor, *variances: torch.Tensor) -> torch.Tensor:
    scale = torch.outer(*(variance.clamp(min=0).sqrt() for variance in variances))
    return torch.where(scale > 0, covariance / scale, 0.0)


def _variance(statistics: Statistics, site: str) -> torch.Tensor:
    return statistics.variances(site) - statistics.mean(site) ** 2


def _then_rest(first: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """List all positions of `scores`: those in `first`, then the others by score."""
    rest = scores.argsort(descending=True, stable=True)
    return torch.cat([first, rest[~torch.isin(rest, first)]])


def _picked(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return scores[rows, torch.arange(len(rows))]


def _quality(correlation: torch.Tensor, rows: torch.Tensor) -> Quality:
    return Quality(float(_picked(correlation, rows).abs().mean()), float(correlation.abs().mean()))


def _mean_quality(each: Sequence[Quality]) -> Quality:
    return Quality(*(sum(values) / len(each) for values in zip(*((q.matched, q.random) for q in each), strict=True)))
