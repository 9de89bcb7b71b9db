"""Collect the moments of every stream that linear layers read, and of every norm over an output."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import torch
from torch import nn
from transformers.utils import logging

from cbd_trl.architectures import Architecture, OutputNorm, Site
from cbd_trl.architectures.axes import axis_length
from cbd_trl.architectures.backbone import own_forward
from cbd_trl.surgery.experts import Routed, routed_rows, routing
from cbd_trl.utils.formatting import format_bytes
from cbd_trl.utils.modeling import in_eval_mode, is_spread, portable_attention
from cbd_trl.utils.progress import Progress

logger = logging.get_logger(__name__)

RIDGE = 1e-3
# What factorizing a site takes besides its second moments, in units of these: correlations, factor, packed factor.
FACTORIZING = 2.5


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
    """Moments per token at sites of a model, in memory.

    Args:
        means: {site: E[x], (D,) float32}; x is the normalized stream before gain and bias at a norm, the raw input
            elsewhere.
        squares: {site or output norm: E[x_i^2], (D,) float32}; x of an output norm is its input, normalized, before
            the gain.
        seconds: {site: E[x x^T], (D, D) float32, where it was summed}.
        tokens: number of tokens averaged over, padding left out.
        ridge: of `factor`, times each coordinate's own variance.
        neurons: {module of experts: E[(w x_i)^2], (E, F) float32}; x the neurons of each of E experts and w the
            weight that the router gives it, 0 for the tokens that it does not see.
        mass: {module of experts: E[w], (E,) float32}.
    """

    means: Mapping[str, torch.Tensor]
    squares: Mapping[str, torch.Tensor]
    seconds: Mapping[str, torch.Tensor]
    tokens: int
    ridge: float = RIDGE
    neurons: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mass: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def mean(self, site: str) -> torch.Tensor:
        """Return E[x], (D,) float64."""
        return self.means[site].double()

    def second(self, site: str) -> torch.Tensor:
        """Return E[x x^T], (D, D) float64."""
        second = self.seconds[site].cpu().double()
        # A product of float32 matrices is symmetric up to rounding.
        return second.tril() + second.tril(-1).T

    def variances(self, site: str) -> torch.Tensor:
        """Return E[x_i^2], (D,) float64, at a site or an output norm."""
        return self.squares[site].double()

    def prefix_squares(self, site: str) -> torch.Tensor:
        """Compute E[(x_1 + ... + x_i)^2] for every i, (D,) float64."""
        return prefix_squares(self.second(site))

    def factor(self, site: str, kept: torch.Tensor) -> torch.Tensor:
        """Compute L, (D, P) float64, with (cov(x) + ridge)[:, kept] = L L[kept]^T and L[kept] lower triangular."""
        return factorize(self.mean(site), self.second(site), kept, self.ridge)


# (name of a site or an output norm, (N, D) rows of its stream) -> the rows in other coordinates.
Change = Callable[[str, torch.Tensor], torch.Tensor]


def collect_in_groups(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Mapping[str, torch.Tensor]],
    change: Change | None = None,
    budget: int | None = None,
) -> Iterator[Statistics]:
    """Collect the moments at every site, a group of sites at a time: as many as fit, one pass over the text a group.

    The sums of a site are the same bits in whatever group it is.

    Args:
        model: the causal LM described by `architecture`.
        batches: model inputs, run again for each group.
        change: coordinates that the moments are wanted in; None for the model's own.
        budget: bytes for the second moments of a group and for factorizing the largest of its sites; None for half
            of what is free where the model is.

    Yields:
        Statistics of the next sites, in the order of the model. Let go of them before asking for more.

    Raises:
        ValueError: the batches hold no token.
    """
    if budget is None:
        budget = free_bytes(next(model.parameters()).device) // 2
    groups = site_groups(architecture, budget)
    logger.info(
        f"Statistics: {len(groups)} pass{'es' * (len(groups) > 1)} over the calibration text, at most "
        f"{format_bytes(budget)} of second moments at a time."
    )
    for number, sites in enumerate(groups, start=1):
        label = f"Collecting statistics ({number}/{len(groups)})" if len(groups) > 1 else "Collecting statistics"
        yield collect_statistics(model, architecture, Progress(label, batches), sites=sites, change=change)


def site_groups(architecture: Architecture, budget: int) -> list[list[str]]:
    """Split the sites and output norms of a model, in its order, into groups whose second moments fit a budget.

    Args:
        architecture: of the model.
        budget: bytes; of a group `FACTORIZING` times the largest of its second moments are set aside.

    Returns:
        the names of each group; a single site that does not fit is a group of its own.
    """
    sizes = {site.name: axis_length(site.axis, architecture.sizes) for site in architecture.measured_sites}
    groups: list[list[str]] = []
    used = largest = 0
    for name, size in sizes.items():
        moments = 4 * size**2
        used, largest = used + moments, max(largest, moments)
        if not groups or used + FACTORIZING * largest > budget:
            groups.append([])
            used = largest = moments
        groups[-1].append(name)
    # Next to nothing: they come along where their layer is.
    for norm in architecture.cut_output_norms:
        layer = architecture.split_name(norm.name)[0]
        next(group for group in groups if any(architecture.split_name(name)[0] == layer for name in group)).append(
            norm.name
        )
    return groups


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    architecture: Architecture,
    batches: Iterable[Mapping[str, torch.Tensor]],
    sites: Collection[str] | None = None,
    seconds: Mapping[str, str] | None = None,
    change: Change | None = None,
) -> Statistics:
    """Run calibration batches through a model and average the moments at its sites.

    What begins a text counts like any other token: of Gemma 3 270M, cut to four fifths, KL to the source is 1.54 nats
    with `<bos>` in the moments and 2.61 without (docs/results/quality.md).

    Args:
        model: the causal LM described by `architecture`; put into eval mode for the run, which goes no further than
            the last of these sites.
        batches: model inputs (`input_ids` (B, T), and `attention_mask` where there is padding); `labels` are ignored.
        sites: names of sites and output norms; None for all, with what a router sends to its experts.
        seconds: {site: key of `Statistics.seconds` that its second moments are added to}; None for each its own.
        change: coordinates that the moments are wanted in; None for the model's own.

    Raises:
        ValueError: the batches hold no token.
    """
    over_outputs = {norm.name for norm in architecture.cut_output_norms}
    places: list[Site | OutputNorm] = [*architecture.measured_sites, *architecture.cut_output_norms]
    if sites is not None:
        places = [place for place in places if place.name in sites]
    if seconds is None:
        seconds = {place.name: place.name for place in places if place.name not in over_outputs}
    sums, device = _Sums(over_outputs, seconds, change), next(model.parameters()).device
    with (
        own_forward(model),
        in_eval_mode(model),
        portable_attention(model),
        watched(model, architecture, places, sums.add, stop=not is_spread(model)),
        routing(model, architecture, sums.add_routed) if sites is None else nullcontext(),
    ):
        for batch in batches:
            sums.begin(batch)
            inputs = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            inputs.pop("labels", None)
            with suppress(LastSite):
                model(**inputs, use_cache=False, logits_to_keep=1)
    return sums.average()


class _Sums:
    """The sums over all tokens that moments are the means of.

    Args:
        over_outputs: names of norms over an output, of which squares are enough.
        seconds, change: as `collect_statistics` takes them.
    """

    def __init__(self, over_outputs: Collection[str], seconds: Mapping[str, str], change: Change | None) -> None:
        self._over_outputs, self._key_of, self._change = over_outputs, seconds, change
        self._means, self._squares, self._seconds = (dict[str, torch.Tensor]() for _ in range(3))
        self._neurons, self._mass = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        self._tokens = 0
        self._unpadded: torch.Tensor | None = None

    def begin(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Count the tokens of a batch, and find them among its padding."""
        padding = batch.get("attention_mask")
        self._tokens += batch["input_ids"].numel() if padding is None else int(padding.sum())
        self._unpadded = None if padding is None else padding.flatten().nonzero()[:, 0]

    def add(self, name: str, stream: torch.Tensor) -> None:
        """Add the stream at a place, (B T, D), of the batch that was begun."""
        rows = stream if self._unpadded is None else stream.index_select(0, self._unpadded.to(stream.device))
        rows = rows.float() if self._change is None else self._change(name, rows.float())
        if name not in self._over_outputs:
            _add(self._means, name, rows.sum(0))
        _add(self._squares, name, rows.square().sum(0))
        if (key := self._key_of.get(name)) in self._seconds:
            self._seconds[key].addmm_(rows.T, rows)
        elif key is not None:
            self._seconds[key] = rows.T @ rows

    def add_routed(self, name: str, module: Any, inputs: Routed) -> None:
        """Add what a router sends to the experts of a layer."""
        if self._unpadded is not None:
            stream, chosen, shares = (each.index_select(0, self._unpadded.to(each.device)) for each in inputs)
            inputs = stream, chosen, shares
        stream, chosen, shares = inputs
        _add(self._mass, name, shares.new_zeros(module.num_experts).index_add(0, chosen.flatten(), shares.flatten()))
        for expert, _, rows in routed_rows(module, inputs):
            if name not in self._neurons:
                self._neurons[name] = rows.new_zeros(module.num_experts, rows.shape[-1], dtype=torch.float32)
            self._neurons[name][expert] += rows.float().square().sum(0)

    def average(self) -> Statistics:
        """Divide by the number of tokens; the second moments in place."""
        if self._tokens == 0:
            raise ValueError(
                "The calibration text holds no token, so nothing can be sorted or cut. Give a dataset with text in it."
            )
        for second in self._seconds.values():
            second.div_(self._tokens)
        means, squares, neurons, mass = (
            {name: (total / self._tokens).cpu() for name, total in sums.items()}
            for sums in (self._means, self._squares, self._neurons, self._mass)
        )
        return Statistics(means, squares, self._seconds, self._tokens, neurons=neurons, mass=mass)


def _add(sums: dict[str, torch.Tensor], name: str, part: torch.Tensor) -> None:
    sums[name] = sums[name].add_(part) if name in sums else part


class LastSite(Exception):
    """Ends a forward pass after the last site that is watched."""


@contextmanager
def watched(
    model: nn.Module,
    architecture: Architecture,
    places: Iterable[Site | OutputNorm],
    visit: Callable[[str, torch.Tensor], None],
    stop: bool = False,
) -> Iterator[None]:
    """Call `visit(name, x)` in every forward pass of a model with the input of each of these sites and norms.

    x is (B T, D), a row a token: normalized before gain and bias, in float32, at a norm; the raw input elsewhere.
    With `stop` a forward pass ends, by `LastSite`, when all of them were visited.
    """
    modules = dict(model.named_modules())
    norm = (architecture.family.norm_type, architecture.eps)
    places, seen = list(places), 0
    # The embeddings come through the final norm first, in every forward pass.
    calls = itertools.count() if architecture.family.bare_norms else itertools.repeat(1)

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if name == architecture.family.final_site.name and next(calls) % 2 == 0:
                return
            # OPT's FFN sees one row of tokens, whatever the batch.
            stream = inputs[0].detach().flatten(0, -2)
            visit(name, normalize_stream(stream, *norm) if name in architecture.norms else stream)
            nonlocal seen
            seen = (seen + 1) % len(places)
            if stop and not seen:
                raise LastSite

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


def prefix_squares(second: torch.Tensor) -> torch.Tensor:
    """Compute E[(x_1 + ... + x_i)^2] for every i, (D,) float64 on the CPU, from the lower triangle of E[x x^T]."""
    return (2 * second.tril().sum(1) - second.diagonal()).cpu().double().cumsum(0)


def deviations(mean: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Compute standard deviations, (D,) float64 on the CPU, from E[x] and E[x^2], above zero where a coordinate is
    constant."""
    mean, squares = mean.cpu().double(), squares.cpu().double()
    # Single precision sums leave nothing below this of a constant coordinate's variance.
    return (squares - mean.square()).clamp(min=1e-6 * squares + 1e-12 * squares.mean()).sqrt()


def factorize(mean: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """Compute the columns of L of the coordinates `kept`, which come first: (D, P), rows in their own order.

    Args:
        mean, second: E[x], (D,), and E[x x^T], (D, D).
        kept: (P,) int64, ascending.
        ridge: added to the correlations' diagonal; more where rounding made the moments indefinite.
    """
    deviation = deviations(mean, second.diagonal()).to(second)
    columns = correlations(mean, second, deviation)[:, kept]
    triangle = cholesky(columns[kept], ridge).to(columns)
    rest = torch.ones(len(columns), dtype=torch.bool)
    rest[kept] = False
    factor = torch.empty_like(columns)
    factor[kept] = triangle
    factor[rest] = torch.linalg.solve_triangular(triangle.T, columns[rest], upper=True, left=False)
    return factor * deviation[:, None]


def correlations(mean: torch.Tensor, second: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Compute cov(x) in units of the deviations, (D, D), of the dtype and on the device of `second`."""
    mean = mean.to(second)
    return torch.addr(second, mean, mean, alpha=-1).div_(deviation[:, None]).div_(deviation)


def cholesky(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """Factorize a matrix and its ridge: L, lower triangular, with L L^T = matrix + ridge x 1.

    In the dtype and on the device of the matrix. Where rounding in float32 took more than half of the ridge from a
    pivot (each is at least the ridge where the matrix is positive), in float64, on the CPU: some devices have none.

    Args:
        matrix: (P, P) symmetric; its lower triangle is read, its diagonal is changed.
        ridge: times nine as often as the matrix needs to be positive.
    """
    for _ in range(20):
        matrix.diagonal().add_(ridge)
        triangle, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and (matrix.dtype == torch.float64 or triangle.diagonal().min().square() > ridge / 2):
            break
        if matrix.dtype != torch.float64:
            matrix.diagonal().sub_(ridge)
            return cholesky(matrix.cpu().double(), ridge)
        ridge *= 9
    return triangle


def free_bytes(device: torch.device) -> int:
    """Measure the memory that is free on a device, what torch has reserved there and does not use included; that of
    the machine for the CPU and for devices that share it or do not tell."""
    module: Any = getattr(torch, device.type, None)
    if hasattr(module, "mem_get_info"):
        unused = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)
