"""Models for proving surgery by function: every family, tied and untied, grouped heads, every bias, large epsilons."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_trl.architectures import Architecture, Site, describe
from cbd_trl.architectures.axes import from_dims, select, to_dims
from cbd_trl.architectures.registry import family_of
from cbd_trl.surgery.reorder import Order
from cbd_trl.surgery.statistics import Change, Statistics, collect_statistics
from cbd_trl.surgery.weights import Weights, to_state, weights_of
from tests.tiny import FAMILIES, ROWS, by_head, tiny_model

# Style rule 7: the largest difference of logits, in units of their standard deviation.
TOLERANCE = 1e-5

every_case = pytest.mark.parametrize(("family", "tied"), by_head())
every_family = pytest.mark.parametrize("family", FAMILIES)


def full_model(family: str, tied: bool, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Make a randomized model with every bias its family can have, in float64.

    float64 keeps rounding far below the tolerance; an epsilon of 0.01 makes a forgotten one visible.
    """
    eps = family_of(family).eps_field
    options = ROWS[family].biases | ({} if eps is None else {eps: 0.01})
    return tiny_model(family, seed=seed, tie_word_embeddings=tied, **{**options, **overrides}).double()


def described(model: PreTrainedModel) -> tuple[Weights, Architecture]:
    architecture = describe(model.config)
    return dict(weights_of(model, architecture)), architecture


def keeps_bias(site: Site, architecture: Architecture) -> bool:
    """Whether a norm has a bias, and a reader none to take it up."""
    taken = all(f"{reader}.bias" in architecture.tensors for reader in site.readers)
    return f"{site.name}.bias" in architecture.tensors and not taken


def build(weights: Weights, architecture: Architecture) -> PreTrainedModel:
    """The stock model with these weights; every tensor must fit."""
    # Gains and tables may be more precise than the rest.
    layer = architecture.layer_name(0, "")
    dtype = next(tensor.dtype for key, tensor in weights.items() if key.startswith(layer) and tensor.dim() == 2)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(architecture.config), dtype=dtype)
    left = model.load_state_dict(to_state(weights, architecture), strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= ({"lm_head.weight"} if architecture.tied else set())
    model.tie_weights()
    return model.eval()


def not_stored(architecture: Architecture) -> set[str]:
    """Gains that a family's norms do not have (nanochat): they are 1."""
    return set(architecture.tensors) - set(architecture.stored)


def reading_module(model: PreTrainedModel, architecture: Architecture, reader: str) -> tuple[Any, slice]:
    """The module that a reader is in the model, and which of its outputs are the reader's."""
    key = f"{reader}.weight"
    name, place = architecture.stored.get(key, (key, ()))
    rows = place[0] if place else slice(None)
    return model.get_submodule(name.removesuffix(".weight")), rows


def tokens(rows: int = 4, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(tokens()).logits


def difference(model: PreTrainedModel, reference: PreTrainedModel) -> float:
    """max |logits - reference's| / std(reference's)."""
    expected = logits(reference)
    return float((logits(model) - expected).abs().max() / expected.std())


def stored_tolerance(architecture: Architecture) -> float:
    """How exactly weights that were read give the model back: Gemma's go through 1 + w and a scale."""
    return 0.0 if architecture.embedding_scale == 1.0 else TOLERANCE


def moments(
    model: PreTrainedModel,
    architecture: Architecture,
    rows: int = 16,
    ridge: float | None = None,
    change: Change | None = None,
) -> Statistics:
    found = collect_statistics(model, architecture, [{"input_ids": tokens(rows, seed=1)}], change=change)
    return found if ridge is None else dataclasses.replace(found, ridge=ridge)


def stream_second(architecture: Architecture, statistics: Statistics) -> torch.Tensor:
    """E[x x^T] summed over all that reads the residual stream."""
    return torch.stack([statistics.second(site.name) for site in architecture.sites if site.axis == ("width",)]).sum(0)


def changed(weights: Weights, other: Weights) -> set[str]:
    """Names of the tensors in which two sets of weights differ."""
    assert set(weights) == set(other)
    return {key for key in weights if not torch.equal(weights[key], other[key])}


def scaled(weights: Weights, architecture: Architecture, key: str, dim: str, index: int, factor: float) -> Weights:
    """The weights with one entry along an atomic dimension of one tensor multiplied."""
    axes = architecture.tensors[key]
    array = to_dims(weights[key], axes, architecture.sizes).clone()
    array.select([d for axis in axes for d in axis].index(dim), index).mul_(factor)
    return {**weights, key: from_dims(array, axes)}


def doubled(weights: Weights, architecture: Architecture) -> tuple[Weights, Architecture]:
    """The model with every channel, neuron (but those of experts) and key/value group twice: what reads two copies
    gives half to each."""
    own = () if "expert" in architecture.sizes else ("ffn",)
    wide = tuple(dim for dim in ("width", *own, "group", "conv") if dim in architecture.sizes)
    index = {dim: torch.arange(2 * architecture.sizes[dim]) % architecture.sizes[dim] for dim in wide}
    read = [site for site in architecture.sites if set(wide) & set(site.axis)]
    readers = {f"{reader}.weight" for site in read for reader in site.readers}
    copies = {
        key: select(weights[key], axes, architecture.sizes, index) / (2 if key in readers else 1)
        for key, axes in architecture.tensors.items()
    }
    return copies, architecture.resized(**{dim: 2 * architecture.sizes[dim] for dim in wide})


def random_order(architecture: Architecture, seed: int = 0) -> Order:
    """New coordinates for everything that can have some; signs where the norms allow them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = architecture.sizes

    def orders(size: int, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, size, generator=generator).argsort(-1)

    layers, groups = architecture.depth, sizes["group"]
    experts = [sizes["expert"]] if "expert" in sizes else []
    signs = 2.0 * torch.randint(0, 2, (sizes["width"],), generator=generator) - 1
    return Order(
        orders(sizes["width"]),
        orders(sizes["ffn"], layers, *experts),
        orders(groups, layers),
        orders(sizes["query"], layers, groups),
        signs if architecture.family.norm_type == "rms" else None,
        orders(*experts, layers) if experts else None,
        orders(sizes["conv"], layers) if "conv" in sizes else None,
    )
