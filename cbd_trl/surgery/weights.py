"""Reading and writing single tensors of a state dict through an architecture's description."""

from collections.abc import Mapping

import torch
from torch import nn

from cbd_trl.architectures import Architecture, Site
from cbd_trl.architectures.axes import Axes

Weights = Mapping[str, torch.Tensor]


def working(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype that is calculated in: half precisions in float32, the others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def weights_of(model: nn.Module, architecture: Architecture) -> dict[str, torch.Tensor]:
    """The model's parameters as weights (views, not copies).

    Raises:
        ValueError: the model lacks a tensor of its family or has one that the description does not know.
    """
    state = model.state_dict()
    tied_head = {f"{architecture.family.head}.weight"} if architecture.tied else set()
    missing = sorted(set(architecture.tensors) - set(state))
    unknown = sorted(set(state) - set(architecture.tensors) - tied_head)
    if missing or unknown:
        raise ValueError(
            f"The weights are not those of a plain {architecture.config.model_type} model: missing {missing[:5]}, "
            f"unknown {unknown[:5]}. Merge adapters (`merge_and_unload`) and remove added modules first."
        )
    return {key: state[key].detach() for key in architecture.tensors}


def input_matrix(weight: torch.Tensor, axes: Axes, axis: tuple[str, ...]) -> torch.Tensor:
    """A reading layer's weight as an (outputs, inputs) matrix, whichever way it is stored."""
    return weight.movedim(axes.index(axis), -1).reshape(-1, weight.shape[axes.index(axis)])


def from_input_matrix(matrix: torch.Tensor, like: torch.Tensor, axes: Axes, axis: tuple[str, ...]) -> torch.Tensor:
    """Inverse of `input_matrix`, in the matrix's dtype; the inputs may have changed in number."""
    position = axes.index(axis)
    outputs = [length for i, length in enumerate(like.shape) if i != position]
    return matrix.reshape(*outputs, matrix.shape[-1]).movedim(-1, position).contiguous()


def readers_of(architecture: Architecture) -> dict[str, Site]:
    """{module whose weight reads a site: the site}; a tied head reads with the embedding table."""
    head = architecture.family.embedding if architecture.tied else architecture.family.head
    return {
        head if reader == architecture.family.head else reader: site
        for site in architecture.sites
        for reader in site.readers
    }


def norms_of(architecture: Architecture) -> dict[str, Site]:
    """{norm module: the site behind it}."""
    return {site.name: site for site in architecture.sites if site.norm}


def reader_keys(
    reader: str, weights: Mapping[str, torch.Tensor], architecture: Architecture
) -> tuple[str, str | None]:
    """State dict keys of a reader's weight and its bias, if any; a tied head reads with the embedding table."""
    if reader == architecture.family.head and architecture.tied:
        reader = architecture.family.embedding
    bias = f"{reader}.bias"
    return f"{reader}.weight", bias if bias in weights else None
