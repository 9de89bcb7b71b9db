"""The memory of a shape: its weights as a storage format keeps them, and its cache of a context.

GGUF types follow llama.cpp's rules for each tensor (src/llama-quant.cpp: `tensor_allows_quantization`,
`llama_tensor_get_type_impl`, `tensor_type_fallback`), without an importance matrix. Left out: what it does to
attention where there are exactly 8 experts, headers, the tokenizer, and buffers that an engine computes in.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Axes, Sizes, axis_length, dims_of
from cbd_trl.surgery.weights import reader_keys

# Weights that share a scale, and the bytes of such a block (ggml/src/ggml-common.h).
BLOCKS = {
    "float32": (1, 4),
    "bf16": (1, 2),
    "f16": (1, 2),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
# What llama.cpp takes for rows that are not whole blocks; f16 for all others, and where these do not fit either.
_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
# Modules that llama.cpp calls attn_v or attn_qkv.
_VALUES = ("v_proj", "qkv_proj", "c_attn", "query_key_value", "in_proj_qkv")
# Keys and values are cached in 16 bits, states that do not grow with the context in 32.
_CACHE_BYTES, _STATE_BYTES = 2, 4


@dataclass(frozen=True)
class Storage:
    """The type of each tensor, by its role.

    Args:
        matrices: the weights of linear layers.
        rest: norms, biases, routers, convolutions and learned positions.
        table: the token table, unless it is the head, too.
        head: the head.
        experts: the matrices of experts; None: as `matrices`.
        more: in some layers, the matrices that compute values or lead out of the FFN; None: as all others.
    """

    matrices: str
    rest: str
    table: str
    head: str
    experts: str | None = None
    more: str | None = None

    def type_of(self, role: str) -> str:
        """Look up the type of a role, which is a field's name."""
        found: str | None = getattr(self, role)
        return found or self.matrices


def _gguf(matrices: str, head: str = "q6_k", more: str | None = None) -> Storage:
    return Storage(matrices, "float32", matrices, head, more=more)


STORAGES = {
    "float32": Storage("float32", "float32", "float32", "float32"),
    "bf16": Storage("bf16", "bf16", "bf16", "bf16"),
    # bitsandbytes, through transformers: linear layers but the head; experts are no linear layers there.
    "int8": Storage("int8", "bf16", "bf16", "bf16", experts="bf16"),
    "nf4": Storage("nf4", "bf16", "bf16", "bf16", experts="bf16"),
    "f16": _gguf("f16", "f16"),
    "q4_0": _gguf("q4_0"),
    "q4_1": _gguf("q4_1"),
    "q5_0": _gguf("q5_0"),
    "q5_1": _gguf("q5_1"),
    "q8_0": _gguf("q8_0", "q8_0"),
    "q4_k_m": _gguf("q4_k", more="q6_k"),
    "q5_k_m": _gguf("q5_k", more="q6_k"),
    "q6_k": _gguf("q6_k"),
}


def tensor_bytes(kind: str, count: int, row: int) -> int:
    """Compute the bytes of a matrix.

    Args:
        kind: a type of `BLOCKS`; "int8" (bitsandbytes: a float32 scale a row) or "nf4" (one for 64 weights).
        count: its weights.
        row: its input width.
    """
    if kind == "int8":
        return count + 4 * (count // row)
    if kind == "nf4":
        return -(-count // 2) + 4 * -(-count // 64)
    block, size = BLOCKS[fitting_type(kind, row)]
    return count // block * size


def fitting_type(kind: str, row: int) -> str:
    """Choose the type that llama.cpp takes for rows of this width: the one given, if they are whole blocks of it."""
    if row % BLOCKS[kind][0] == 0:
        return kind
    other = _FALLBACK.get(kind, "f16")
    return other if row % BLOCKS[other][0] == 0 else "f16"


class Memory:
    """Bytes of what can be cut from an architecture: weights in a storage, and the cache of a context of one row.

    Args:
        architecture: what layers are taken from, by their index.
        storage: a row of `STORAGES`.
        context_length: tokens in the cache.
    """

    def __init__(self, architecture: Architecture, storage: str, context_length: int) -> None:
        self._architecture, self._storage = architecture, STORAGES[storage]
        self._kinds = [architecture.kind(layer) for layer in range(architecture.depth)]
        # One layer of each kind stands for all; None: what is outside the layers.
        first = {self._kinds.index(kind): kind for kind in set(self._kinds)}
        self._tensors: dict[tuple[str | None] | None, list[_Tensor]] = {None: []}
        self._tensors |= {(kind,): [] for kind in first.values()}
        for tensor in _tensors(architecture):
            if tensor.layer is None:
                self._tensors[None].append(tensor)
            elif tensor.layer in first:
                self._tensors[first[tensor.layer],].append(tensor)
        # A search asks for many FFN widths of the same layers and sizes.
        self._mixtures = functools.cache(self._mixture)
        self._fixed: dict[tuple[Any, ...], int] = {}
        attending = attention_layers(architecture)
        # A window holds no more than its tokens.
        self._cached = [
            min(context_length, getattr(layer, "sliding_window", None) or context_length) * (i in attending)
            for i, layer in enumerate(DynamicCache(config=architecture.config).layers)
        ]

    def __call__(self, layers: Sequence[int], sizes: Sizes) -> int:
        """Compute what a model of these layers takes."""
        return self.weights(layers, sizes) + self.cache(layers, sizes)

    @classmethod
    def of(cls, architecture: Architecture, storage: str, context_length: int) -> tuple[int, int]:
        """Compute the bytes of weights and cache of an architecture as it is."""
        memory, layers = cls(architecture, storage, context_length), range(architecture.depth)
        return memory.weights(layers, architecture.sizes), memory.cache(layers, architecture.sizes)

    def weights(self, layers: Sequence[int], sizes: Sizes) -> int:
        """Compute the bytes of the weights."""
        total = self._sum(None, sizes, False, False)
        return total + sum(
            count * self._sum((kind,), sizes, value, down)
            for (kind, value, down), count in self._mixtures(tuple(layers)).items()
        )

    def _mixture(self, layers: tuple[int, ...]) -> Counter[tuple[str | None, bool, bool]]:
        """Count the layers of each kind by whether their value and FFN matrices get more bits."""
        mixed = self._storage.more is not None
        valued = [any(tensor.value for tensor in self._tensors[self._kinds[layer],]) for layer in layers]
        number, seen = sum(valued), 0
        counts: Counter[tuple[str | None, bool, bool]] = Counter()
        for position, (layer, has_value) in enumerate(zip(layers, valued, strict=True)):
            value, down = _more_bits(seen, number), _more_bits(position, len(layers))
            counts[self._kinds[layer], mixed and value, mixed and down] += 1
            seen += has_value
        return counts

    def cache(self, layers: Iterable[int], sizes: Sizes) -> int:
        """Compute the bytes of keys and values, and of the states of layers that have none."""
        layers, architecture = list(layers), self._architecture
        total = sum(self._cached[layer] for layer in layers) * cache_numbers(sizes) * _CACHE_BYTES
        kinds = Counter(self._kinds[layer] for layer in layers)
        for kind, count in kinds.items():
            for tensor in self._tensors[kind,]:
                dims = dims_of(tensor.axes)
                if "kernel" in dims:
                    total += count * math.prod(sizes[dim] for dim in dims) * _STATE_BYTES
                    if "value_head" in sizes:
                        heads = sizes["value_head"] * sizes["value_dim"] * architecture.config.linear_key_head_dim
                        total += count * heads * _STATE_BYTES
        return total

    def _sum(self, kind: tuple[str | None] | None, sizes: Sizes, value: bool, down: bool) -> int:
        key = (kind, value, down, *(length for dim, length in sizes.items() if dim != "ffn"))
        if key not in self._fixed:
            fixed = [tensor for tensor in self._tensors[kind] if not tensor.ffn]
            self._fixed[key] = self._bytes(fixed, sizes, value, down)
        free = [tensor for tensor in self._tensors[kind] if tensor.ffn]
        return self._fixed[key] + self._bytes(free, sizes, value, down)

    def _bytes(self, tensors: Iterable["_Tensor"], sizes: Sizes, value: bool, down: bool) -> int:
        total = 0
        for tensor in tensors:
            count = math.prod(axis_length(axis, sizes) for axis in tensor.axes)
            more = self._storage.more if (tensor.value and value) or (tensor.down and down) else None
            total += tensor_bytes(more or self._storage.type_of(tensor.role), count, axis_length(tensor.row, sizes))
        return total


def attention_layers(architecture: Architecture) -> set[int]:
    """List the layers that keep keys and values."""
    found = {architecture.split_name(site.name)[0] for site in architecture.sites if site.axis[0] == "group"}
    return {layer for layer in found if layer is not None}


def cache_numbers(sizes: Sizes) -> int:
    """Count the keys and values of a token in one layer."""
    return 2 * sizes["group"] * sizes["dim"]


@dataclass(frozen=True)
class _Tensor:
    layer: int | None
    axes: Axes
    row: tuple[str, ...]
    role: str
    value: bool = False
    down: bool = False

    @functools.cached_property
    def ffn(self) -> bool:
        """Whether its size depends on the FFN width."""
        return "ffn" in dims_of(self.axes)


def _tensors(architecture: Architecture) -> list[_Tensor]:
    """List the tensors that are stored, with the axis of their rows and their role in a `Storage`."""
    family = architecture.family
    table, head = f"{family.embedding}.weight", f"{family.head}.weight"
    sites = {
        reader_keys(reader, architecture.tensors, architecture)[0]: site
        for site in architecture.sites
        for reader in site.readers
    }
    found = []
    for key, (stored, _) in architecture.stored.items():
        axes, (layer, name) = architecture.tensors[key], architecture.split_name(key)
        site = sites.get(key)
        if key in (table, head):
            role = "head" if key == head or architecture.tied else "table"
            found.append(_Tensor(layer, axes, ("width",), role))
        # Routers stay as they are.
        elif site is None or (("expert",) in axes and len(axes) == 2):
            found.append(_Tensor(layer, axes, axes[-1] if axes else (), "rest"))
        else:
            routed = family.experts is not None and name.startswith(f"{family.experts.module}.")
            value = stored.removesuffix(".weight").rpartition(".")[2] in _VALUES
            down = site.axis == ("ffn",)
            found.append(_Tensor(layer, axes, site.axis, "experts" if routed else "matrices", value, down))
    return found


def _more_bits(i: int, number: int) -> bool:
    """Check whether the i-th such tensor gets more bits in a mixture (`use_more_bits`)."""
    return i < number // 8 or i >= 7 * number // 8 or (i - number // 8) % 3 == 2
