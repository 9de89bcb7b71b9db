"""Putting a model's norms into one gauge: gains (and biases) moved into the layers that read them. Exact."""

import torch

from cbd_trl.architectures import Architecture, Site
from cbd_trl.surgery.lazy import LazyWeights
from cbd_trl.surgery.weights import Weights, from_input_matrix, input_matrix, readers_of, site_norms, working


def folds(site: Site, architecture: Architecture) -> bool:
    """Whether a site's norm can be folded: not a final one with a tied head, nor one whose bias has nowhere to go."""
    if not site.norm or (site is architecture.sites[-1] and architecture.tied):
        return False
    biased = f"{site.name}.bias" in architecture.tensors
    return not biased or all(f"{reader}.bias" in architecture.tensors for reader in site.readers)


def fold_norms(weights: Weights, architecture: Architecture) -> Weights:
    """Multiply each norm's gain into its readers' weights, its bias into their biases: gains 1 and biases 0 remain.

    A final norm keeps its gain where the head is tied to the embedding table, and every norm keeps gain and bias where
    it has a bias and a reader has none to take it.
    """
    norms = {name for name, site in site_norms(architecture).items() if folds(site, architecture)}
    readers = {module: site for module, site in readers_of(architecture).items() if site.name in norms}

    def tensor(key: str) -> torch.Tensor:
        module, kind = key.rsplit(".", 1)
        if module in norms:
            return torch.ones_like(weights[key]) if kind == "weight" else torch.zeros_like(weights[key])
        if module not in readers:
            return weights[key]
        site, own = readers[module], working(weights[key])
        if kind == "weight":
            axes = architecture.tensors[key]
            gain = weights[f"{site.name}.weight"].to(own)
            return from_input_matrix(input_matrix(own, axes, site.axis) * gain, own, axes, site.axis)
        if f"{site.name}.bias" not in weights:
            return own
        weight = f"{module}.weight"
        matrix = input_matrix(weights[weight], architecture.tensors[weight], site.axis)
        return (own.double() + matrix.double() @ weights[f"{site.name}.bias"].double()).to(own.dtype)

    return LazyWeights(weights, tensor)
