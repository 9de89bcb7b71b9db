"""Puts a cached teacher's predictions beside the tokens of a batch.

Shapes: B batch rows, T tokens, K kept entries of a position, D teacher width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cbd_trl.cache.reader import TeacherCache
from cbd_trl.utils.datasets import example_rows


class RowLengthsCollator(DataCollatorForLanguageModeling):
    """TRL's collator for padding-free batches, which also says how many tokens each dataset row has.

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


class CachedTeacherCollator:
    """A collator that looks every row of its batch up in a teacher cache.

    Padded, padding-free and packed batches are aligned alike: what the teacher says at a position stands where the
    student says it, and the tokens are compared once more.

    Args:
        inner: makes the batch, such as TRL's `DataCollatorForLanguageModeling`.
        cache: of the teacher.
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Any]], cache: TeacherCache) -> None:
        self.inner = inner
        self.cache = cache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: rows of the data set, or packs of rows with their `seq_lengths`.

        Returns:
            the inner batch, and at position t what was predicted of token t + 1, 0 where nothing was:
            `teacher_target` (B, T) float32; and of top_k and sampled `teacher_indices` (B, T, K) int32 and
            `teacher_log_probs` (B, T, K) float32, of top_k `teacher_tail` (B, T) float32, of hidden `teacher_hidden`
            (B, T, D).

        Raises:
            ValueError: if a row is not in the cache, or does not lie in the batch where it should.
        """
        batch = self.inner(examples)
        batch.update(self._teacher(examples, batch))
        return batch

    def _teacher(self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        ids_BT = batch["input_ids"]
        flat = "attention_mask" not in batch
        tensors = _empty(self.cache, *ids_BT.shape)
        start = 0
        for number, example in enumerate(examples):
            line = 0 if flat else number
            start = start if flat else 0
            for row in example_rows(example if "input_ids" in example else _collated(batch, number)):
                place = ids_BT[line, start : start + len(row)]
                if not torch.equal(place, torch.from_numpy(row).to(place.dtype)):
                    raise ValueError(
                        f"{type(self.inner).__name__} did not put a row of {len(row)} tokens at token {start} of "
                        f"batch row {line}: the teacher's predictions would stand at other tokens. Use TRL's "
                        "collator, which pads on the right."
                    )
                found = self.cache.lookup(row)
                for name, tensor in tensors.items():
                    tensor[line, start : start + len(row) - 1] = getattr(found, name.removeprefix("teacher_"))
                start += len(row)
        return tensors


def _collated(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A row whose tokens the collator made."""
    ids_T = batch["input_ids"][number]
    return {"input_ids": ids_T[batch["attention_mask"][number].bool()] if "attention_mask" in batch else ids_T}


def _empty(cache: TeacherCache, batch: int, length: int) -> dict[str, Tensor]:
    settings = cache.settings
    tensors = {"teacher_target": torch.zeros(batch, length)}
    if settings.kind == "hidden":
        assert settings.hidden_size is not None and settings.hidden_dtype is not None
        hidden = torch.zeros(batch, length, settings.hidden_size, dtype=getattr(torch, settings.hidden_dtype))
        return tensors | {"teacher_hidden": hidden}
    assert settings.k is not None
    tensors["teacher_indices"] = torch.zeros(batch, length, settings.k, dtype=torch.int32)
    tensors["teacher_log_probs"] = torch.zeros(batch, length, settings.k)
    return tensors | ({"teacher_tail": torch.zeros(batch, length)} if settings.kind == "top_k" else {})
