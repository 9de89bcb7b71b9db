"""Collect the moments of every stream that linear layers read, and of every norm over an output."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from cbd_trl.architectures import Architecture, OutputNorm, Site
from cbd_trl.architectures.backbone import own_forward
from cbd_trl.utils.modeling import in_eval_mode, portable_attention
from cbd_trl.utils.progress import Progress

RIDGE = 1e-3
_KINDS = ("mean", "second", "square")


class SiteStatistics(Protocol):
    """The moments of a model that a cut reads, in memory (`Statistics`) or on disk (`StoredStatistics`).

    Args:
        ridge: of `factor`, times each coordinate's own variance.
    """

    @property
    def ridge(self) -> float:
        """The ridge that the factors hold, times each coordinate's own variance."""

    def mean(self, site: str) -> torch.Tensor:
        """Return E[x], (D,)."""

    def variances(self, site: str) -> torch.Tensor:
        """Return E[x_i^2], (D,), at a site or an output norm."""

    def prefix_squares(self, site: str) -> torch.Tensor:
        """Return E[(x_1 + ... + x_i)^2] for every i, (D,)."""

    def second(self, site: str) -> torch.Tensor:
        """Return E[x x^T], (D, D)."""

    def factor(self, site: str, kept: torch.Tensor) -> torch.Tensor:
        """Return L, (D, P): (cov(x) + ridge)[:, kept] = L L[kept]^T, L[kept] lower triangular, `kept` ascending."""


@dataclass(frozen=True)
class Statistics:
    """Moments per token at every site of a model, in memory.

    Args:
        means: {site: E[x], (D,) float32}; x is the normalized stream before gain and bias at a norm, the raw input
            elsewhere.
        seconds: {site: E[x x^T], its upper triangle row by row, (D (D + 1) / 2,) float32}.
        tokens: number of tokens averaged over, padding left out.
        squares: {output norm: E[x_i^2], (D,) float32}; x is its input, normalized, before the gain.
        ridge: of `factor`, times each coordinate's own variance.
    """

    means: Mapping[str, torch.Tensor]
    seconds: Mapping[str, torch.Tensor]
    tokens: int
    squares: Mapping[str, torch.Tensor] = field(default_factory=dict)
    ridge: float = RIDGE

    def mean(self, site: str) -> torch.Tensor:
        """Return E[x], (D,) float64."""
        return self.means[site].double()

    def second(self, site: str) -> torch.Tensor:
        """Return E[x x^T], (D, D) float64."""
        size = len(self.means[site])
        upper = torch.zeros(size, size, dtype=torch.float64)
        rows, columns = torch.triu_indices(size, size)
        upper[rows, columns] = self.seconds[site].double()
        return upper + upper.triu(1).T

    def variances(self, site: str) -> torch.Tensor:
        """Return E[x_i^2], (D,) float64, at a site or an output norm."""
        if site in self.squares:
            return self.squares[site].double()
        # The diagonal of `second`, without unpacking it.
        size = len(self.means[site])
        rows = torch.arange(size)
        return self.seconds[site][rows * size - rows * (rows - 1) // 2].double()

    def prefix_squares(self, site: str) -> torch.Tensor:
        """Compute E[(x_1 + ... + x_i)^2] for every i, (D,) float64."""
        second = self.second(site)
        return (2 * second.triu().sum(0) - second.diagonal()).cumsum(0)

    def factor(self, site: str, kept: torch.Tensor) -> torch.Tensor:
        """Compute L, (D, P) float64, with (cov(x) + ridge)[:, kept] = L L[kept]^T and L[kept] lower triangular."""
        return factorize(self.mean(site), self.second(site), kept, self.ridge)

    def reindexed(self, index: Mapping[str, torch.Tensor]) -> "Statistics":
        """Reorder to those of a model whose stream at `site` is x[index[site]]; sites without an entry are dropped."""
        means, seconds, squares = {}, {}, {}
        for site in Progress("Sorting the statistics", index):
            order = index[site]
            if site in self.squares:
                squares[site] = self.squares[site][order]
            elif site in self.means:
                means[site] = self.means[site][order]
                seconds[site] = _packed(self.second(site)[order][:, order])
        return Statistics(means, seconds, self.tokens, squares, self.ridge)

    def rotated(self, sites: Collection[str], axes: torch.Tensor) -> "Statistics":
        """Rotate to those of a model whose stream at these sites is Q^T x, the others being as they are.

        Args:
            sites: of one stream.
            axes: Q, (D, D) float64, orthogonal.
        """
        means, seconds = dict(self.means), dict(self.seconds)
        for site in Progress("Rotating the statistics", sites):
            means[site] = (axes.T @ self.mean(site)).float()
            seconds[site] = _packed(axes.T @ self.second(site) @ axes)
        return dataclasses.replace(self, means=means, seconds=seconds)


@torch.no_grad()
def collect_statistics(
    model: nn.Module, architecture: Architecture, batches: Iterable[Mapping[str, torch.Tensor]], max_tokens: int
) -> Statistics:
    """Run calibration batches through a model and average the moments at every site.

    What begins a text counts like any other token: of Gemma 3 270M, cut to four fifths, KL to the source is 1.54 nats
    with `<bos>` in the moments and 2.61 without (docs/results/quality.md).

    Args:
        model: the causal LM described by `architecture`; put into eval mode for the run.
        batches: model inputs (`input_ids` (B, T), and `attention_mask` where there is padding); `labels` are ignored.
        max_tokens: stop after the batch that reaches this many tokens.

    Raises:
        ValueError: the batches hold no token.
    """
    over_outputs = {norm.name: norm for norm in architecture.cut_output_norms}
    sums: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in _KINDS}
    mask_of: list[torch.Tensor] = []

    def add(name: str, stream: torch.Tensor) -> None:
        rows = stream[mask_of[0].flatten()].float()
        if name in over_outputs:
            found = {"square": rows.square().sum(0, dtype=torch.float64)}
        else:
            found = {"mean": rows.sum(0, dtype=torch.float64), "second": rows.T @ rows}
        for kind, total in found.items():
            sums[kind][name] = sums[kind][name].add_(total) if name in sums[kind] else total

    device = next(model.parameters()).device
    tokens = 0
    sites: list[Site | OutputNorm] = [*architecture.sites, *over_outputs.values()]
    with (
        own_forward(model),
        in_eval_mode(model),
        portable_attention(model),
        watched(model, architecture, sites, add),
    ):
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            inputs.pop("labels", None)
            padding = inputs.get("attention_mask")
            mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if padding is None else padding.bool()
            mask_of[:] = [mask]
            model(**inputs, use_cache=False, logits_to_keep=1)
            tokens += int(mask.sum())
            if tokens >= max_tokens:
                break
    if tokens == 0:
        raise ValueError(
            "The calibration text holds no token, so nothing can be sorted or cut. Give a dataset with text in it."
        )
    means, seconds, squares = (
        {name: (total / tokens).float().cpu() for name, total in sums[kind].items()} for kind in _KINDS
    )
    return Statistics(means, {name: _packed(second) for name, second in seconds.items()}, tokens, squares)


@contextmanager
def watched(
    model: nn.Module,
    architecture: Architecture,
    places: Iterable[Site | OutputNorm],
    visit: Callable[[str, torch.Tensor], None],
) -> Iterator[None]:
    """Call `visit(name, x)` in every forward pass of a model with the input of each of these sites and norms.

    x is (B T, D), a row a token: normalized before gain and bias, in float32, at a norm; the raw input elsewhere.
    """
    modules = dict(model.named_modules())
    norm = (architecture.family.norm_type, architecture.eps)
    # The embeddings come through the final norm first, in every forward pass.
    calls = itertools.count() if architecture.family.bare_norms else itertools.repeat(1)

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if name == architecture.family.final_site.name and next(calls) % 2 == 0:
                return
            # OPT's FFN sees one row of tokens, whatever the batch.
            stream = inputs[0].detach().flatten(0, -2)
            visit(name, normalize_stream(stream, *norm) if name in architecture.norms else stream)

        return hook

    handles = [modules[place.name].register_forward_pre_hook(hook_for(place.name)) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def normalize_stream(stream: torch.Tensor, norm_type: str, eps: float) -> torch.Tensor:
    """Apply RMSNorm ("rms") or LayerNorm ("layer") without gain and bias, over the last axis, in float32."""
    stream = stream.float()
    if norm_type == "layer":
        stream = stream - stream.mean(-1, keepdim=True)
    return stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + eps)


def deviations(mean: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Compute standard deviations, (D,) float64, from E[x] and E[x^2], above zero where a coordinate is constant."""
    mean, squares = mean.double(), squares.double()
    # Single precision sums leave nothing below this of a constant coordinate's variance.
    return (squares - mean.square()).clamp(min=1e-6 * squares + 1e-12 * squares.mean()).sqrt()


def factorize(mean: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """Compute the columns of L of the coordinates `kept`, which come first: (D, P), rows in their own order.

    Args:
        mean, second: E[x], (D,), and E[x x^T], (D, D).
        kept: (P,) int64, ascending.
        ridge: added to the correlations' diagonal; more where rounding made the moments indefinite.
    """
    deviation = deviations(mean, second.diagonal())
    correlation = (second - torch.outer(mean, mean)) / deviation[:, None] / deviation
    columns = correlation[:, kept]
    block = columns[kept]
    for _ in range(20):
        block.diagonal().add_(ridge)
        triangle, failed = torch.linalg.cholesky_ex(block)
        if not failed:
            break
        ridge *= 9
    factor = torch.linalg.solve_triangular(triangle.T, columns, upper=True, left=False)
    factor[kept] = triangle
    return factor * deviation[:, None]


def _packed(second: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.triu_indices(*second.shape)
    return second[rows, columns].float()
