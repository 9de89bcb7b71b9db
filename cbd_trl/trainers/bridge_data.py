"""What a teacher with tokens of its own reads of a dataset: the texts of a batch, and chats in its own template.

Chats are kept beside their tokens while TRL cuts and packs those: a column holds a text for every token, the chat as
JSON at its first token, "" at all others. Whatever is cut or packed together, a chat stays where it begins.

Shapes: B batch rows, T tokens of the student, R texts, U tokens of the teacher.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import is_conversational
from trl.data_utils import get_dataset_column_names, is_conversational_from_value

from cbd_trl.bridge.bridge import Bridge, StudentRows, TeacherRows
from cbd_trl.bridge.chats import Chat, read_chats
from cbd_trl.bridge.objectives.inputs import Places, Vectors
from cbd_trl.bridge.objectives.prefix import PrefixPlan, PrefixTable
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.utils.teacher_rows import prepare_beside
from cbd_trl.utils.tokenizers import tokenizer_name

CHAT = "teacher_chat"
# Rows that are read before a dataset counts as one that has nothing in common with the teacher's tokens.
_PROBED_ROWS = 1000
_ROWS_AT_A_TIME = 8


def holds_chats(dataset: Any) -> bool:
    """Tell whether the rows are messages that TRL is going to render.

    Args:
        dataset: as given to the trainer.
    """
    if "input_ids" in get_dataset_column_names(dataset):
        return False
    first: dict[str, Any] = next(iter(dataset))
    return is_conversational(first) or is_conversational_from_value(first)


def prepare_chats(
    dataset: Any, args: BridgeDistillConfig, packing: bool, prepare: Callable[[Any, Any, bool], Any]
) -> Any:
    """Prepare a dataset of chats as TRL does, and keep the chats.

    Args:
        dataset: as given to the trainer.
        args: of the run.
        packing: whether rows are packed.
        prepare: TRL's preparation of a dataset by some args, packed or not, which leaves tokens that it finds alone.

    Returns:
        its rows, with the column of chats.
    """
    options: dict[str, Any] = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    return prepare_beside(dataset, args, packing, prepare, lambda whole: whole.map(_keep_chat, **options), [CHAT])


@dataclass(frozen=True)
class BridgePlan:
    """Which positions of both models are compared in a batch, made with it on the host.

    Attributes:
        student: the scored positions of the student.
        teacher: the positions of the teacher before tokens of groups.
        last: the last token of each group in the flattened batch, (G,): "student" and "teacher".
        prefix: what the objective "prefix" needs besides; None for others.
    """

    student: Places
    teacher: Places
    last: Vectors
    prefix: PrefixPlan | None

    @classmethod
    def of(cls, rows: StudentRows, labels_BT: Tensor, read: TeacherRows, table: PrefixTable | None) -> "BridgePlan":
        """Make the plan of a batch.

        Args:
            rows: of the student.
            labels_BT: -100 where a token is not scored, not shifted.
            read: what the teacher reads.
            table: of the objective "prefix"; None for others.
        """
        student = Places.of_student(labels_BT, read.alignment.student_BT, rows.text_BT)
        teacher = Places.of_teacher(read.alignment.teacher_RU)
        ours_G, theirs_G = read.alignment.last_tokens()
        targets_N = student.scored.select_next(rows.ids_BT)
        prefix = None if table is None else PrefixPlan.of(table, student, teacher, targets_N)
        return cls(student, teacher, Vectors.of(student=ours_G, teacher=theirs_G), prefix)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "BridgePlan":
        """Move it to a device, as a tensor; so does accelerate with what is in a batch."""
        prefix = None if self.prefix is None else self.prefix.to(device, non_blocking)
        student, teacher = self.student.to(device, non_blocking), self.teacher.to(device, non_blocking)
        return BridgePlan(student, teacher, self.last.to(device, non_blocking), prefix)

    def pin_memory(self) -> "BridgePlan":
        """Pin it, as a tensor; so does torch's DataLoader with what is in a batch."""
        prefix = None if self.prefix is None else self.prefix.pin_memory()
        return BridgePlan(self.student.pin_memory(), self.teacher.pin_memory(), self.last.pin_memory(), prefix)


class BridgeCollator:
    """A collator that lets a teacher read every text of its batch in its own tokens, on the CPU.

    Padded, padding-free and packed batches are read in the same way: the teacher's rows are texts. Chats are read in
    the teacher's own template, where it has one.

    Args:
        inner: makes the student's batch, such as TRL's `DataCollatorForLanguageModeling`.
        bridge: between the two tokenizers.
        student_template: the chat template of the data, where that is not the student's tokenizer's own.
        table: of the objective "prefix", on the host; None for others.
    """

    def __init__(
        self,
        inner: Callable[[list[dict[str, Any]]], dict[str, Any]],
        bridge: Bridge,
        student_template: str | None = None,
        table: PrefixTable | None = None,
    ) -> None:
        self.inner = inner
        self.bridge = bridge
        self.student_template = student_template
        self.table = table

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: rows of the dataset, or packs of rows.

        Returns:
            the inner batch; `teacher_ids` and `teacher_mask` (R, U) int64, what the teacher reads; and `teacher_plan`,
            a `BridgePlan`.

        Raises:
            ValueError: if the batch has ids that the student's tokenizer does not.
        """
        batch = self.inner(examples)
        rows, read = self._read(examples, batch)
        plan = BridgePlan.of(rows, batch["labels"], read, self.table)
        return {**batch, "teacher_ids": read.ids_RU, "teacher_mask": read.mask_RU, "teacher_plan": plan}

    def read(self, examples: list[dict[str, Any]]) -> TeacherRows:
        """Compute what the teacher reads of some examples.

        Args:
            examples: as for a batch.
        """
        return self._read(examples, self.inner(examples))[1]

    def _read(self, examples: list[dict[str, Any]], batch: dict[str, Any]) -> tuple[StudentRows, TeacherRows]:
        masks = batch.get("attention_mask"), batch.get("position_ids")
        rows = StudentRows.of(batch["input_ids"], batch["labels"], *masks)
        if not self.bridge.teacher.tokenizer.chat_template:
            return rows, self.bridge.read(rows)
        chats = _chats_of(examples, rows.texts, flat=masks[1] is not None)
        if not any(chats):
            return rows, self.bridge.read(rows)
        return rows, read_chats(self.bridge, rows, chats, self.student_template)


def check_datasets(collator: BridgeCollator, datasets: Iterable[Any]) -> None:
    """Check that the teacher has tokens in common with the first rows of each dataset.

    Args:
        collator: of the trainer.
        datasets: prepared ones; streams are read as they come.

    Raises:
        ValueError: if no scored token of the first rows is in a group.
    """
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            continue
        scored, rows = 0, min(len(dataset), _PROBED_ROWS)
        for start in range(0, rows, _ROWS_AT_A_TIME):
            read = collator.read([dataset[i] for i in range(start, min(start + _ROWS_AT_A_TIME, rows))])
            scored += read.scored
            if read.unaligned < read.scored:
                break
        else:
            if not scored:
                raise ValueError(
                    f"No token of {rows} rows is scored: they are empty, or of one token, or masked. There is nothing "
                    "to learn from; give other rows."
                )
            bridge = collator.bridge
            names = (tokenizer_name(side.tokenizer) for side in (bridge.student, bridge.teacher))
            raise ValueError(
                f"Of {scored} scored tokens in {rows} rows the teacher has no counterpart to any: the two tokenizers "
                f"({' and '.join(names)}) never stand for the same bytes there. A tokenizer that changes its text "
                "(lower case, say) is the usual cause: choose another teacher, or other rows."
            )


def _chats_of(examples: Sequence[Mapping[str, Any]], texts: int, flat: bool) -> list[Chat | None]:
    """Find the chats of a batch.

    Args:
        examples: rows or packs of rows.
        texts: how many texts their batch has.
        flat: whether it is padding-free, where an empty row does not count as a text.

    Returns:
        for each text the chat that it is or begins; None where there is none, more than one, or one that is cut off in
        front.
    """
    chats: list[Chat | None] = []
    if not any(CHAT in example for example in examples):
        return [None] * texts  # rows as a collator of the user's reads them have no tokens here either
    for example in examples:
        kept, start = example.get(CHAT) or [], 0
        for length in example.get("seq_lengths") or [len(example["input_ids"])]:
            begun = [place for place, text in enumerate(kept[start : start + length]) if text]
            if length or not flat:
                chats.append(_read_chat(kept[start]) if begun == [0] else None)
            start += length
    # What fills up a padding-free batch counts as texts.
    return chats + [None] * (texts - len(chats))


def _keep_chat(example: Mapping[str, Any]) -> dict[str, list[str]]:
    messages = example["prompt"] + example["completion"] if "prompt" in example else example["messages"]
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    text = json.dumps([messages, {"tools": tools, **(example.get("chat_template_kwargs") or {})}], default=str)
    tokens = len(example["input_ids"])
    return {CHAT: [text, *[""] * tokens][:tokens]}


def _read_chat(text: str) -> Chat:
    return Chat(*json.loads(text))
