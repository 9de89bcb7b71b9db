"""Puts what a teacher with tokens of its own reads beside the student's batch."""

from collections.abc import Callable
from typing import Any

from cbd_trl.bridge.bridge import Bridge, StudentRows, TeacherRows
from cbd_trl.bridge.chats import read_chats
from cbd_trl.trainers.bridge_data import chats_of


class BridgeCollator:
    """A collator that lets a teacher read every text of its batch in its own tokens, on the CPU.

    Padded, padding-free and packed batches are read alike: the teacher's rows are texts. Chats are read in the
    teacher's own template, where it has one.

    Args:
        inner: makes the student's batch, such as TRL's `DataCollatorForLanguageModeling`.
        bridge: between the two tokenizers.
        student_template: the chat template of the data, where that is not the student's tokenizer's own.
    """

    def __init__(
        self,
        inner: Callable[[list[dict[str, Any]]], dict[str, Any]],
        bridge: Bridge,
        student_template: str | None = None,
    ) -> None:
        self.inner = inner
        self.bridge = bridge
        self.student_template = student_template

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: rows of the data set, or packs of rows.

        Returns:
            the inner batch; `teacher_ids`, `teacher_mask` and `teacher_group` (R, U): what the teacher reads, and the
            group of each of its tokens; `teacher_students_group` and `teacher_students_text` (B, T): the group and
            the text of each of the student's tokens. All int64.

        Raises:
            ValueError: if the batch has ids that the student's tokenizer does not.
        """
        batch = self.inner(examples)
        rows, read = self._read(examples, batch)
        own = {"ids": read.ids_RU, "mask": read.mask_RU, "group": read.alignment.teacher_RU}
        own |= {"students_group": read.alignment.student_BT, "students_text": rows.text_BT.contiguous()}
        return {**batch, **{f"teacher_{name}": tensor for name, tensor in own.items()}}

    def read(self, examples: list[dict[str, Any]]) -> TeacherRows:
        """What the teacher reads of some examples.

        Args:
            examples: as for a batch.
        """
        return self._read(examples, self.inner(examples))[1]

    def _read(self, examples: list[dict[str, Any]], batch: dict[str, Any]) -> tuple[StudentRows, TeacherRows]:
        masks = batch.get("attention_mask"), batch.get("position_ids")
        rows = StudentRows.of(batch["input_ids"], batch["labels"], *masks)
        if not self.bridge.teacher.tokenizer.chat_template:
            return rows, self.bridge.read(rows)
        chats = chats_of(examples, rows.texts, flat=masks[1] is not None)
        if not any(chats):
            return rows, self.bridge.read(rows)
        return rows, read_chats(self.bridge, rows, chats, self.student_template)
