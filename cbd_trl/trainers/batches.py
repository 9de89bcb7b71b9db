"""Collating: what a batch holds beside the inputs of the models."""

from typing import Any

import torch
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
