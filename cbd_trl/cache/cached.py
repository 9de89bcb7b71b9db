"""A teacher that was asked beforehand: what it said is read from a cache, and nothing is loaded."""

from collections.abc import Sequence

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from cbd_trl.cache import TeacherCache
from cbd_trl.losses.reduction import select_scored
from cbd_trl.losses.teacher_outputs import HiddenSignal, SampledSignal, Signal, TopKSignal
from cbd_trl.teachers.batch import Batch


class CachedTeacher:
    """The answers of a teacher, which the data collator put into the batch.

    Args:
        cache: where they come from.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self._head = cache.head() if cache.manifest.settings.kind == "hidden" else None

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """None."""
        return []

    def place(self, accelerator: Accelerator, offload: bool = False) -> None:
        """Only the head of cached hidden states has a place."""
        if self._head is not None:
            self._head = self._head.to(accelerator.device)

    def says(self, batch: Batch, student: nn.Module) -> Signal:
        """See `LocalTeacher.says`."""
        said = {name: select_scored(values, batch.labels_BT) for name, values in batch.teacher.items()}
        if self._head is not None:
            return HiddenSignal(said["teacher_hidden"].to(self._head.weight_VD.dtype), self._head)
        entries = said["teacher_indices"], said["teacher_log_probs"]
        if self.cache.manifest.settings.kind == "sampled":
            return SampledSignal(*entries, said["teacher_target"])
        return TopKSignal(*entries, said["teacher_tail"], said["teacher_target"])
