"""How the streams of two models move together on the same text."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from cbd_trl.architectures import Architecture, Site
from cbd_trl.surgery.statistics import watched


def paired_sites(upper: Architecture, lower: Architecture, kept: Sequence[int]) -> list[tuple[Site, Site]]:
    """The sites of two models of one family that stand for each other, (upper, lower).

    Args:
        upper, lower: what the models' tensors mean.
        kept: for each lower layer the upper layer beside it.
    """
    above = {site.name: site for site in upper.sites}
    pairs = []
    for site in lower.sites:
        layer, name = lower.split_name(site.name)
        pairs.append((above[site.name if layer is None else upper.layer_name(kept[layer], name)], site))
    return pairs


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
        upper_architecture, lower_architecture: what their tensors mean.
        kept: for each lower layer the upper layer beside it.
        batches: `input_ids` (B, T) without padding.

    Returns:
        {lower site: E[x y^T], (D, d)}, x and y the upper and the lower model's stream there: normalised before gain
        and bias at a norm, the raw input elsewhere.

    Raises:
        ValueError: there are no batches.
    """
    pairs = paired_sites(upper_architecture, lower_architecture, kept)
    partner = {below.name: above.name for above, below in pairs}
    seen: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def keep(site: Site, stream: torch.Tensor) -> None:
        seen[site.name] = stream.flatten(0, -2).float()

    def multiply(site: Site, stream: torch.Tensor) -> None:
        rows = stream.flatten(0, -2).float()
        product = seen[partner[site.name]].to(rows.device).T @ rows
        sums[site.name] = sums[site.name].add_(product) if site.name in sums else product

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
