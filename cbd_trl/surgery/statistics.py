"""First and second moments of every stream that linear layers read, from calibration text."""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from cbd_trl.architectures import Architecture, Site
from cbd_trl.surgery.factors import factorise

RIDGE = 1e-3


class SiteStatistics(Protocol):
    """What a cut asks of a model's moments, in memory or on disk.

    Args:
        ridge: of `factor`, times each coordinate's own variance.
    """

    @property
    def ridge(self) -> float: ...

    def mean(self, site: str) -> torch.Tensor:
        """E[x], (D,)."""

    def variances(self, site: str) -> torch.Tensor:
        """E[x_i^2], (D,)."""

    def prefix_squares(self, site: str) -> torch.Tensor:
        """E[(x_1 + ... + x_i)^2] for every i, (D,)."""

    def second(self, site: str) -> torch.Tensor:
        """E[x x^T], (D, D)."""

    def factor(self, site: str, kept: torch.Tensor) -> torch.Tensor:
        """L, (D, P), with (cov(x) + ridge)[:, kept] = L L[kept]^T and L[kept] lower triangular; `kept` ascends."""


@dataclass(frozen=True)
class Statistics:
    """Moments per token at every site of a model, in memory.

    Args:
        means: {site: E[x], (D,) float32}; x is the normalised stream before gain and bias at a norm, the raw input
            elsewhere.
        seconds: {site: E[x x^T], its upper triangle row by row, (D (D + 1) / 2,) float32}.
        tokens: number of tokens averaged over, padding left out.
        ridge: of `factor`, times each coordinate's own variance.
    """

    means: Mapping[str, torch.Tensor]
    seconds: Mapping[str, torch.Tensor]
    tokens: int
    ridge: float = RIDGE

    def mean(self, site: str) -> torch.Tensor:
        """E[x], (D,) float64."""
        return self.means[site].double()

    def second(self, site: str) -> torch.Tensor:
        """E[x x^T], (D, D) float64."""
        size = len(self.means[site])
        upper = torch.zeros(size, size, dtype=torch.float64)
        rows, columns = torch.triu_indices(size, size)
        upper[rows, columns] = self.seconds[site].double()
        return upper + upper.triu(1).T

    def variances(self, site: str) -> torch.Tensor:
        """E[x_i^2], (D,) float64: the diagonal of `second`, without unpacking it."""
        size = len(self.means[site])
        rows = torch.arange(size)
        return self.seconds[site][rows * size - rows * (rows - 1) // 2].double()

    def prefix_squares(self, site: str) -> torch.Tensor:
        """E[(x_1 + ... + x_i)^2] for every i, (D,) float64."""
        second = self.second(site)
        return (2 * second.triu().sum(0) - second.diagonal()).cumsum(0)

    def factor(self, site: str, kept: torch.Tensor) -> torch.Tensor:
        """L, (D, P) float64, with (cov(x) + ridge)[:, kept] = L L[kept]^T and L[kept] lower triangular."""
        return factorise(self.mean(site), self.second(site), kept, self.ridge)

    def reindexed(self, index: Mapping[str, torch.Tensor]) -> "Statistics":
        """The statistics of a model whose stream at `site` is x[index[site]] (sites without an entry are dropped)."""
        means, seconds = {}, {}
        for site, order in index.items():
            means[site] = self.means[site][order]
            seconds[site] = _packed(self.second(site)[order][:, order])
        return Statistics(means, seconds, self.tokens, self.ridge)


def _packed(second: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.triu_indices(*second.shape)
    return second[rows, columns].float()


def normalised(stream: torch.Tensor, norm_type: str, eps: float) -> torch.Tensor:
    """RMSNorm ("rms") or LayerNorm ("layer") without gain and bias, over the last axis, in float32."""
    stream = stream.float()
    if norm_type == "layer":
        stream = stream - stream.mean(-1, keepdim=True)
    return stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + eps)


class _Sums:
    """Running sums at one site."""

    def __init__(self, site: Site, norm: tuple[str, float] | None) -> None:
        self.site, self.norm = site, norm
        self.first: torch.Tensor | None = None
        self.second: torch.Tensor | None = None

    def add(self, stream: torch.Tensor, mask: torch.Tensor) -> None:
        if self.norm is not None:
            stream = normalised(stream, *self.norm)
        rows = stream[mask].float()
        first, second = rows.sum(0, dtype=torch.float64), rows.T @ rows
        self.first = first if self.first is None else self.first + first
        self.second = second if self.second is None else self.second.add_(second)


@contextmanager
def _recording(model: nn.Module, sums: list[_Sums], mask_of: list[torch.Tensor]) -> Any:
    modules = dict(model.named_modules())

    def hook_for(site_sums: _Sums) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            site_sums.add(inputs[0].detach(), mask_of[0])

        return hook

    handles = [modules[one.site.name].register_forward_pre_hook(hook_for(one)) for one in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_statistics(
    model: nn.Module, architecture: Architecture, batches: Iterable[Mapping[str, torch.Tensor]], max_tokens: int
) -> Statistics:
    """Run calibration batches through a model and average the moments at every site.

    Args:
        model: the causal LM described by `architecture`; put into eval mode for the run.
        batches: model inputs (`input_ids` (B, T), and `attention_mask` where there is padding); `labels` are ignored.
        max_tokens: stop after the batch that reaches this many tokens.

    Raises:
        ValueError: the batches hold no token.
    """
    norm = (architecture.family.norm_type, architecture.eps)
    sums = [_Sums(site, norm if site.norm else None) for site in architecture.sites]
    device = next(model.parameters()).device
    mask_of: list[torch.Tensor] = []
    tokens, was_training = 0, model.training
    model.eval()
    try:
        with _recording(model, sums, mask_of):
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
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError(
            "The calibration text holds no token, so nothing can be sorted or cut. Give a dataset with text in it."
        )
    means = {one.site.name: (one.first / tokens).float().cpu() for one in sums if one.first is not None}
    seconds = {one.site.name: _packed((one.second / tokens).cpu()) for one in sums if one.second is not None}
    return Statistics(means, seconds, tokens)
