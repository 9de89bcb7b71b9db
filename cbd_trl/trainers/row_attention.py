"""SDPA over packed rows, row by row.

A padding-free batch is one long row with a block-diagonal mask. SDPA computes the blocks off the diagonal and throws
them away; FlashAttention does not, and where it is missing neither does this.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_row"


def attend_by_row(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' SDPA attention, one packed row at a time.

    Args:
        module: the attention layer.
        query: (1, heads, T, head dim).
        key: (1, key/value heads, T, head dim).
        value: (1, key/value heads, T, head dim).
        attention_mask: (1, 1, T, T), or None; each row is attended under its own block of it.
        args: as transformers passes them.
        cu_seq_lens_q: where the rows begin and the last one ends, (rows + 1,); None for a batch that is not packed.
        kwargs: as transformers passes them.

    Returns:
        (1, T, heads, head dim), and None for the attention weights.
    """
    if cu_seq_lens_q is None or len(cu_seq_lens_q) < 3 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    bounds, outputs = cu_seq_lens_q.tolist(), []
    for start, end in pairwise(bounds):
        row = slice(start, end)
        states = query[:, :, row], key[:, :, row], value[:, :, row]
        output, _ = sdpa_attention_forward(module, *states, _block(attention_mask, row), *args, **kwargs)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _block(mask: Tensor, row: slice) -> Tensor | None:
    block = mask[..., row, row]
    if block.dtype == torch.bool and torch.equal(block, torch.ones_like(block).tril_()):
        return None  # plainly causal, which SDPA does faster without a mask
    return block


AttentionInterface.register(NAME, attend_by_row)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def attention_by_row(models: Iterable[Any]) -> Iterator[None]:
    """Within it those of the models that attend with SDPA do so row by row.

    Args:
        models: causal LMs, not wrapped.
    """
    switched = [model for model in models if model.config._attn_implementation == "sdpa"]
    for model in switched:
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        for model in switched:
            model.set_attn_implementation("sdpa")
