"""From the rows of a dataset to the prompts that a teacher completes."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

from cbd_trl.utils.blocks import prefix_ids
from cbd_trl.utils.datasets import TEMPLATE_COLUMNS, is_of_template, sft_dataset, text_columns


@dataclass(frozen=True)
class Prompt:
    """A prompt, and its columns in the file of completions.

    Attributes:
        columns: of the row in the file: `prompt`, and the other template arguments.
        ids: token ids that the teacher reads, at least one.
    """

    columns: dict[str, Any]
    ids: list[int]

    @property
    def is_text(self) -> bool:
        """Check whether it is plain text rather than a conversation."""
        return isinstance(self.columns["prompt"], str)


class Prompts:
    """The prompts in a dataset: texts or conversations (`prompt`), chats (`messages`, `conversations`), beginnings of
    `text`.

    A text is read as it is, behind the tokens that the tokenizer puts before any text. A conversation is read in the
    chat template; in a chat, a last turn of the assistant is for the teacher to write, and is left out. Empty
    chats are skipped; which columns are read is decided as in training (see `sft_dataset`).

    Args:
        dataset: rows by number, not a stream.
        tokenizer: the teacher's.
        prompt_tokens: how many tokens of a `text` are its prompt, or all where it has fewer; None for other columns.

    Raises:
        ValueError: if there are no rows, none of the columns, or what they need is missing.
    """

    def __init__(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None = None) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ValueError(
                f"The prompts are a {type(dataset).__name__}, a stream: a run that goes on where it was interrupted "
                "needs rows by number. Give a datasets.Dataset, or a list of rows."
            )
        self._rows = sft_dataset(dataset, "dataset", prompts=True)
        self._tokenizer: Any = tokenizer
        self._prompt_tokens = prompt_tokens
        self._prefix = prefix_ids(tokenizer)
        self._column = self._find_column(self._rows[0])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Prompt:
        """Read a row.

        Args:
            number: from 0.

        Raises:
            ValueError: naming it, if it does not hold a prompt.
        """
        row = self._rows[number]
        if self._column == "conversations":
            row = maybe_convert_to_chatml(dict(row))
        value = row["messages" if self._column == "conversations" else self._column]
        if self._column == "text" and isinstance(value, str):
            return self._read_text(self._beginning(value), number)
        if isinstance(value, str) and self._column == "prompt":
            return self._read_text(value, number)
        if isinstance(value, list) and value and self._column != "text":
            return self._read_chat(value, row, number)
        wanted = {"prompt": "a text or a list of messages", "text": "a text"}.get(self._column, "a list of messages")
        raise ValueError(f"Row {number}: {self._column} is {value!r}, and must be {wanted}.")

    def check(self, room: int | None, numbers: Iterable[int]) -> str:
        """Read every prompt before the first is completed.

        Args:
            room: tokens of a prompt that leave the teacher's context room for the completion; None for any number.
            numbers: of all rows, such as a progress bar over them.

        Returns:
            sha256 of all prompts, 64 hexadecimal digits.

        Raises:
            ValueError: if one is not a prompt, or too long.
        """
        digest, too_long = hashlib.sha256(), []
        for number in numbers:
            prompt = self[number]
            digest.update(json.dumps([prompt.columns, prompt.ids], default=str).encode())
            if room is not None and len(prompt.ids) > room:
                too_long.append((number, len(prompt.ids)))
        if too_long:
            number, length = too_long[0]
            raise ValueError(
                f"{len(too_long)} of {len(self)} prompts leave no room in the teacher's context, such as row {number} "
                f"with {length} tokens: with max_new_tokens at most {room} fit. Leave these rows out, or lower "
                "max_new_tokens."
            )
        return digest.hexdigest()

    def _find_column(self, row: Mapping[str, Any]) -> str:
        (column,) = text_columns(row, "dataset", prompts=True)
        if column == "text" and (self._prompt_tokens is None or self._prompt_tokens < 0):
            raise ValueError(
                f"prompt_tokens={self._prompt_tokens} for a dataset of texts: it must be the number of tokens of each "
                "that are the prompt, such as 32; with 0 the teacher begins by itself."
            )
        if column == "text" and not self._tokenizer.is_fast:
            raise ValueError(
                "The teacher's tokenizer does not give the offsets of its tokens (it is not a fast one), so the "
                "first prompt_tokens cannot be found. Give a dataset with `prompt`."
            )
        if column != "text" and self._prompt_tokens is not None:
            raise ValueError(
                f"prompt_tokens={self._prompt_tokens} is for a dataset of `text`, and this one has {column!r}: it "
                "would be ignored. Leave it out."
            )
        return column

    def _beginning(self, text: str) -> str:
        assert self._prompt_tokens is not None
        spans = self._encode(text, return_offsets_mapping=True)["offset_mapping"]
        if len(spans) <= self._prompt_tokens:
            return text
        return text[: spans[self._prompt_tokens - 1][1]] if self._prompt_tokens else ""

    def _read_text(self, text: str, number: int) -> Prompt:
        ids = [*self._prefix, *self._encode(text)["input_ids"]]
        if not ids and self._tokenizer.bos_token_id is None:
            raise ValueError(
                f"Row {number}: the prompt is empty, and the teacher's tokenizer has no BOS token to begin with. Give "
                "prompts of a token at least (prompt_tokens=1 for texts)."
            )
        return Prompt({"prompt": text}, ids or [self._tokenizer.bos_token_id])

    def _read_chat(self, turns: list[Any], row: Mapping[str, Any], number: int) -> Prompt:
        if not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in turns):
            raise ValueError(f"Row {number}: {self._column} holds {turns!r}, and must hold messages with a `role`.")
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"Row {number} is a conversation, and the teacher's tokenizer has no chat template to read it in. "
                "Give a teacher that was trained on chats, or prompts as text."
            )
        # Tables fill missing keys of a message with None, which some templates take for text.
        messages = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        answered = messages[-1]["role"] == "assistant"
        if answered and self._column == "prompt":
            raise ValueError(
                f"Row {number}: the prompt ends with a turn of the assistant, which the teacher is to write. "
                "Leave that turn out, or name the column `messages`, where it is left out."
            )
        messages = messages[:-1] if answered else messages
        if not messages:
            raise ValueError(f"Row {number}: no turn stands before the assistant's. Leave the row out.")
        extras = {name: row[name] for name in TEMPLATE_COLUMNS if row.get(name)}
        return Prompt(
            {"prompt": messages, **extras}, self._encode(self._render(messages, extras, number))["input_ids"]
        )

    def _render(self, messages: list[dict[str, Any]], extras: dict[str, Any], number: int) -> str:
        tools = extras.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"tools": tools, **extras.get("chat_template_kwargs", {})}
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except Exception as error:
            if not is_of_template(error):
                raise
            raise ValueError(f"Row {number}: the teacher's chat template cannot read it ({error}).") from error

    def _encode(self, text: str, **options: Any) -> Any:
        # verbose: no warning of rows longer than the model's context; `check` raises for them.
        return self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, **options)
