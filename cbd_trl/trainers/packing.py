"""Packed and padding-free rows: attention inside each row, whether a model keeps the rows apart, and their lengths.

A padding-free batch is one long row of T tokens with a block-diagonal mask. SDPA under the dense (T, T) mask computes
the blocks off the diagonal and throws them away. A user's FlashAttention does not; for models that attend with SDPA
torch's varlen attention is used here where its kernel runs, and SDPA one row at a time elsewhere.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cbd_trl.utils.modeling import in_eval_mode

try:
    from torch.nn.attention import varlen
except ImportError:  # an older torch
    varlen_attn: Any = None
else:
    varlen_attn = varlen.varlen_attn

logger = logging.get_logger(__name__)

NAME = "packed_rows"
# Two rows that a model is run on packed, and apart.
_PROBE = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7, 8]}]
# What a layer may pass to its attention and varlen_attn has no argument for.
_BEYOND_VARLEN = ("position_bias", "s_aux", "softcap")
# Rows that the kernel is tried on, and how far a result in 16 bits may be from SDPA's, of its norm.
_TRIAL_BOUNDS, _TRIAL_TOLERANCE = (0, 5, 24), 3e-2


def attend_within_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "Tensor | RowMask | None",
    row_bounds: Sequence[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' SDPA attention; in a packed batch within each row alone.

    What decides between the kernels is known on the host: a GPU is never waited for.

    Args:
        module: the attention layer.
        query: (1, heads, T, head size).
        key: (1, key/value heads, T, head size).
        value: (1, key/value heads, T, head size).
        attention_mask: what `row_mask` made; each row is attended under its own block of it.
        row_bounds: where the rows begin and the last one ends, rows + 1 numbers; None for a batch that is not packed.
        cu_seq_lens_q: the same on the device, (rows + 1,) int32.
        kwargs: as transformers passes them.

    Returns:
        (1, T, heads, head size), and None for the attention weights.
    """
    if row_bounds is None:
        mask = attention_mask.whole() if isinstance(attention_mask, RowMask) else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    longest = max(end - start for start, end in pairwise(row_bounds))
    device, dtype = query.device, _product_dtype(query)
    window = _window(attention_mask, longest, kwargs.get("sliding_window"))
    if window is not None and _is_plain(query, value, kwargs) and _has_varlen(device, dtype, query.shape[-1]):
        states = (state[0].transpose(0, 1).to(dtype) for state in (query, key, value))
        options = {"scale": kwargs.get("scaling"), "window_size": window, "enable_gqa": True}
        return varlen_attn(*states, cu_seq_lens_q, cu_seq_lens_q, longest, longest, **options)[None], None
    outputs = []
    # Split, not sliced: the gradient of every slice would be as long as the whole pack.
    lengths = [end - start for start, end in pairwise(row_bounds)]
    rows = zip(pairwise(row_bounds), *(states.split(lengths, 2) for states in (query, key, value)), strict=True)
    for (start, end), q, k, v in rows:
        mask = _block(attention_mask, start, end)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


class RowMask:
    """The mask of one layer type for one batch row, of which only the blocks are made that are looked at.

    Args:
        make: `sdpa_mask` of transformers with all arguments that do not depend on the block.
        length: T.
        local_size: tokens that a token sees at most, of the window or chunk that it is in; None for all before it.
        allow_is_causal_skip: whether the whole mask may be left out where it is plainly causal.
    """

    def __init__(
        self, make: Callable[..., Tensor | None], length: int, local_size: int | None, allow_is_causal_skip: bool
    ) -> None:
        self.local_size = local_size
        self._make, self._length, self._allow_is_causal_skip = make, length, allow_is_causal_skip
        self._blocks: dict[tuple[int, int], Tensor | None] = {}

    def block(self, start: int, end: int) -> Tensor | None:
        """Make the mask of one row, (1, 1, n, n) bool, n = end - start; None where it is plainly causal.

        Args:
            start: the row's first token.
            end: the token behind its last one.
        """
        if self.local_size is None or end - start <= self.local_size:
            return None
        return self._made(start, end, allow_is_causal_skip=False)

    def whole(self) -> Tensor | None:
        """Make the dense mask, (1, 1, T, T) bool; None where it is plainly causal and may be left out."""
        return self._made(0, self._length, allow_is_causal_skip=self._allow_is_causal_skip)

    def __getattr__(self, name: str) -> Any:
        # What a model does with its mask before attention (Doge, DeepSeek V3.2), or moves between devices, is dense.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._dense()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dense, named = tree_map(
            lambda leaf: leaf._dense() if isinstance(leaf, RowMask) else leaf, (args, kwargs or {})
        )
        return func(*dense, **named)

    def _dense(self) -> Tensor:
        mask = self._made(0, self._length, allow_is_causal_skip=False)
        assert mask is not None
        return mask

    def _made(self, start: int, end: int, **options: Any) -> Tensor | None:
        # The layers of one type share it.
        if (start, end) not in self._blocks:
            length = end - start
            self._blocks[start, end] = self._make(
                q_length=length, kv_length=length, q_offset=start, kv_offset=start, **options
            )
        return self._blocks[start, end]


def row_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | RowMask | None:
    """Make the mask of a layer type as transformers' `sdpa_mask` does, but that of a packed batch block by block.

    Args:
        batch_size: B.
        q_length: tokens that attend.
        kv_length: tokens that are attended to.
        q_offset: position of the first of the former.
        kv_offset: of the latter.
        attention_mask: 1 for tokens, 0 for padding, (B, T), or None.
        local_size: as in `RowMask`.
        allow_is_causal_skip: whether None may stand for a plainly causal mask.
        allow_is_bidirectional_skip: whether None may stand for no mask at all.
        use_vmap: whether the model adds a rule of its own.
        kwargs: further arguments of `sdpa_mask`.

    Returns:
        a `RowMask` for one row without padding, without a cache and under a causal rule; else as `sdpa_mask`.
    """
    options = {"local_size": local_size, "allow_is_bidirectional_skip": allow_is_bidirectional_skip, **kwargs}
    make = functools.partial(
        sdpa_mask, batch_size=batch_size, attention_mask=attention_mask, use_vmap=use_vmap, **options
    )
    starts = isinstance(q_offset, int) and q_offset == kv_offset == 0
    whole = starts and batch_size == 1 and attention_mask is None and q_length == kv_length
    if whole and not use_vmap and not allow_is_bidirectional_skip:
        return RowMask(make, q_length, local_size, allow_is_causal_skip)
    offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
    return make(q_length=q_length, kv_length=kv_length, **offsets, allow_is_causal_skip=allow_is_causal_skip)


AttentionInterface.register(NAME, attend_within_rows)
AttentionMaskInterface.register(NAME, row_mask)


def _block(mask: Tensor | RowMask | None, start: int, end: int) -> Tensor | None:
    if isinstance(mask, Tensor):
        return mask[..., start:end, start:end]
    return None if mask is None else mask.block(start, end)


def _window(mask: Tensor | RowMask | None, longest: int, own: int | None) -> tuple[int, int] | None:
    """What varlen_attn is to be told of a mask; None where it cannot be told.

    Args:
        mask: of the layer.
        longest: tokens of the longest row.
        own: window that the layer says it has. Without one a mask that is local has chunks.
    """
    if isinstance(mask, Tensor):
        return None
    if mask is None or mask.local_size is None or longest <= mask.local_size:
        return -1, 0
    return (mask.local_size - 1, 0) if mask.local_size == own else None


def _is_plain(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether a layer attends without anything that varlen_attn does not do."""
    beyond = any(options.get(name) is not None for name in _BEYOND_VARLEN)
    return not beyond and not options.get("dropout") and query.shape[-1] == value.shape[-1]


def _product_dtype(query: Tensor) -> torch.dtype:
    """What SDPA multiplies in: autocast, which does not know varlen_attn, casts for it."""
    kind = query.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else query.dtype


@functools.cache
def _has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Choose, once for a device, a dtype and a head size, whether packed rows attend with varlen_attn, and log it."""
    where = f"on {device} in {str(dtype).removeprefix('torch.')} (heads of {head_size})"
    missing = _missing(device, dtype, head_size)
    if missing is None:
        logger.info(f"Packed rows attend with torch.nn.attention.varlen.varlen_attn {where}.")
    elif device.type == "cpu":
        logger.info(f"Packed rows attend one by one with SDPA {where}: {missing}.")
    else:
        logger.warning(
            f"Packed rows attend one by one with SDPA {where}: {missing}. Where rows are many and short that is slow "
            "on a GPU: train in bf16, or load both models with attn_implementation='flash_attention_2'."
        )
    return missing is None


def _missing(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """What varlen_attn lacks here, found by trying it; None for nothing."""
    if device.type != "cuda":
        return "varlen_attn is for CUDA"
    if dtype not in (torch.float16, torch.bfloat16):
        return "varlen_attn takes float16 and bfloat16"
    if varlen_attn is None or not {"scale", "window_size", "enable_gqa"} <= set(
        inspect.signature(varlen_attn).parameters
    ):
        return f"torch {torch.__version__} has no varlen_attn with scale, window_size and enable_gqa"
    try:
        # In a thread of its own nothing that is going on here (autocast, checkpointing, modes) reaches the trial.
        with ThreadPoolExecutor(1) as thread:
            found, expected = thread.submit(_try_varlen, device, dtype, head_size).result()
    except (RuntimeError, ValueError) as error:
        return f"varlen_attn does not run ({str(error).splitlines()[0]})"
    far = max(((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True))
    return None if far <= _TRIAL_TOLERANCE else f"varlen_attn is {far:.1%} off SDPA"


def _try_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of varlen_attn and of SDPA on two rows, with a window and two heads to a key."""
    total, window = _TRIAL_BOUNDS[-1], 7
    waves = torch.arange(total * 8 * head_size, device=device).reshape(total, 8, head_size).sin().to(dtype)
    bounds = torch.tensor(_TRIAL_BOUNDS, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in pairwise(_TRIAL_BOUNDS))

    def varlen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {"scale": 0.3, "window_size": (window - 1, 0), "enable_gqa": True}
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = torch.arange(total, device=device)
        row = torch.bucketize(places, bounds[1:], right=True)
        before = places[:, None] - places
        mask = (row[:, None] == row) & (before >= 0) & (before < window)
        states = (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
        query, key, value = (state.transpose(0, 1)[None] for state in states)
        return scaled_dot_product_attention(query, key, value, mask, scale=0.3)[0].transpose(0, 1)

    results = []
    for attend in (varlen, sdpa):
        states = [state.clone().requires_grad_() for state in waves.split((4, 2, 2), dim=1)]
        output = attend(*states)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), states)])
    return results[0], results[1]


@dataclass
class PackingCollator(DataCollatorForLanguageModeling):
    """TRL's collator for padding-free batches, which adds how many tokens each row has.

    Evaluation needs the dataset rows to leave out those that fill up the last batch of several processes; attention
    needs the bounds of the rows on the host.

    Attributes:
        with_bounds: whether to add `row_bounds`, which a compiled graph would be made anew for.
    """

    with_bounds: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: dataset rows.

        Returns:
            TRL's batch, `row_lengths`, (R,) tokens of each dataset row, and `row_bounds`, where the rows that are kept
            apart begin and the last one ends.
        """
        batch = super().torch_call(examples)
        batch["row_lengths"] = torch.tensor([len(example["input_ids"]) for example in examples])
        if self.with_bounds:
            batch["row_bounds"] = tuple(batch["cu_seq_lens_q"].tolist())
        return batch


@contextmanager
def attention_within_rows(models: Iterable[Any]) -> Iterator[None]:
    """Within it those of the models that attend with SDPA do so within each packed row alone.

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


def warn_of_dense_masks(models: Iterable[Any], compiled: bool) -> None:
    """Log a warning for models that attend over whole packs, T x T, because of what the user chose.

    Args:
        models: causal LMs, not wrapped.
        compiled: whether `torch_compile` leaves SDPA as it is.
    """
    dense = {"eager", "sdpa"} if compiled else {"eager"}
    for name in sorted({model.config._attn_implementation for model in models} & dense):
        why = " under torch_compile" if name == "sdpa" else ""
        logger.warning(
            f"Packed rows attend under a dense mask, all tokens x all tokens, with attn_implementation={name!r}{why}. "
            "'flash_attention_2' and 'flex_attention' avoid it, and so does 'sdpa' without torch_compile."
        )


@torch.no_grad()
def check_rows_apart(model: Any) -> None:
    """Check that the packed rows of a model do not see each other: it would learn, or teach, from its neighbors' text.

    Not every family passes the positions on to its attention mask (OPT does not).

    Args:
        model: a causal LM, not wrapped, with the attention that it is to be run with.

    Raises:
        ValueError: if a row's logits depend on the row that is packed before it.
    """
    if any(parameter.is_meta or parameter.numel() == 0 for parameter in model.parameters()):
        return  # offloaded or sharded already: it cannot be run here
    with in_eval_mode(model):
        packed, alone = (_last_row_logits(model, rows) for rows in (_PROBE, _PROBE[1:]))
    # In 16 bits other kernels alone make a difference.
    tolerance = 1e-2 if _product_dtype(model.get_input_embeddings().weight) == torch.float32 else 1e-1
    if (packed - alone).abs().max() > tolerance * alone.std():
        name = model.config._attn_implementation
        raise ValueError(
            f"Packed rows see each other in {type(model).__name__} with attn_implementation="
            f"{'sdpa' if name == NAME else name!r}: its attention mask does not follow the positions. Set "
            "packing=False and padding_free=False, or load it with attn_implementation='flash_attention_2' (or with "
            "'sdpa', without torch_compile)."
        )


def _last_row_logits(model: Any, rows: list[dict[str, list[int]]]) -> Tensor:
    batch = PackingCollator(pad_token_id=0, padding_free=True)(rows)
    del batch["labels"], batch["row_lengths"]
    device = model.get_input_embeddings().weight.device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return model(**inputs, use_cache=False).logits[0, -len(rows[-1]["input_ids"]) :].float()
