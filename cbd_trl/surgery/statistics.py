"""First and second moments of every stream that linear layers read, from calibration text."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cbd_trl.architectures import Architecture, Site

FORMAT_VERSION = "1"


@dataclass(frozen=True)
class Statistics:
    """Moments per token at every site of a model.

    Args:
        means: {site: E[x], (D,) float32}; x is the normalised stream before gain and bias at a norm, the raw input
            elsewhere.
        seconds: {site: E[x x^T], its upper triangle row by row, (D (D + 1) / 2,) float32}.
        tokens: number of tokens averaged over, padding left out.
    """

    means: Mapping[str, torch.Tensor]
    seconds: Mapping[str, torch.Tensor]
    tokens: int

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

    def reindexed(self, index: Mapping[str, torch.Tensor]) -> "Statistics":
        """The statistics of a model whose stream at `site` is x[index[site]] (sites without an entry are dropped)."""
        means, seconds = {}, {}
        for site, order in index.items():
            means[site] = self.means[site][order]
            seconds[site] = _packed(self.second(site)[order][:, order])
        return Statistics(means, seconds, self.tokens)

    def with_layers(self, architecture: Architecture, layers: Sequence[int]) -> "Statistics":
        """The statistics of these layers, renumbered; those outside the layers as they are."""
        sources = {}
        for site in self.means:
            layer, name = architecture.split_name(site)
            if layer is None:
                sources[site] = site
            elif layer == 0:
                sources |= {
                    architecture.layer_name(new, name): architecture.layer_name(old, name)
                    for new, old in enumerate(layers)
                }
        means = {site: self.means[source] for site, source in sources.items()}
        return Statistics(means, {site: self.seconds[source] for site, source in sources.items()}, self.tokens)

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        tensors = {f"{site}.mean": mean.contiguous() for site, mean in self.means.items()}
        tensors |= {f"{site}.second": second.contiguous() for site, second in self.seconds.items()}
        save_file(tensors, path, metadata={"cbd_trl_statistics": FORMAT_VERSION, "tokens": json.dumps(self.tokens)})

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read a file written by `save`.

        Raises:
            ValueError: the file holds no statistics of this version.
        """
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("cbd_trl_statistics") != FORMAT_VERSION:
                raise ValueError(
                    f"{path} holds no calibration statistics of version {FORMAT_VERSION} (found "
                    f"{metadata.get('cbd_trl_statistics')!r}). Build the chain again with this version of cbd_trl."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        means = {key[: -len(".mean")]: tensor for key, tensor in tensors.items() if key.endswith(".mean")}
        seconds = {key[: -len(".second")]: tensor for key, tensor in tensors.items() if key.endswith(".second")}
        return cls(means, seconds, json.loads(metadata["tokens"]))


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

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None
        self.second: torch.Tensor | None = None

    def add(self, stream: torch.Tensor, mask: torch.Tensor) -> None:
        # OPT's FFN sees one row of tokens, whatever the batch.
        rows = stream.flatten(0, -2)[mask.flatten()].float()
        first, second = rows.sum(0, dtype=torch.float64), rows.T @ rows
        self.first = first if self.first is None else self.first + first
        self.second = second if self.second is None else self.second.add_(second)


@contextmanager
def watched(
    model: nn.Module, architecture: Architecture, sites: Iterable[Site], visit: Callable[[Site, torch.Tensor], None]
) -> Iterator[None]:
    """Inside, every forward pass of a model calls `visit(site, x)` with what is read at each of these sites.

    x is (B, T, D): normalised before gain and bias, in float32, at a norm; the raw input elsewhere.
    """
    modules = dict(model.named_modules())
    norm = (architecture.family.norm_type, architecture.eps)

    def hook_for(site: Site) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            stream = inputs[0].detach()
            visit(site, normalised(stream, *norm) if site.norm else stream)

        return hook

    handles = [modules[site.name].register_forward_pre_hook(hook_for(site)) for site in sites]
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
    sums = {site.name: _Sums() for site in architecture.sites}
    device = next(model.parameters()).device
    mask_of: list[torch.Tensor] = []
    tokens, was_training = 0, model.training
    model.eval()
    try:
        with watched(model, architecture, architecture.sites, lambda site, x: sums[site.name].add(x, mask_of[0])):
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
    means = {name: (one.first / tokens).float().cpu() for name, one in sums.items() if one.first is not None}
    seconds = {name: _packed((one.second / tokens).cpu()) for name, one in sums.items() if one.second is not None}
    return Statistics(means, seconds, tokens)
