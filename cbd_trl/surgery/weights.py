"""Read and write single tensors of a state dict through an architecture's description.

`Weights` hold what a model computes with, under the keys of `Architecture.tensors`: every projection by itself (Phi-3
stores several in one tensor), gains themselves (Gemma stores them less 1, nanochat none), and input embeddings as they
enter the residual stream (Gemma multiplies them by the square root of the width, which a cut or growth changes). With
a tied head the final norm's gain takes the inverse of that factor. So the surgery knows one kind of projection, of
norm and of table, and `to_weights` and `to_state` alone know how a family stores them. They are any mapping: of
tensors in memory, or of tensors that are read and made on each access (`LazyWeights`).
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from cbd_trl.architectures import Architecture, Site, is_tied
from cbd_trl.architectures.axes import Axes


class LazyWeights(Mapping[str, torch.Tensor]):
    """A mapping of weights whose tensors are made on each access and kept by nobody.

    Operators are compositions of these, so that the tensors of a target come into being one after another, each from
    the few tensors of the two anchors that it needs.

    Args:
        keys: the keys, in the order in which tensors that share work follow one another.
        tensor: makes the tensor of a key.
    """

    def __init__(self, keys: Iterable[str], tensor: Callable[[str], torch.Tensor]) -> None:
        self._keys = dict.fromkeys(keys)
        self._tensor = tensor

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


Weights = Mapping[str, torch.Tensor]


def working(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to the dtype that is calculated in: half precisions to float32, the others stay as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def weights_of(model: nn.Module, architecture: Architecture) -> Weights:
    """View the model's parameters as weights on the CPU, where surgery computes: some devices have no float64.

    Views where they are stored there, as they are used; else each is copied when it is read, and kept by nobody.

    Raises:
        ValueError: the model lacks a tensor of its family or has one that the description does not know, or a
            constant of its activation is another than the family's.
    """
    state = model.state_dict()
    tied_head = {f"{architecture.family.head}.weight"} if architecture.tied and is_tied(model) else set()
    wanted = set(architecture.state_shapes)
    missing, unknown = sorted(wanted - state.keys()), sorted(state.keys() - wanted - tied_head)
    if missing or unknown:
        raise ValueError(
            f"The weights are not those of a plain {architecture.config.model_type} model: missing {missing[:5]}, "
            f"unknown {unknown[:5]}. Merge adapters (`merge_and_unload`) and remove added modules first."
        )
    for name, value in architecture.constants.items():
        # In half precision a constant is rounded.
        if not state[name].is_meta and not math.isclose(state[name], value, rel_tol=0.01, abs_tol=1e-7):
            raise ValueError(
                f"{name} is {float(state[name])}, and transformers makes every {architecture.config.model_type} with "
                f"{value}: what is made of this model would compute something else. Supported: {value}."
            )
    return to_weights(LazyWeights(state, lambda name: state[name].cpu()), architecture)


def to_weights(state: Weights, architecture: Architecture) -> Weights:
    """View a model's state dict as weights, each made on access; what the architecture does not know is left out."""

    # Once, because it reads a table.
    @functools.cache
    def no_gain() -> torch.Tensor:
        return state[f"{architecture.family.embedding}.weight"].new_ones(architecture.sizes["width"])

    def tensor(key: str) -> torch.Tensor:
        if key not in architecture.stored:
            return no_gain()
        name, place = architecture.stored[key]
        return as_used(key, state[name][place] if place else state[name], architecture)

    return LazyWeights(architecture.tensors, tensor)


def to_state(weights: Weights, architecture: Architecture) -> Weights:
    """Invert `to_weights`: the model's state dict, each tensor made on access, without a tied head."""
    parts: dict[str, list[str]] = {}
    for key, (name, _) in architecture.stored.items():
        parts.setdefault(name, []).append(key)

    readers = readers_of(architecture) if architecture.family.bare_norms else {}

    def with_gain(key: str) -> torch.Tensor:
        """A tensor with the gain in it that the norm before it cannot have."""
        module, own = key.removesuffix(".weight"), weights[key]
        if module not in readers or not readers[module].norm:
            return own
        site, axes = readers[module], architecture.tensors[key]
        gain = weights[f"{site.name}.weight"]
        # Asking a device would wait for it.
        if gain.device.type == "cpu" and (gain == 1).all():
            return own
        own = working(own)
        return from_input_matrix(input_matrix(own, axes, site.axis) * gain.to(own), own, axes, site.axis)

    def tensor(name: str) -> torch.Tensor:
        if name in architecture.constants:
            return torch.tensor(architecture.constants[name])
        tensors = [as_stored(key, with_gain(key), architecture) for key in parts[name]]
        fused = architecture.fused(name)
        return tensors[0] if fused is None else fused.joined(tensors)

    return LazyWeights([*parts, *architecture.constants], tensor)


def as_used(key: str, tensor: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Convert a stored tensor, or a slice of it, to what the model computes with.

    Returns:
        A view of it where nothing is to be done; else a gain in float64 (on the CPU: some devices have none), a table
        in float32 or better.
    """
    offset, scale = _convention(key, architecture)
    if (offset, scale) == (0.0, 1.0):
        return tensor
    # 1 + w in the stored precision would lose most of a small w.
    precise = tensor.double() if tensor.dim() == 1 and tensor.device.type == "cpu" else working(tensor)
    return (precise + offset) * scale


def as_stored(key: str, tensor: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Invert `as_used`."""
    offset, scale = _convention(key, architecture)
    return tensor if (offset, scale) == (0.0, 1.0) else tensor / scale - offset


def _convention(key: str, architecture: Architecture) -> tuple[float, float]:
    """Return (offset, scale): the model computes with scale x (offset + what is stored)."""
    family, module = architecture.family, key.rsplit(".", 1)[0]
    if module == family.embedding:
        return 0.0, architecture.embedding_scale
    if not key.endswith(".weight") or module not in architecture.norms:
        return 0.0, 1.0
    tied_final = architecture.tied and module == family.final_site.name
    return family.gain_offset, 1.0 / architecture.embedding_scale if tied_final else 1.0


def input_matrix(weight: torch.Tensor, axes: Axes, axis: tuple[str, ...]) -> torch.Tensor:
    """View a reading layer's weight as an (outputs, inputs) matrix, whichever way it is stored."""
    return weight.movedim(axes.index(axis), -1).reshape(-1, weight.shape[axes.index(axis)])


def from_input_matrix(matrix: torch.Tensor, like: torch.Tensor, axes: Axes, axis: tuple[str, ...]) -> torch.Tensor:
    """Invert `input_matrix`, in the matrix's dtype; the inputs may have changed in number."""
    position = axes.index(axis)
    outputs = [length for i, length in enumerate(like.shape) if i != position]
    return matrix.reshape(*outputs, matrix.shape[-1]).movedim(-1, position).contiguous()


def readers_of(architecture: Architecture) -> dict[str, Site]:
    """Map {module whose weight reads a measured site: the site}; a tied head reads with the embedding table."""
    return {_module_of(reader, architecture): site for site in architecture.measured_sites for reader in site.readers}


def site_norms(architecture: Architecture) -> dict[str, Site]:
    """Map {norm module that layers read through: its site}."""
    return {site.name: site for site in architecture.sites if site.norm}


def reader_keys(reader: str, weights: Collection[str], architecture: Architecture) -> tuple[str, str | None]:
    """Return the keys of a reader's weight and of its bias, if it has one among these."""
    bias = f"{reader}.bias"
    return f"{_module_of(reader, architecture)}.weight", bias if bias in weights else None


def _module_of(reader: str, architecture: Architecture) -> str:
    """Name the module whose weight a reader multiplies with: a tied head's is the embedding table."""
    tied_head = reader == architecture.family.head and architecture.tied
    return architecture.family.embedding if tied_head else reader
