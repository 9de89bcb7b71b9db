"""Tensors of a device that exists in Python alone and is as strict as CUDA; what was done on it is counted.

The device is torch's PrivateUse1, renamed "strict". A tensor on it wraps one in CPU memory, so results are those of
the CPU, while these rules hold:

- an operation on tensors of the device and CPU tensors together is an error, as on CUDA: exceptions are copies, CPU
  tensors without dimensions, and CPU tensors as an index; XLA and MPS are not that strict, and the CPU cannot be
- `.numpy()` of a tensor on the device is an error
- what makes the host wait for a GPU is counted: reading a value, results whose size depends on values, copies

`Usage` has the counts, by operation and by the line of cbd_trl or of a library that asked for it.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import cbd_trl

NAME = "strict"
DEVICE = torch.device("privateuseone", 0)

_PACKAGE = str(Path(cbd_trl.__file__).parent)
_LIBRARIES = ("/transformers/", "/trl/", "/accelerate/", "/peft/", "/torch/optim/")
_COPIES = {"aten::_to_copy", "aten::copy_"}
_BY_INDEX = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_unsafe_index",
    "aten::_index_put_impl_",
    "aten::_unsafe_index_put",
}
# Their result, or its size, is known to the host only when the device is done.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::repeat_interleave",
    "aten::is_nonzero",
    "aten::linalg_cholesky_ex",
}


class Usage:
    """What was done on the device since `clear`.

    Attributes:
        waits: (operation, "file:line") -> how often the host waited for the device.
        uploads: the same of copies from CPU memory to the device.
        doubles: the same of float64 tensors made on the device, which Apple's MPS has none of.
        bytes_now: alive on the device, each storage once.
        bytes_peak: the most that were alive.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.uploads: Counter[tuple[str, str]] = Counter()
        self.doubles: Counter[tuple[str, str]] = Counter()
        self.bytes_now = 0
        self.bytes_peak = 0
        self._users: dict[int, int] = {}

    def clear(self) -> None:
        """Set the counts to 0 and the peak to what is alive now."""
        for counter in (self.waits, self.uploads, self.doubles):
            counter.clear()
        self.bytes_peak = self.bytes_now

    def hold(self, tensor: Tensor) -> object:
        """Count the storage of a CPU tensor as alive until all objects that were returned for it are gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata if storage.data_ptr() == 0 else storage.data_ptr(), storage.nbytes()
        if key not in self._users:
            self.bytes_now += size
            self.bytes_peak = max(self.bytes_peak, self.bytes_now)
        self._users[key] = self._users.get(key, 0) + 1
        held = _Held()
        weakref.finalize(held, self._release, key, size)
        return held

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.bytes_now -= size


class _Held:
    """What a tensor of the device owns as long as it lives."""


USAGE = Usage()


class StrictTensor(Tensor):
    """A tensor on the strict device; `memory` is the CPU tensor that holds its values."""

    memory: Tensor
    _held: object

    @staticmethod
    def __new__(cls: type, memory: Tensor, requires_grad: bool = False, **_: Any) -> "StrictTensor":
        if isinstance(memory, StrictTensor):
            memory = memory.memory
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            layout=memory.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.memory = memory
        # Not of the tensor itself: what has weak references cannot be swapped, as `module.to` does.
        made._held = USAGE.hold(memory)
        return made

    def __init__(self, memory: Tensor, **_: Any) -> None: ...

    def __repr__(self, **_: Any) -> str:
        return f"StrictTensor({self.memory!r})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refuse, as CUDA does."""
        raise TypeError(f"can't convert a tensor on {NAME}:0 to numpy: copy it to the host with Tensor.cpu() first")

    def tolist(self) -> Any:
        """Count the wait of the host, then read the values."""
        USAGE.waits["tolist", caller()] += 1
        return self.memory.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _execute(func, args, kwargs or {})


class StrictMode(TorchDispatchMode):
    """Within it tensors can be made on the device: of a call without tensors `StrictTensor` never hears."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _execute(func, args, kwargs or {})


def caller() -> str:
    """The line of cbd_trl or of a library that asked for the running operation, as "file:line"."""
    for file, line in _stack(sys._getframe(1)):
        if file.startswith(_PACKAGE):
            return f"cbd_trl{file.removeprefix(_PACKAGE)}:{line}"
        if any(name in file for name in _LIBRARIES):
            return f"{file.rpartition('site-packages/')[2]}:{line}"
    return "elsewhere"


def _stack(frame: FrameType | None) -> Iterator[tuple[str, int]]:
    while frame is not None:
        # What has a method `to` is moved like a tensor, by whoever moves it: the parts of a batch by accelerate.
        if frame.f_code.co_name != "to":
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(leaf: Any) -> Any:
    return leaf.memory if isinstance(leaf, StrictTensor) else leaf


def _on_device(leaf: Any) -> Any:
    return StrictTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, StrictTensor) else leaf


def _execute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check an operation, run it in CPU memory, count it, and put its results where CUDA would."""
    inputs = _tensors((args, kwargs))
    strict = [tensor for tensor in inputs if isinstance(tensor, StrictTensor)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted).type
    if not strict and wanted != NAME:
        return func(*args, **kwargs)
    name = func._schema.name
    if strict and name not in _COPIES:
        _check_placement(name, args, inputs)
        _count_waits(name, args, kwargs)
    on_cpu = {**kwargs, **({"device": torch.device("cpu")} if wanted == NAME else {})}
    if on_cpu.get("pin_memory"):
        on_cpu["pin_memory"] = False
    output = func(*tree_map(_memory, args), **tree_map(_memory, on_cpu))
    if name == "aten::copy_":
        _count_copy(*args[:2])
        return args[0]
    if wanted not in (None, NAME):
        if strict:
            USAGE.waits[f"{name} to the host", caller()] += 1
        return output
    if name == "aten::_to_copy" and not strict:
        USAGE.uploads[name, caller()] += 1
    if any(tensor.dtype == torch.float64 for tensor in _tensors(output)):
        USAGE.doubles[name, caller()] += 1
    output = tree_map(_on_device, output)
    return return_and_correct_aliasing(func, args, kwargs, output) if strict else output


def _check_placement(name: str, args: Any, inputs: list[Tensor]) -> None:
    """Raise RuntimeError where CPU tensors with dimensions meet tensors of the device."""
    on_host = [tensor for tensor in inputs if tensor.device.type == "cpu" and tensor.dim() > 0]
    if on_host and name in _BY_INDEX:
        # Of x[index] and x[index] = values, the index alone may be on the host: it is copied, which waits.
        values = [args[0], *args[2:3]]
        on_host = [value for value in values if any(value is tensor for tensor in on_host)]
        if not on_host:
            USAGE.waits[f"{name} by an index on the host", caller()] += 1
    if on_host:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu, "
            f"in {name} at {caller()}"
        )


def _count_waits(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name in _WAITING and kwargs.get("output_size") is None:
        USAGE.waits[name, caller()] += 1
    elif name in _BY_INDEX and any(index is not None and index.dtype == torch.bool for index in args[1]):
        USAGE.waits[f"{name} by a mask", caller()] += 1


def _count_copy(target: Tensor, source: Tensor) -> None:
    if isinstance(source, StrictTensor) and not isinstance(target, StrictTensor):
        USAGE.waits["aten::copy_ to the host", caller()] += 1
    elif isinstance(target, StrictTensor) and not isinstance(source, StrictTensor):
        USAGE.uploads["aten::copy_", caller()] += 1


def transfer(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between host and device where no mode sees it: `torch.tensor(..., device=)`, and autograd's threads."""
    counter = USAGE.waits if isinstance(source, StrictTensor) else USAGE.uploads
    counter["_copy_from", caller()] += 1
    _memory(target).copy_(_memory(source))
    return target
