"""Files of completions: of anybody, read as a dataset that TRL trains on; and of `generate_completions`, resumable."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from cbd_trl.utils.datasets import TEMPLATE_COLUMNS
from cbd_trl.utils.files import write_text

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
# Recorded for people, not compared: the same weights may have two names, and their fingerprint is compared.
_FOR_PEOPLE = ("teacher",)
_SHAPES = (
    'Lines are {"messages": [...]}, {"prompt": ..., "completion": ...}, results of the batch interface, or responses '
    'with "choices".'
)
# Characters of a failed response in a message.
_SHOWN = 200


class _Failed(Exception):
    """A response without a completion."""


def read_completions(path: str | Path, *, requests: str | Path | None = None, drop_truncated: bool = False) -> Dataset:
    """Read completions for SeqKD from a JSON-lines file, whoever wrote them.

    A line is one of

    - `{"messages": [...]}`, the shape of fine-tuning files;
    - `{"prompt": ..., "completion": ...}`, texts or lists of messages, as `generate_completions` writes them;
    - `{"custom_id": ..., "response": {"status_code": 200, "body": {"choices": [...]}}}`, a result of the batch
      interface, whose prompt is in the file of `requests`;
    - a response by itself, `{"choices": [{"message": ...} or {"text": ...}]}`, with `prompt` or `messages` beside, or
      with a `custom_id` (or `id`) that `requests` has.

    `tools` and `chat_template_kwargs` of a line, or of the body of its request, are kept, since training hands them to
    the chat template. Several choices become several rows. Responses that failed are left out, and their number is
    logged.

    Args:
        path: of the file.
        requests: of the batch interface's input, `{"custom_id": ..., "body": {"messages" or "prompt": ...}}` a line.
        drop_truncated: leave out completions that were cut off (`finish_reason` "length"). TRL trains the student to
            end where a row ends, wherever that is.

    Returns:
        rows of `messages`, or of `prompt` and `completion`, with `finish_reason`, `tools` (as JSON) and
        `chat_template_kwargs` where the file has any.

    Raises:
        ValueError: for a file that is missing or gives no row, and for a line that is not of these shapes, with its
            number.
    """
    prompts = None if requests is None else _read_requests(Path(requests))
    rows, failures = _gather(Path(path), prompts)
    cut_off = sum(row["finish_reason"] == "length" for row in rows)
    if drop_truncated:
        rows = [row for row in rows if row["finish_reason"] != "length"]
    if not rows:
        raise ValueError(
            f"{path} gives no row: {len(failures)} responses failed, and {cut_off} completions were cut off and left "
            f"out. {failures[0] if failures else _SHAPES}"
        )
    if failures:
        logger.warning(f"{path}: {len(failures)} failed responses are left out, such as {failures[0]}")
    if cut_off:
        what = "left out" if drop_truncated else "kept; drop_truncated=True leaves them out"
        logger.info(f"{path}: {cut_off} completions were cut off; they are {what}.")
    filled = {name: any(row[name] for row in rows) for name in ("finish_reason", *TEMPLATE_COLUMNS)}
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0] if filled.get(name, True)})


class CompletionsFile:
    """A JSON-lines file of completions; `FILE.settings` beside it records how its rows are made.

    Args:
        path: of the file, which need not exist.
        settings: of every row: numbers, strings and None.
        batch_size: rows that are written together.

    Attributes:
        rows: in whole batches, so far.

    Raises:
        ValueError: if the file was not written by this class, was made in another way, or is damaged.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], batch_size: int) -> None:
        self.path = Path(path)
        self._settings = {"format_version": FORMAT_VERSION, **settings}
        self._batch_size = batch_size
        self._record = self.path.with_name(f"{self.path.name}.settings")
        self.rows, self._size = self._resume()

    def begin(self) -> None:
        """Cut off what is left of a batch that was interrupted. Of several processes one does this, and appends."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._record, json.dumps(self._settings, indent=1) + "\n")
        with self.path.open("ab") as file:
            file.truncate(self._size)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, which are on the disk when this returns.

        Args:
            rows: of whole batches, the last of the file excepted.
        """
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += len(rows)

    def _resume(self) -> tuple[int, int]:
        """Find the rows and bytes that stay."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            # A run that failed before its first row does not fix the settings.
            return 0, 0
        if not self._record.is_file():
            raise ValueError(
                f"{self.path} exists, and {self._record.name} beside it does not: it was not generated here, or that "
                "file was moved. Nothing is added to it. Give another output_file."
            )
        self._check_settings()
        ends = self._line_ends()
        total: int = self._settings["rows"]
        if len(ends) > total:
            raise ValueError(
                f"{self.path} has {len(ends)} rows, and {total} are generated: the file was changed. Delete it to "
                "generate it anew, or give another output_file."
            )
        rows = total if len(ends) == total else len(ends) // self._batch_size * self._batch_size
        return rows, ends[rows - 1] if rows else 0

    def _check_settings(self) -> None:
        found = self._read_record()
        names = {*found, *self._settings} - {*_FOR_PEOPLE}
        differing = [
            f"{name} is {found.get(name)!r}, requested {self._settings.get(name)!r}"
            for name in sorted(names)
            if found.get(name) != self._settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.path} was generated in another way: {'; '.join(differing)}. All rows of a file are made "
                f"in one way (these by {found.get('teacher') or 'a model made in memory'}). Give another "
                "output_file, or the settings it was made with."
            )

    def _read_record(self) -> dict[str, Any]:
        try:
            found = json.loads(self._record.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"it holds a {type(found).__name__}")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._record} cannot be read ({error}), so how the rows of {self.path} were made is not known. "
                "Give another output_file."
            ) from error
        return found

    def _line_ends(self) -> list[int]:
        """Find where each whole line ends, in bytes."""
        ends: list[int] = []
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{self.path}, line {len(ends) + 1} is not JSON ({error}): the file was changed or damaged. "
                        "Delete it to generate it anew, or give another output_file."
                    ) from error
                ends.append((ends[-1] if ends else 0) + len(line))
        return ends


def _gather(path: Path, prompts: Mapping[str, Any] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Read rows of one kind, and the reasons why others are missing."""
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for number, line in _lines(path):
        try:
            found = _rows(line, prompts)
        except _Failed as failure:
            failures.append(f"line {number}: {failure}")
            continue
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows += found
        if _kind(found[0]) != _kind(rows[0]):
            raise ValueError(
                f"{path}, line {number} has {_kind(found[0])}, and the first row {_kind(rows[0])}: all rows of a "
                "dataset are of one kind. Split the file."
            )
    return rows, failures


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a file, by line number."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give a JSON-lines file of completions. {_SHAPES}")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}). {_SHAPES}") from error
            if not isinstance(value, dict):
                raise ValueError(
                    f"{path}, line {number} holds a {type(value).__name__}, and must hold an object. {_SHAPES}"
                )
            yield number, value


def _read_requests(path: Path) -> dict[str, dict[str, Any]]:
    """Read the prompt of each request and the template arguments beside it, by its id."""
    prompts: dict[str, dict[str, Any]] = {}
    for number, line in _lines(path):
        try:
            name = line.get("custom_id")
            if not isinstance(name, str) or name in prompts:
                raise ValueError(f"custom_id is {name!r}, and must be a text that no other line has.")
            prompts[name] = _prompt(line.get("body"))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return prompts


def _rows(line: Mapping[str, Any], prompts: Mapping[str, dict[str, Any]] | None) -> list[dict[str, Any]]:
    if "response" in line or "choices" in line or line.get("error"):
        choices = _choices(line)
        prompt = _prompt(line) if {"prompt", "messages"} & line.keys() else _requested_prompt(line, prompts)
        return [_answered(prompt, choice) for choice in choices]
    reason = {"finish_reason": line.get("finish_reason"), **_template_arguments(line)}
    if "messages" in line:
        return [{"messages": _messages(line["messages"]), **reason}]
    if {"prompt", "completion"} <= line.keys():
        prompt, completion = (_text_or_messages(line[name], name) for name in ("prompt", "completion"))
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(
                "one of prompt and completion is a text and the other a conversation: both must be of one kind."
            )
        return [{"prompt": prompt, "completion": completion, **reason}]
    raise ValueError(f"it has the keys {sorted(line)}. {_SHAPES}")


def _choices(line: Mapping[str, Any]) -> list[Any]:
    """Find the choices of a response."""
    response = line["response"] or {} if "response" in line else {"body": line}
    body = response.get("body") if isinstance(response, dict) else None
    if line.get("error") or not isinstance(body, dict) or response.get("status_code", 200) != 200:
        raise _Failed(json.dumps(line.get("error") or body or response)[:_SHOWN])
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise _Failed(f"no choices in {json.dumps(body)[:_SHOWN]}")
    return choices


def _requested_prompt(line: Mapping[str, Any], prompts: Mapping[str, dict[str, Any]] | None) -> dict[str, Any]:
    name = line.get("custom_id", line.get("id"))
    if prompts is None:
        raise ValueError(
            f"a response (custom_id {name!r}) without its prompt: pass the file of its requests as `requests`, or "
            "put `messages` or `prompt` beside `choices`."
        )
    if name not in prompts:
        raise ValueError(f"no line of `requests` has its custom_id {name!r}: the two files are of different runs.")
    return prompts[name]


def _answered(request: Mapping[str, Any], choice: Any) -> dict[str, Any]:
    prompt = request["prompt"]
    if not isinstance(choice, dict):
        raise ValueError(f"a choice is {choice!r}, and must be an object.")
    reason = {"finish_reason": choice.get("finish_reason")}
    message = choice.get("message")
    text = choice.get("text") if message is None else message.get("content")
    if not isinstance(text, str):
        raise _Failed(f"no text, but {json.dumps(choice)[:_SHOWN]}")
    if (message is None) != isinstance(prompt, str):
        raise ValueError("one of prompt and answer is a text and the other a conversation: both must be of one kind.")
    answer: Any = text if message is None else [{"role": "assistant", "content": text}]
    return {**request, "completion": answer, **reason}


def _prompt(body: Any) -> dict[str, Any]:
    """Read the prompt of a request, and the template arguments beside it."""
    if isinstance(body, dict) and "messages" in body:
        return {"prompt": _messages(body["messages"]), **_template_arguments(body)}
    if isinstance(body, dict) and "prompt" in body:
        return {"prompt": _text_or_messages(body["prompt"], "prompt"), **_template_arguments(body)}
    raise ValueError("the request has neither `messages` nor `prompt`.")


def _template_arguments(body: Mapping[str, Any]) -> dict[str, Any]:
    """Read the template arguments, tools as JSON: a table would give every tool the fields of all others."""
    tools = body.get("tools")
    text = tools if isinstance(tools, str) or not tools else json.dumps(tools)
    return {"tools": text or None, "chat_template_kwargs": body.get("chat_template_kwargs") or {}}


def _text_or_messages(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value
    return _messages(value, name)


def _messages(value: Any, name: str = "messages") -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {value!r}, and must be messages.")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message is {message!r}, and must have a `role`.")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"a message's content is {content!r}, and must be text: images and tool calls are not read.")
    return {"role": message["role"], "content": content}


def _kind(row: Mapping[str, Any]) -> str:
    """Name the kind of a row, of which a dataset holds one."""
    if "messages" in row:
        return "messages"
    return "a prompt as text" if isinstance(row["prompt"], str) else "a conversation as prompt"
