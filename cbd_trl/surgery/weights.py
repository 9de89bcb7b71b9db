"""Reading and writing single tensors of a state dict through an architecture's description."""

from collections.abc import Mapping

import torch
from torch import nn

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Axes

Weights = dict[str, torch.Tensor]


def weights_of(model: nn.Module, architecture: Architecture) -> Weights:
    """The model's parameters as weights (views, not copies).

    Raises:
        ValueError: the model lacks a tensor of its family or has one that the description does not know.
    """
    state = model.state_dict()
    tied_head = {f"{architecture.family.head}.weight"} if architecture.tied else set()
    wanted = {name for name, _ in architecture.stored.values()}
    missing, unknown = sorted(wanted - set(state)), sorted(set(state) - wanted - tied_head)
    if missing or unknown:
        raise ValueError(
            f"The weights are not those of a plain {architecture.config.model_type} model: missing {missing[:5]}, "
            f"unknown {unknown[:5]}. Merge adapters (`merge_and_unload`) and remove added modules first."
        )
    return split_fused(state, architecture)


def split_fused(state: Mapping[str, torch.Tensor], architecture: Architecture) -> Weights:
    """A model's state dict as weights (views); what the architecture does not know is left out."""
    return {key: state[name][rows].detach() for key, (name, rows) in architecture.stored.items()}


def join_fused(weights: Weights, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Inverse of `split_fused`: weights as the model's state dict."""
    parts: dict[str, list[torch.Tensor]] = {}
    for key, (name, _) in architecture.stored.items():
        parts.setdefault(name, []).append(weights[key])
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}


def input_matrix(weight: torch.Tensor, axes: Axes, axis: tuple[str, ...]) -> torch.Tensor:
    """A reading layer's weight as an (outputs, inputs) matrix, whichever way it is stored."""
    return weight.movedim(axes.index(axis), -1).reshape(-1, weight.shape[axes.index(axis)])


def from_input_matrix(matrix: torch.Tensor, like: torch.Tensor, axes: Axes, axis: tuple[str, ...]) -> torch.Tensor:
    """Inverse of `input_matrix`; the inputs may have changed in number."""
    position = axes.index(axis)
    outputs = [length for i, length in enumerate(like.shape) if i != position]
    return matrix.reshape(*outputs, matrix.shape[-1]).movedim(-1, position).to(like.dtype).contiguous()


def reader_keys(
    reader: str, weights: Mapping[str, torch.Tensor], architecture: Architecture
) -> tuple[str, str | None]:
    """State dict keys of a reader's weight and its bias, if any; a tied head reads with the embedding table."""
    if reader == architecture.family.head and architecture.tied:
        reader = architecture.family.embedding
    bias = f"{reader}.bias"
    return f"{reader}.weight", bias if bias in weights else None
