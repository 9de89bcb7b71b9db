"""A batch, as the teachers and the loss read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The collator of a cached teacher puts what it read under names that begin so.
TEACHER_PREFIX = "teacher_"


@dataclass(frozen=True)
class Batch:
    """A collated batch, by who reads what.

    Attributes:
        inputs: of both models.
        labels_BT: token ids, -100 where the token is not scored.
        row_lengths_R: tokens of each dataset row of a padding-free batch, or None.
        teacher: what a cached teacher says, aligned with the positions; empty without one.
    """

    inputs: dict[str, Any]
    labels_BT: Tensor
    row_lengths_R: Tensor | None
    teacher: dict[str, Tensor]

    @classmethod
    def split(cls, collated: Mapping[str, Any]) -> "Batch":
        """Separate what the models read from what the loss reads.

        Args:
            collated: by the data collator.
        """
        inputs = dict(collated)
        labels_BT, row_lengths_R = inputs.pop("labels"), inputs.pop("row_lengths", None)
        teacher = {name: inputs.pop(name) for name in list(inputs) if name.startswith(TEACHER_PREFIX)}
        # A cache would only cost memory.
        return cls({**inputs, "use_cache": False}, labels_BT, row_lengths_R, teacher)

    def count_tokens(self) -> Tensor:
        """How many tokens are not padding, scalar int64."""
        if self.row_lengths_R is not None:
            return self.row_lengths_R.sum()
        if (mask := self.inputs.get("attention_mask")) is not None:
            return mask.sum()
        ids = self.inputs["input_ids"]
        return torch.tensor(ids.numel(), device=ids.device)
