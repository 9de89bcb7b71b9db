"""Reading and writing single tensors of a state dict through an architecture's description.

`Weights` hold what a model computes with: gains themselves (Gemma stores them less 1), and input embeddings as they
enter the residual stream (Gemma multiplies them by the square root of the width, which a cut or growth changes). With
a tied head the final norm's gain takes the inverse of that factor. So the surgery knows one kind of norm and one kind
of table, and `plain_tensor` and `stored_tensor` alone know how a family stores them.
"""

from collections.abc import Mapping

import torch
from torch import nn

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Axes

Weights = dict[str, torch.Tensor]


def weights_of(model: nn.Module, architecture: Architecture) -> Weights:
    """The model's parameters as weights (views, not copies, where they are stored as they are used).

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
    return plain({key: state[key].detach() for key in architecture.tensors}, architecture)


def plain(state: Mapping[str, torch.Tensor], architecture: Architecture) -> Weights:
    """From what is stored to what the model computes with."""
    return {key: plain_tensor(key, tensor, architecture) for key, tensor in state.items()}


def stored(weights: Mapping[str, torch.Tensor], architecture: Architecture) -> Weights:
    """Inverse of `plain`."""
    return {key: stored_tensor(key, tensor, architecture) for key, tensor in weights.items()}


def plain_tensor(key: str, tensor: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """One stored tensor, or a slice of it, as the model computes with it.

    Returns:
        The tensor itself where nothing is to be done; else a gain in float64, a table in float32 or better.
    """
    offset, scale = _convention(key, architecture)
    if (offset, scale) == (0.0, 1.0):
        return tensor
    # 1 + w in the stored precision would lose most of a small w.
    precise = tensor.double() if tensor.dim() == 1 else tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return (precise + offset) * scale if offset else precise * scale


def stored_tensor(key: str, tensor: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Inverse of `plain_tensor`."""
    offset, scale = _convention(key, architecture)
    if (offset, scale) == (0.0, 1.0):
        return tensor
    return tensor / scale - offset if offset else tensor / scale


def _convention(key: str, architecture: Architecture) -> tuple[float, float]:
    """(offset, scale): the model computes with scale x (offset + what is stored)."""
    family, module = architecture.family, key.rsplit(".", 1)[0]
    if module == family.embedding:
        return 0.0, architecture.embedding_scale
    if not key.endswith(".weight") or module not in architecture.norms:
        return 0.0, 1.0
    tied_final = architecture.tied and module == family.final_site.name
    return family.gain_offset, 1.0 / architecture.embedding_scale if tied_final else 1.0


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
