"""Putting a model's norms into one gauge: gains (and biases) moved into the layers that read them. Exact."""

import torch

from cbd_trl.architectures import Architecture, Site
from cbd_trl.surgery.weights import Weights, from_input_matrix, input_matrix, reader_keys


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
    folded = dict(weights)
    for site in architecture.sites:
        if not folds(site, architecture):
            continue
        gain = weights[f"{site.name}.weight"]
        shift = weights.get(f"{site.name}.bias")
        for reader in site.readers:
            key, bias = reader_keys(reader, weights, architecture)
            axes = architecture.tensors[key]
            matrix = input_matrix(weights[key], axes, site.axis).double()
            folded[key] = from_input_matrix(matrix * gain.double(), weights[key], axes, site.axis)
            if shift is not None and bias is not None:
                folded[bias] = (weights[bias].double() + matrix @ shift.double()).to(weights[bias].dtype)
        folded[f"{site.name}.weight"] = torch.ones_like(gain)
        if shift is not None:
            folded[f"{site.name}.bias"] = torch.zeros_like(shift)
    return folded
