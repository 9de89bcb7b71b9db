"""The chats of a data set, kept beside their tokens while TRL cuts and packs those.

A column holds a text for every token: the chat as JSON at its first token, "" at all others. Whatever is cut or packed
together, a chat stays where it begins.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

from datasets import Dataset
from trl import is_conversational, pack_dataset
from trl.data_utils import get_dataset_column_names, is_conversational_from_value

from cbd_trl.bridge.bridge import Bridge, StudentRows, TeacherRows
from cbd_trl.bridge.chats import Chat, read_chats
from cbd_trl.trainers.bridge_config import BridgeDistillConfig

CHAT = "teacher_chat"


def holds_chats(dataset: Any) -> bool:
    """Whether the rows are messages that TRL is going to render.

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
    """Prepare a data set of chats as TRL does, and keep the chats.

    Args:
        dataset: as given to the trainer.
        args: of the run.
        packing: whether rows are packed.
        prepare: TRL's preparation of a data set by some args, packed or not, which leaves tokens that it finds alone.

    Returns:
        its rows, with the column of chats.
    """
    whole_args = copy(args)
    whole_args.max_length, whole_args.shuffle_dataset = None, False
    options: dict[str, Any] = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    whole = prepare(dataset, whole_args, False).map(_keep_chat, **options)
    if not packing or args.max_length is None:
        return prepare(whole, args, packing)
    # TRL packs no columns but its own.
    rows = whole.select_columns(["input_ids", "labels", CHAT])
    if args.shuffle_dataset:
        rows = rows.shuffle(seed=args.seed)
    rows = pack_dataset(rows, args.max_length, args.packing_strategy, options)
    return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows


def chats_of(examples: Sequence[Mapping[str, Any]], texts: int, flat: bool) -> list[Chat | None]:
    """The chats of a batch.

    Args:
        examples: rows or packs of rows.
        texts: how many texts their batch has.
        flat: whether it is padding-free, where an empty row is no text.

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
