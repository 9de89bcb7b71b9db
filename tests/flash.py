"""A stand-in for the package flash-attn, which builds for GPUs alone, with the two refusals of the real one.

It takes float16 and bfloat16 tensors only, and tensors of an accelerator only; what it computes is causal attention by
SDPA, row by row. Transformers finds it as `attn_implementation="flash_attention_2"`.
"""

import importlib.machinery
import sys
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

FLASH = "flash_attention_2"


class FlashAttention:
    """The package.

    Args:
        on_cpu: let the CPU play the accelerator.

    Attributes:
        calls: dtypes of the tensors that it was given.
    """

    def __init__(self, on_cpu: bool) -> None:
        self._on_cpu = on_cpu
        self.calls: list[torch.dtype] = []

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, **how: Any
    ) -> Tensor:
        """Attention of whole batches, (B, T, heads, head dim) each."""
        self._check(q, k, v)
        return _attend(q, k, v, softmax_scale, **how)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        **how: Any,
    ) -> Tensor:
        """Attention of packed rows, (T, heads, head dim) each."""
        self._check(q, k, v)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        rows = [slice(start, end) for start, end in pairwise(cu_seqlens_q.cpu().tolist())]
        return torch.cat([_attend(*(x[None, row] for x in (q, k, v)), softmax_scale, **how)[0] for row in rows])

    def flash_attn_with_kvcache(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attention with paged caches, which nothing here has."""
        raise NotImplementedError

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if tensor.dtype not in (torch.float16, torch.bfloat16):
                raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
            if tensor.device.type == "cpu" and not self._on_cpu:
                raise NotImplementedError(
                    "Could not run 'flash_attn::_flash_attn_forward' with arguments from the 'CPU' backend."
                )
        self.calls.append(tensors[0].dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool = False, **_: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def install(patch: pytest.MonkeyPatch, on_cpu: bool = True) -> FlashAttention:
    """Make transformers find the stand-in until the patches are undone.

    Args:
        patch: takes them.
        on_cpu: let the CPU play the accelerator.
    """
    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    made, module = FlashAttention(on_cpu), {"flash_attn": package, "flash_attn.bert_padding": padding}
    functions: tuple[Callable[..., Any], ...] = (
        made.flash_attn_func,
        made.flash_attn_varlen_func,
        made.flash_attn_with_kvcache,
    )
    for function in functions:
        setattr(package, function.__name__, function)
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    vars(padding).update(pad_input=flash_utils._pad_input, unpad_input=flash_utils._unpad_input)
    for name, found in module.items():
        patch.setitem(sys.modules, name, found)
    # What it looks at: packages that are installed, and CUDA.
    patch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    patch.setattr(flash_utils, "_loaded_implementation", None)
    version = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    patch.setitem(version, "general_availability_check", lambda: True)
    patch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, flash_attn_version, is_init_check: True)
    return made
