"""The strict device (tests/device/tensor.py) as torch, accelerate and transformers see it.

Installing it cannot be undone and changes what every later test of the process runs on: it needs a process of its own.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.device.tensor import DEVICE, NAME, USAGE, StrictTensor, transfer

# What autocast runs in its low precision and in float32 on CUDA: those operators that are met here.
_LOW_PRECISION = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
_FLOAT32 = (
    "log_softmax.int",
    "softmax.int",
    "cross_entropy_loss",
    "pow.Tensor_Scalar",
    "rsqrt",
    "exp",
    "log",
    "sum",
    "cumsum",
    "cosine_similarity",
)
# As long as they live, their kernels are registered.
_LIBRARIES: list[Any] = []


def available() -> bool:
    """Whether this torch takes a backend written in Python."""
    from torch.utils import backend_registration

    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@functools.cache
def install() -> None:
    """Make the strict device this process's accelerator, once."""
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend(NAME)
    # `module.to(device)` cannot exchange the memory of a CPU tensor for this; tensors that are swapped stay tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _install_module()
    _install_autocast()
    _install_kernels()
    _tell_libraries()


def _install_module() -> None:
    """Fill in `torch.strict`, of which the libraries call what they call of `torch.cuda`."""
    functions: dict[str, Callable[..., Any]] = {
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "get_rng_state": lambda *device: torch.get_rng_state(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda *device: USAGE.bytes_peak,
        "memory_allocated": lambda *device: USAGE.bytes_now,
        "reset_peak_memory_stats": lambda *device: setattr(USAGE, "bytes_peak", USAGE.bytes_now),
        "set_device": lambda device: None,
        "set_rng_state": lambda *state: None,
        "synchronize": lambda *device: None,
    }
    for name, function in functions.items():
        setattr(getattr(torch, NAME), name, function)


def _install_autocast() -> None:
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in _LOW_PRECISION:
        library.impl(name, _autocast(name, None))
    for name in _FLOAT32:
        library.impl(name, _autocast(name, torch.float32))
    _LIBRARIES.extend((others, library))


def _autocast(name: str, dtype: torch.dtype | None) -> Callable[..., Any]:
    """The operator on arguments cast to `dtype`; None: to autocast's own."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    this_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
        return leaf.to(dtype or torch.get_autocast_dtype(NAME)) if floating and leaf.device.type == NAME else leaf

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(this_key):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel


def _install_kernels() -> None:
    """What is called below any mode: by autograd's threads, and by `torch.tensor`."""

    def empty(size: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return StrictTensor(torch.empty(size, dtype=dtype, device="cpu"))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return StrictTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    library.impl("empty.memory_format", empty)
    library.impl("empty_strided", empty_strided)
    library.impl("_copy_from", transfer)
    attention = torch.library.Library("aten", "IMPL", "AutogradPrivateUse1")
    attention.impl("scaled_dot_product_attention", _attention)
    _LIBRARIES.extend((library, attention))


def _attention(query: Any, key: Any, value: Any, mask: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _Attention.apply(query, key, value, mask, args, kwargs)


class _Attention(torch.autograd.Function):
    """SDPA in one kernel, as on CUDA: what it keeps are its inputs, its output and the norm of each row."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, args: Any, kwargs: Any) -> torch.Tensor:
        with torch.enable_grad():
            inputs = [tensor.memory.detach().requires_grad_() for tensor in (query, key, value)]
            memory = mask.memory if isinstance(mask, StrictTensor) else mask
            ctx.inputs = inputs
            ctx.output = torch.nn.functional.scaled_dot_product_attention(*inputs, memory, *args, **kwargs)
        output = StrictTensor(ctx.output.detach().transpose(1, 2).contiguous().transpose(1, 2))
        norms = torch.empty(query.shape[:-1], dtype=torch.float32, device=DEVICE)
        if mask is not None:
            # Added to the scores: one of booleans is written anew.
            mask = torch.empty_like(mask, dtype=query.dtype)
        ctx.save_for_backward(query, key, value, output, norms, mask)
        return output

    @staticmethod
    def backward(ctx: Any, slope: Any) -> Any:
        gradients = torch.autograd.grad(ctx.output, ctx.inputs, slope.memory)
        return *(StrictTensor(gradient) for gradient in gradients), None, None, None


def _tell_libraries() -> None:
    """Make it the device that accelerate finds, and one that transformers lets train in bfloat16."""
    import accelerate.state
    import transformers.training_args

    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    accelerate.state.PartialState.default_device = property(lambda state: DEVICE)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
