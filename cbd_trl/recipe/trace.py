"""Count the bytes of a computation without computing it, on tensors that have a shape and a device and no data.

What runs is the code of this package and of transformers themselves: what a layer keeps for the backward pass, or a
loss needs for a chunk, is what that code keeps and needs, in every family.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import moe
from transformers.masking_utils import sdpa_mask

from cbd_trl.architectures import Site
from cbd_trl.architectures.axes import axis_length
from cbd_trl.build import width_hybrid
from cbd_trl.losses import fused
from cbd_trl.surgery import experts, refit, statistics
from cbd_trl.surgery.least_squares import Fit, cut_fits
from cbd_trl.targets.operators import Pair, Plan
from cbd_trl.trainers import hidden_states
from cbd_trl.utils.progress import progress_shown

_aten = torch.ops.aten
_BY_INDEX = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}


class Bytes(TorchDispatchMode):
    """Within it memory is counted as it is taken and given back, each storage once.

    A boolean index, whose result is as long as its values say, counts as all True: every token is scored. A value that
    is read is 1.

    Attributes:
        now: bytes alive of what was made within.
        peak: the most that were alive since `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _BY_INDEX:
            args = (args[0], _everywhere(args[1]), *args[2:])
        if func is _aten._local_scalar_dense.default:
            return 1 if not args[0].is_floating_point() else 1.0
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return output

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _everywhere(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices, with those of every element in place of a boolean one."""
    found: list[Tensor | None] = []
    for index in indices:
        boolean = index is not None and index.dtype == torch.bool
        found += [index.new_empty(index.numel(), dtype=torch.long)] * index.dim() if boolean else [index]  # type: ignore[union-attr]
    return found


@contextmanager
def traced(device: torch.device, half: torch.dtype | None = None) -> Iterator[Bytes]:
    """Within it tensors have no memory, and what they would take on a device is counted.

    They are called CPU tensors, since torch makes no others where the device is not there.

    Args:
        device: that is stood in for.
        half: the dtype of autocast; None without mixed precision.
    """
    changes: list[tuple[Any, str, Any]] = [
        (fused, "_parts", _two_parts(fused._parts)),
        # It moves what it makes, and these tensors cannot be moved.
        (hidden_states, "skip_init", lambda module, *args, **kwargs: module(*args, **kwargs)),
        # accelerate hands on what an older torch notes in a parameter without data, and no parameter takes it.
        (width_hybrid, "init_empty_weights", lambda include_buffers: torch.device("meta")),
        # Which coordinates a fit leaves out depends on values.
        (width_hybrid, "upper_fits", _empty_fits),
        # So does how many tokens an expert gets.
        (refit, "routed_rows", _evenly_routed),
        (statistics, "routed_rows", _evenly_routed),
        # torch has it without data for bfloat16 alone.
        (moe, "_grouped_mm", lambda rows, weight, offs: _Grouped.apply(rows, weight, offs)),
    ]
    if device.type != "cpu":
        changes += [(fused, "_BLOCK_ELEMENTS", {})]
        if half is not None:
            changes += [(module, name, _in_float32(getattr(module, name))) for module, name in _FLOAT32_ON_GPU]
    # torch makes a number that a module keeps (Gemma's scale of the table) on the meta device, and not without data.
    with progress_shown(False), FakeTensorMode(allow_non_fake_inputs=True), _changed(changes), Bytes() as count:
        yield count


# What autocast takes in float32 on a GPU and not on a CPU, of what models call.
_FLOAT32_ON_GPU = ((torch, "pow"), (torch.nn.functional, "layer_norm"), (torch.nn.functional, "softmax"))


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(tensor.float() if torch.is_autocast_enabled("cpu") else tensor, *args, **kwargs)

    return call


def _two_parts(parts: Callable[..., Iterator[slice]]) -> Callable[..., Iterator[slice]]:
    """All chunks of a loss take what the first does, and the last may be smaller: two stand for them all."""

    def call(*args: Any) -> Iterator[slice]:
        return itertools.islice(parts(*args), 2)

    return call


def _empty_fits(pair: Pair, plan: Plan) -> dict[tuple[Site, bool], Fit]:
    upper = pair.upper_architecture
    widths = upper.resized(**plan.target.sizes)
    fits = {}
    for site, intercept in cut_fits(upper, widths):
        full, kept = (axis_length(site.axis, sizes) for sizes in (upper.sizes, widths.sizes))
        matrix, constant = torch.empty(full - kept, kept), torch.empty(full - kept) if intercept else None
        fits[site, intercept] = Fit(slice(0, kept), slice(kept, full), matrix, constant)
    return fits


def _evenly_routed(module: Any, inputs: experts.Routed) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every expert gets as many tokens as the others."""
    stream, chosen, shares = inputs
    tokens = torch.empty(-(-chosen.numel() // module.num_experts), dtype=torch.long)
    for expert in range(module.num_experts):
        yield expert, tokens, experts.neurons(module, stream[tokens], expert) * shares[tokens, :1]


class _Grouped(torch.autograd.Function):
    """The product of the rows of each expert, (S, D), with its matrix, (E, D, F), in one kernel: (S, F)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        rows = rows.to(weight.dtype)
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(len(rows), weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return torch.empty_like(rows) if needed[0] else None, torch.empty_like(weight) if needed[1] else None, None


@contextmanager
def _changed(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention in one kernel, as transformers calls it.

    Args:
        module: the attention layer.
        query: (B, heads, T, head dim).
        key: (B, key/value heads, T, head dim).
        value: (B, key/value heads, T, head dim).
        attention_mask: (B, 1, T, T), or None where it is plainly causal.
        args: unused.
        kwargs: unused.

    Returns:
        (B, T, heads, head dim), and None for the attention weights.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    if attention_mask is not None:
        # With a mask transformers gives every query head a key head of its own, and kernels add it to the scores.
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (key, value))
        attention_mask = torch.empty_like(attention_mask, dtype=query.dtype)
    return _Attention.apply(query, key, value, attention_mask), None


class _Attention(torch.autograd.Function):
    # What FlashAttention keeps (Dao et al. 2022, arXiv 2205.14135, section 3.1): its inputs, the output and the
    # logarithm of each row's norm.
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty((batch, length, heads, value.shape[-1]))
        norms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, norms, mask)
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


# Its name among transformers' ways to attend.
FUSED = "fused_without_data"
AttentionInterface.register(FUSED, attend)
AttentionMaskInterface.register(FUSED, sdpa_mask)
