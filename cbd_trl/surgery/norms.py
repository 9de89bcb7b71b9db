"""Move the gains (and biases) of norms into the layers that read them, or share them with these. Exact."""

import functools

import torch

from cbd_trl.architectures import Architecture, Site
from cbd_trl.surgery.weights import (
    LazyWeights,
    Weights,
    from_input_matrix,
    input_matrix,
    readers_of,
    site_norms,
    working,
)

# Rows that are squared at a time, so that no second matrix of a reader's size is made.
_ROWS = 1024


def folds(site: Site, architecture: Architecture) -> bool:
    """Check whether a site's norm can be folded: no final one with a tied head, none whose bias has nowhere to go."""
    if not site.norm or (site is architecture.sites[-1] and architecture.tied):
        return False
    biased = f"{site.name}.bias" in architecture.tensors
    return not biased or all(f"{reader}.bias" in architecture.tensors for reader in site.readers)


def fold_norms(weights: Weights, architecture: Architecture, every: bool = False) -> Weights:
    """Multiply each norm's gain into its readers' weights, its bias into their biases: gains 1 and biases 0 remain.

    A final norm keeps its gain where the head is tied to the embedding table, and every norm keeps gain and bias where
    it has a bias and a reader has none to take it.

    Args:
        weights: of a model.
        architecture: of them.
        every: all gains become 1: a bias that no reader takes is divided by its gain. Not with a tied head.
    """
    sites = site_norms(architecture)
    whole = {name for name, site in sites.items() if folds(site, architecture)}
    norms = set(sites) if every else whole
    readers = {module: site for module, site in readers_of(architecture).items() if site.name in norms}

    def tensor(key: str) -> torch.Tensor:
        module, kind = key.rsplit(".", 1)
        if module in norms:
            if kind == "weight":
                return torch.ones_like(weights[key])
            return torch.zeros_like(weights[key]) if module in whole else weights[key] / weights[f"{module}.weight"]
        if module not in readers:
            return weights[key]
        site, own = readers[module], weights[key]
        if kind == "weight":
            axes = architecture.tensors[key]
            # The product alone is in the working dtype: what is differentiated keeps no copy of the weight.
            gain = weights[f"{site.name}.weight"].to(working(own[:0]))
            return from_input_matrix(input_matrix(own, axes, site.axis) * gain, own, axes, site.axis)
        if site.name not in whole or f"{site.name}.bias" not in weights:
            return working(own)
        weight = f"{module}.weight"
        matrix = input_matrix(weights[weight], architecture.tensors[weight], site.axis)
        own, matrix = working(own), working(matrix)
        return own + matrix @ weights[f"{site.name}.bias"].to(matrix)

    return LazyWeights(weights, tensor)


def balance_norms(weights: Weights, architecture: Architecture, like: Weights | None = None) -> Weights:
    """Share what each norm's gain and its readers' columns multiply an input by, so that all columns are of one size:
    with c_j the root mean square of column j over the readers, gain_j becomes gain_j c_j m / median(|gain| c), m the
    median of |gain|.

    A least-squares cut makes columns hundreds of times the size of others where the gain is small, and folded norms
    leave the differences of size to the columns: the gradient of a few gains is then all that a step with a clipped
    gradient follows. SmolLM2-135M cut to 384 channels has a gradient norm of hundreds so, balanced mostly of 2 to 15.
    The last norm, which the head reads through, stays as it is.

    Args:
        weights: of a model.
        like: m is the median of these weights' |gain|, which have the same layers, of any width; None: of its own.
    """
    norms = {name: site for name, site in site_norms(architecture).items() if site is not architecture.sites[-1]}
    readers = {module: site for module, site in readers_of(architecture).items() if site.name in norms}
    like = weights if like is None else like

    # Asked for twice, by the norm and by itself: as many as a layer has.
    @functools.lru_cache(maxsize=sum(len(site.readers) for site in architecture.family.sites))
    def made(module: str) -> torch.Tensor:
        return working(weights[f"{module}.weight"])

    def matrix(module: str) -> torch.Tensor:
        return input_matrix(made(module), architecture.tensors[f"{module}.weight"], readers[module].axis)

    @functools.lru_cache(maxsize=len(architecture.family.sites))
    def share(name: str) -> torch.Tensor:
        """What the gain is multiplied by, (D,)."""
        own = [rows for module, site in readers.items() if site.name == name for rows in matrix(module).split(_ROWS)]
        # Sums down the columns as products, which take half the time of `sum`.
        squares = torch.stack([rows.new_ones(len(rows)) @ rows.square() for rows in own]).sum(0)
        columns = (squares / sum(len(rows) for rows in own)).sqrt()
        gain, usual = (working(of[f"{name}.weight"]).abs() for of in (weights, like))
        sizes = columns * gain
        share = columns * (usual.median() / sizes.median())
        # What nothing reads has no size to be given.
        return torch.where(share.isfinite() & (share > 0), share, 1.0)

    def tensor(key: str) -> torch.Tensor:
        module, kind = key.rsplit(".", 1)
        if module in norms:
            return working(weights[key]) * share(module)
        if module not in readers or kind == "bias":
            return weights[key]
        balanced = matrix(module) / share(readers[module].name)
        return from_input_matrix(balanced, made(module), architecture.tensors[key], readers[module].axis)

    return LazyWeights(weights, tensor)
