"""What a batch holds beside the inputs of the models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


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


def split_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """Separate what the models read from what the loss reads.

    Args:
        inputs: a collated batch.

    Returns:
        inputs of both models (without a cache, which would only cost memory), labels (B, T), row lengths (R,) or None.
    """
    inputs = dict(inputs)
    labels, row_lengths = inputs.pop("labels"), inputs.pop("row_lengths", None)
    return {**inputs, "use_cache": False}, labels, row_lengths


def count_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """How many tokens of a batch are not padding.

    Args:
        inputs: input_ids (B, T), and attention_mask (B, T) unless the batch is padding-free.

    Returns:
        scalar, int64.
    """
    if (mask := inputs.get("attention_mask")) is not None:
        return mask.sum()
    return torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
