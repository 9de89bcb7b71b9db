"""Packed and padding-free rows: SDPA row by row, whether a model keeps the rows apart, and their lengths in a batch.

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
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cbd_trl.utils.modeling import in_eval_mode

NAME = "sdpa_by_row"
# Two rows that a model is run on packed, and apart.
_PROBE = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7, 8]}]


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
        attention_mask: (1, 1, T, T), or None where it is plainly causal; each row is attended under its own block of
            it.
        args: as transformers passes them.
        cu_seq_lens_q: where the rows begin and the last one ends, (rows + 1,); None for a batch that is not packed.
        kwargs: as transformers passes them.

    Returns:
        (1, T, heads, head dim), and None for the attention weights.
    """
    if cu_seq_lens_q is None or len(cu_seq_lens_q) < 3:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    bounds, outputs = cu_seq_lens_q.tolist(), []
    # Split, not sliced: the gradient of every slice would be as long as the whole pack.
    lengths = [end - start for start, end in pairwise(bounds)]
    queries, keys, values = (states.split(lengths, 2) for states in (query, key, value))
    for (start, end), q, k, v in zip(pairwise(bounds), queries, keys, values, strict=True):
        mask = _block(attention_mask, slice(start, end))
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, *args, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _block(mask: Tensor | None, row: slice) -> Tensor | None:
    if mask is None:
        return None
    block = mask[..., row, row]
    if block.dtype == torch.bool and torch.equal(block, torch.ones_like(block).tril_()):
        return None  # plainly causal, which SDPA does faster without a mask
    return block


AttentionInterface.register(NAME, attend_by_row)
AttentionMaskInterface.register(NAME, sdpa_mask)


class RowLengthsCollator(DataCollatorForLanguageModeling):
    """TRL's collator for padding-free batches, which adds how many tokens each dataset row has.

    Evaluation needs them to leave out the rows that fill up the last batch of several processes.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: dataset rows.

        Returns:
            TRL's batch and `row_lengths`, (R,) tokens.
        """
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return {**super().torch_call(examples), "row_lengths": lengths}


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
    tolerance = 1e-2 if model.dtype == torch.float32 else 1e-1
    if (packed - alone).abs().max() > tolerance * alone.std():
        raise ValueError(
            f"Packed rows see each other in {type(model).__name__} with attn_implementation="
            f"{model.config._attn_implementation!r}: its attention mask does not follow the positions. Set "
            "packing=False and padding_free=False, or load it with attn_implementation='flash_attention_2' (on a CPU: "
            "'sdpa')."
        )


def _last_row_logits(model: Any, rows: list[dict[str, list[int]]]) -> Tensor:
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    del batch["labels"]
    device = model.get_input_embeddings().weight.device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return model(**inputs, use_cache=False).logits[0, -len(rows[-1]["input_ids"]) :].float()
