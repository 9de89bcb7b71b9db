"""Read datasets as `trl.SFTTrainer` does: check their rows, and turn them into tokens by its own preparation.

Every place that reads rows comes here, so that calibration, caches, generation and measurement see the tokens of
training.
"""

import copy
import dataclasses
import json
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from gzip import BadGzipFile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from jinja2 import TemplateError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer, is_conversational
from trl.chat_template_utils import clone_chat_template, get_training_chat_template, has_generation_markers

from cbd_trl.utils.tokenizers import check_token

logger = logging.get_logger(__name__)

# Columns that hold a row's text. TRL decides by whichever it meets first whether a row is a chat, so
# those that are not read are dropped.
_TEXTS = ("prompt", "completion", "messages", "conversations", "chosen", "rejected")
# What TRL hands to the chat template beside a chat.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# What a teacher reads in the place of `prompt` and of `messages` (see `teacher_rows`).
TEACHER_COLUMNS = ("teacher_prompt", "teacher_messages")
# What it reads beside the tokens of a row that has them.
_BESIDE_TOKENS = ("labels", "completion_mask", "assistant_masks", "seq_lengths", "position_ids")
_SCANNED_ROWS = 10_000
_FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_rows(name: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """Load a dataset from a local file or from the Hub.

    Args:
        name: a .jsonl, .json, .csv, .parquet or .txt file (each also with .gz behind), or what `datasets.load_dataset`
            takes. A text file gives one row per line that is not blank.
        config: configuration of a dataset on the Hub.
        split: of a dataset on the Hub, or a slice of one, such as `train[:90%]`. A file has one split, which is all of
            it, and slices of that: `train[90%:]`.
        streaming: read while training.

    Raises:
        ValueError: for a local file of another kind, one that is not there, or one whose content cannot be read.
    """
    from datasets import load_dataset

    path = Path(name)
    if not path.exists() and path.suffix.lower() in (*_FILE_KINDS, ".gz"):
        raise ValueError(f"There is no file {name}. Give a file that exists, or the Hub id of a dataset.")
    if not path.is_file():
        with _explained_rows(name):
            return load_dataset(name, name=config, split=split, streaming=streaming)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    kind = _FILE_KINDS.get(suffix.lower())
    if kind is None:
        raise ValueError(
            f"{name} is not a dataset file that can be read: its name must end in {', '.join(_FILE_KINDS)}."
        )
    own = split if split.startswith("train[") else "train"
    with _explained_rows(name):
        rows = load_dataset(kind, data_files=str(path), split=own, streaming=streaming)
    return rows.filter(lambda row: bool(row["text"].strip())) if kind == "text" else rows


def sft_dataset(
    dataset: Any, name: str, args: SFTConfig | None = None, prompts: bool = False, formatted: bool = False
) -> Any:
    """Check that SFTTrainer can read a dataset, and return it in a form that SFTTrainer takes.

    A list of rows becomes a `Dataset`; a `prompt` beside `messages` is left out, as other columns that would be taken
    for the text; rows whose chat is empty are skipped, and counted in a warning. Of a stream the first row is looked
    at, and every other one when it is met.

    Args:
        dataset: a `datasets.Dataset`, an `IterableDataset`, or rows (mappings).
        name: of the argument, for messages.
        args: of the training; None for text that nothing is trained on.
        prompts: whether rows need no more than a `prompt`.
        formatted: whether a function of the user's brings rows into a format later: their columns are not looked at.

    Returns:
        a `Dataset` or an `IterableDataset`.

    Raises:
        TypeError: it is something else.
        ValueError: it holds splits or no rows, has none of the columns of the SFT formats, or a row of it has no text
            (the message has its number).
    """
    dataset = _one_dataset(dataset, name)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The dataset given as {name} is empty: it has no rows. Give one with rows.")
    # Rows that a collator or a transform of the user's reads are theirs.
    if formatted or is_prepared(args) or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        return dataset
    dataset = _by_row(dataset)
    first = next(iter(dataset))
    field = "text" if args is None else args.dataset_text_field
    columns = text_columns(first, name, field, prompts)
    others = [other for other in _TEXTS if other in first and other not in columns and other != field]
    if others and columns[0] != "input_ids":
        dataset = dataset.remove_columns(others)
    chats = isinstance(first[columns[0]], list)
    if isinstance(dataset, Dataset):
        kept = _rows_with_text(dataset, columns, name)
    else:
        beside = [column for column in TEACHER_COLUMNS if column in first]
        options = {"columns": columns, "beside": beside, "chats": chats, "name": name}
        kept = dataset.filter(_has_text, with_indices=True, fn_kwargs=options)
    first = next(iter(kept), None)
    if first is None:
        raise ValueError(f"The dataset given as {name} holds nothing but empty chats. Give one with text.")
    # The values of a column of a `Dataset` are of one type.
    _check_row(first, columns, chats, name)
    return kept


def sft_datasets(datasets: Any, name: str, args: SFTConfig | None = None, formatted: bool = False) -> Any:
    """Apply `sft_dataset` to each dataset to evaluate on.

    Args:
        datasets: one, a dict of them, None, or the name of a dataset that the trainer knows.
        name: of the argument, for messages.
        args: of the training.
        formatted: see `sft_dataset`.
    """
    if datasets is None or isinstance(datasets, str):
        return datasets
    if isinstance(datasets, dict):
        return {key: sft_dataset(one, f"{name}[{key!r}]", args, formatted=formatted) for key, one in datasets.items()}
    return sft_dataset(datasets, name, args, formatted=formatted)


def text_columns(row: Mapping[str, Any], name: str, field: str = "text", prompts: bool = False) -> tuple[str, ...]:
    """Find the columns from which SFTTrainer makes the tokens of a row.

    Args:
        row: the first of a dataset.
        name: of the dataset, for messages.
        field: the column of plain text.
        prompts: whether a `prompt` is enough.

    Raises:
        ValueError: it has none of them.
    """
    if "input_ids" in row and not prompts:
        return ("input_ids",)
    if {"prompt", "completion"} <= row.keys():
        return ("prompt",) if prompts else ("prompt", "completion")
    for column in ("conversations", "messages"):
        # Where there is text beside it, only a list is a chat.
        if column in row and (isinstance(row[column], list) or field not in row):
            return (column,)
    if prompts and "prompt" in row:
        return ("prompt",)
    if field in row:
        return (field,)
    if prompts:
        raise ValueError(
            f"A row of {name} has the columns {sorted(row)}, and no prompt: it needs `prompt` (texts or "
            "conversations), `messages` (chats), or `text` with prompt_tokens. Rename the columns."
        )
    raise ValueError(
        f"A row of {name} has the columns {sorted(row)}, and none of the SFT formats: {field!r}, 'messages', or "
        "'prompt' and 'completion' (or 'input_ids', already tokenized). Rename the columns or set "
        "`dataset_text_field`."
    )


def read_columns(row: Mapping[str, Any], name: str) -> list[str]:
    """List all columns of a row that SFTTrainer reads, in their order.

    Args:
        row: the first of a dataset.
        name: of the dataset, for messages.

    Raises:
        ValueError: it has none of the SFT formats.
    """
    columns = text_columns(row, name)
    if columns == ("input_ids",):
        columns += _BESIDE_TOKENS
    else:
        columns += TEACHER_COLUMNS + (() if isinstance(row[columns[0]], str) else TEMPLATE_COLUMNS)
    return [column for column in row if column in columns]


def prepared_rows(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: SFTConfig | None = None) -> Any:
    """Tokenize a dataset of any SFT format by TRL's own preparation, neither truncated nor packed.

    Args:
        dataset: see `sft_dataset`.
        tokenizer: of the data; None for a dataset that has `input_ids`.
        args: of the training; None for text that nothing is trained on.

    Returns:
        a dataset of the same kind with `input_ids`: rows of a stream are prepared when they are read.

    Raises:
        ValueError: it cannot be read, or needs a tokenizer.
    """
    dataset = sft_dataset(dataset, "dataset", args)
    first = next(iter(dataset))
    if "input_ids" in first:
        return dataset.select_columns([name for name in ("input_ids", "seq_lengths") if name in first])
    if tokenizer is None:
        raise ValueError(
            f"The dataset has the columns {sorted(first)} and has to be tokenized, but there is no tokenizer. Pass "
            "`processing_class`."
        )
    # What is cut off, and what is left of a row, is decided by `cut_rows`.
    options: Any = without_limits(_defaults() if args is None else args)
    with template_reads(dataset, tokenizer, options, "the dataset"):
        return prepare(dataset, tokenizer, options).select_columns(["input_ids"])


def prepare(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: Any) -> Any:
    """Run TRL's own preparation of rows without a trainer: neither packed nor shuffled.

    Args:
        dataset: from `sft_dataset`. A stream is prepared as it is read, without progress bars or files.
        tokenizer: of the data; it is not changed.
        args: of the training.

    Returns:
        a dataset of the same kind, with `input_ids` and `labels`, cut to `args.max_length`.
    """
    tokenizer, args = training_tokenizer(tokenizer, args), copy.copy(args)
    args.shuffle_dataset = False
    first, template = next(iter(dataset)), tokenizer.chat_template
    if args.assistant_only_loss and "input_ids" not in first and not is_conversational(first):
        raise ValueError(
            "assistant_only_loss=True needs chats as `messages`, or as `prompt` and `completion`, and the rows have "
            f"the columns {sorted(first)}. Set it to False, or convert them (for ShareGPT with "
            "trl.maybe_convert_to_chatml)."
        )
    masked = args.assistant_only_loss and template is not None and not has_generation_markers(template)
    completions = "prompt" in first and "completion" in first
    trainer: Any = SimpleNamespace(
        # Without an end token there is none to add.
        _tokenizer=SimpleNamespace(eos_token=tokenizer.eos_token or ""),
        chat_template=get_training_chat_template(tokenizer) if masked else None,
        completion_only_loss=completions if args.completion_only_loss is None else args.completion_only_loss,
    )
    with_trl: Any = SFTTrainer._prepare_dataset
    return with_trl(trainer, dataset, tokenizer, args, False, None, "the")


def without_limits(args: Any) -> Any:
    """The arguments of a training, copied, by which rows are neither cut nor shuffled."""
    args = copy.copy(args)
    args.max_length, args.shuffle_dataset = None, False
    return args


def token_rows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: SFTConfig | None = None
) -> Iterator[list[int]]:
    """Tokenize row by row, truncated as in training; no more rows are prepared than are taken.

    Args:
        dataset: see `sft_dataset`.
        tokenizer: of the data.
        args: of the training; None for text that nothing is trained on, of which nothing is cut off.

    Yields:
        n ids; of packed rows each by itself.

    Raises:
        ValueError: see `prepared_rows`.
    """
    # A stream: rows are looked at and prepared one by one, without progress bars or files.
    stream = as_stream(_one_dataset(dataset, "dataset"))
    rows = cut_rows(prepared_rows(stream, tokenizer, args), args)
    while True:
        with template_reads(stream, tokenizer, args, "the dataset"):
            row = next(rows, None)
        if row is None:
            return
        yield row.tolist()


def cut_rows(prepared: Iterable[Mapping[str, Any]], args: SFTConfig | None) -> Iterator[np.ndarray]:
    """Truncate each prepared row as in training.

    Args:
        prepared: from `prepared_rows`.
        args: of the training.

    Yields:
        token ids, (n,) int32. Rows whose scored tokens are all cut off are among them, which TRL drops unless packed.
    """
    window = _window(args)
    for example in prepared:
        for row in example_rows(example):
            yield row[window]


def example_rows(example: Mapping[str, Any]) -> list[np.ndarray]:
    """Split an example into the rows packed into it; one that is not packed is a row.

    Args:
        example: `input_ids`, and `seq_lengths` if several rows lie in it end to end.

    Returns:
        token ids of each row, (n,) int32.
    """
    token_ids = np.asarray(example["input_ids"], np.int32)
    if "seq_lengths" not in example:
        return [token_ids]
    return np.split(token_ids, np.cumsum(np.asarray(example["seq_lengths"], np.int64))[:-1])


def training_tokenizer(tokenizer: PreTrainedTokenizerBase, args: SFTConfig | None) -> PreTrainedTokenizerBase:
    """Change a tokenizer as SFTTrainer does before it reads a row: `eos_token` and `chat_template_path`.

    Args:
        tokenizer: as given; it is not changed.
        args: of the training; None for none.

    Returns:
        a copy where anything is changed.

    Raises:
        ValueError: the end token is not in its vocabulary.
    """
    if args is None or (args.eos_token is None and args.chat_template_path is None):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if args.eos_token is not None:
        tokenizer.eos_token = check_token(tokenizer, "eos_token", args.eos_token)
    path = args.chat_template_path
    if path is not None and (template := read_template(path)) is not None:
        tokenizer.chat_template = template
    elif path is not None:
        # Of a model it changes the rows of the vocabulary alone.
        try:
            clone_chat_template(_model_of_no_size(len(tokenizer)), tokenizer, path)
        except OSError as error:
            raise ValueError(
                f"chat_template_path={path!r} is not a .jinja file, nor a folder or Hub id of a tokenizer that can be "
                f"read: {error}"
            ) from error
    return tokenizer


def read_template(path: str) -> str | None:
    """Read the chat template in a `chat_template_path`; None where SFTTrainer takes it for a tokenizer.

    Args:
        path: of a .jinja file; or a tokenizer's path or Hub id.
    """
    if os.path.isfile(path) and path.endswith((".jinja", ".j2")):
        return Path(path).read_text(encoding="utf-8")
    return None


@contextmanager
def template_reads(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: SFTConfig | None, name: str
) -> Iterator[None]:
    """Name the row that a chat template fails at, by its number.

    Args:
        dataset: from `sft_dataset`, which is prepared meanwhile.
        tokenizer: of the data.
        args: of the training; None for none.
        name: of the dataset, for messages.

    Raises:
        ValueError: there is such a row.
    """
    try:
        yield
    except Exception as error:
        if tokenizer is None or not is_of_template(error):
            raise
        # Cutting reads ahead.
        options: Any = without_limits(_defaults() if args is None else args)
        number = 0
        with suppress(Exception):
            for _ in prepare(as_stream(dataset), tokenizer, options):
                number += 1
        raise ValueError(
            f"The chat template cannot read row {number} (from 0) of {name}: {error}. Convert the row to what the "
            "template knows (a `content` that is None or a list of parts may be what it does not), leave it out, or "
            "give another template (`chat_template_path`)."
        ) from error


def is_of_template(error: BaseException) -> bool:
    """Check whether an error was raised by a chat template, or inside one.

    Args:
        error: as it was caught.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, TemplateError) or (bool(frames) and frames[-1].filename == "<template>")


def is_prepared(args: SFTConfig | None) -> bool:
    """Check whether rows are taken as they are (`skip_prepare_dataset`).

    Args:
        args: of the training, if any.
    """
    options: Any = (args and args.dataset_kwargs) or {}  # a string on the command line, a dict once parsed
    return bool(options.get("skip_prepare_dataset"))


def as_stream(dataset: Any) -> Any:
    """Read a dataset row by row, with whatever format the user gave it."""
    if not isinstance(dataset, Dataset):
        return dataset
    dataset = _by_row(dataset)
    formatted = dataset.format["type"] is not None or dataset.format["columns"] != dataset.column_names
    return IterableDataset.from_generator(lambda: iter(dataset)) if formatted else dataset.to_iterable_dataset()


@contextmanager
def _explained_rows(name: str) -> Iterator[None]:
    """Name the file and the mistake in one sentence, where `datasets` gives a traceback without the file."""
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    try:
        yield
    except (DatasetGenerationError, ArrowInvalid, BadGzipFile, UnicodeDecodeError, StopIteration) as error:
        # The cause is wrapped, except where an error of rows that differ is given in full.
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration):
            raise ValueError(f"{name} is empty: there are no rows to read. Give a file with rows.") from error
        if Path(name).is_dir():
            wanted = "every file in it to have the same kind and columns; or give one file"
        elif isinstance(cause, UnicodeDecodeError):
            wanted = "text in UTF-8: convert it, as in `iconv -f latin1 -t utf-8`"
        else:
            wanted = "what its name promises: in .jsonl one JSON object on each line, all with the same columns"
        raise ValueError(
            f"The rows of {name} cannot be read: {' '.join(str(cause).split())} ({type(cause).__name__}). "
            f"Wanted {wanted}."
        ) from error


def _one_dataset(dataset: Any, name: str) -> Any:
    """Return a dataset, made from a list of rows where one is given."""
    if isinstance(dataset, Dataset | IterableDataset):
        return dataset
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        splits = ", ".join(map(repr, dataset))
        raise ValueError(
            f"{name} is a {type(dataset).__name__} with the splits {splits}, and must be one of them. Select "
            f"it, as in {name}=dataset[{next(iter(dataset), 'train')!r}], or load it with split=..."
        )
    rows: Any = list(dataset) if isinstance(dataset, Iterable) and not isinstance(dataset, str | Mapping) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}, and must be a datasets.Dataset, an IterableDataset or a list of "
            "rows (dicts). Make one with datasets.Dataset.from_list(rows) or datasets.load_dataset(...)."
        )
    # `Dataset.from_list` has the columns of the first row alone.
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"The rows given as {name} have values of several types in a column: {error}.") from error


def _by_row(dataset: Any) -> Any:
    """Make rows dicts again, where the dataset is set to be read as tables of pandas, Polars or Arrow."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] not in ("pandas", "polars", "arrow"):
        return dataset
    return dataset.with_format(None, columns=dataset.format["columns"])


def _rows_with_text(dataset: Dataset, columns: Sequence[str], name: str) -> Dataset:
    """Select the rows with text, column by column: no row is made for it."""
    known = (*columns, *TEACHER_COLUMNS, "chat_template_kwargs")
    scanned = [column for column in known if column in dataset.column_names]
    number, empty = 0, []
    for batch in dataset.select_columns(scanned).with_format("arrow").iter(_SCANNED_ROWS):
        bare = np.zeros(len(batch), bool)
        for column in scanned:
            values = batch[column]
            if values.null_count:
                raise ValueError(_missing(number + pc.index(pc.is_null(values), True).as_py(), column, name))
            if column in _TEXTS and (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
                bare |= pc.equal(pc.list_value_length(values), 0).to_numpy()
                if (row := _row_without_role(values)) is not None:
                    raise ValueError(
                        f"Row {number + row} (from 0) of {name} has None for a message, or for who wrote it, in the "
                        f"column {column!r}. Leave it out, or fill it in."
                    )
        empty.append(bare)
        number += len(batch)
    empty_N = np.concatenate(empty)
    if not empty_N.any():
        return dataset
    if _is_main_process():
        first = int(empty_N.argmax())
        logger.warning_once(
            f"{int(empty_N.sum())} of {len(empty_N)} rows of {name} are empty chats, such as row {first}: skipped."
        )
    return dataset.select(np.flatnonzero(~empty_N))


def _row_without_role(values: Any) -> int | None:
    """Find the first row of a column of lists that has a message without a role."""
    flat = pc.list_flatten(values)
    fields = [field.name for field in flat.type] if pa.types.is_struct(flat.type) else []
    role = next((name for name in ("role", "from") if name in fields), None)
    if role is None or not (roles := pc.struct_field(flat, role)).null_count:
        return None
    return pc.list_parent_indices(values.combine_chunks())[pc.index(pc.is_null(roles), True).as_py()].as_py()


def _has_text(
    row: Mapping[str, Any], number: int, columns: Sequence[str], beside: Sequence[str], chats: bool, name: str
) -> bool:
    """Check whether a row of a stream has text; an empty chat has none."""
    if unknown := [column for column in TEACHER_COLUMNS if column in row and column not in beside]:
        raise ValueError(
            f"Row {number} of {name} has the column {unknown[0]!r}, which the first row has not: it would be left "
            "out. Give all rows the same columns."
        )
    for column in (*columns, *beside):
        if column not in row:
            raise ValueError(
                f"Row {number} of {name} has the columns {sorted(row)} and no {column!r}, which the first row has. "
                "Give all rows the same columns."
            )
    for column in (*columns, *beside, "chat_template_kwargs"):
        if column in row and row[column] is None:
            raise ValueError(_missing(number, column, name))
    if any(row[column] == [] for column in columns if column in _TEXTS):
        if _is_main_process():
            logger.warning_once(f"There are empty chats in {name}, a stream: they are skipped.")
        return False
    _check_row(row, columns, chats, f"row {number} of {name}")
    return True


def _check_row(row: Mapping[str, Any], columns: Sequence[str], chats: bool, name: str) -> None:
    """Check a row for what TRL would take for something else, or fail at.

    Args:
        row: none of its columns is empty.
        columns: that its tokens are made from.
        chats: whether they are lists, in the first row.
        name: of the row.
    """
    if columns[0] == "input_ids":
        _check_tokens(row, name)
        return
    if len({isinstance(row[column], list) for column in columns} | {chats}) > 1:
        raise ValueError(
            f"The columns {list(columns)} of {name} hold text and messages, or not what those of the first row hold. "
            "Give all as text, or all as lists of messages."
        )
    for column in columns:
        _check_value(row[column], column, name)
    tools, options = row.get("tools"), row.get("chat_template_kwargs", {})
    if isinstance(tools, str):
        try:
            json.loads(tools)
        except ValueError as error:
            raise ValueError(
                f"The column 'tools' of {name} holds {_short(tools)}, and must hold JSON: {error}."
            ) from error
    if not isinstance(options, Mapping):
        raise ValueError(
            f"The column 'chat_template_kwargs' of {name} holds {_short(options)}, and must hold dicts. Read the text "
            "first, if it is JSON."
        )


def _check_tokens(row: Mapping[str, Any], name: str) -> None:
    token_ids = np.asarray(row["input_ids"])
    if token_ids.ndim != 1 or (token_ids.size and (token_ids.dtype.kind not in "iu" or token_ids.min() < 0)):
        raise ValueError(
            f"The column 'input_ids' of {name} holds {_short(row['input_ids'])}, and must hold lists of token ids."
        )
    for column in ("labels", "completion_mask", "assistant_masks"):
        if column in row and len(row[column]) != len(token_ids):
            raise ValueError(
                f"The column {column!r} of {name} has {len(row[column])} entries for {len(token_ids)} tokens: each "
                "needs one."
            )


def _check_value(value: Any, column: str, name: str) -> None:
    keys = ("from", "value") if column == "conversations" else ("role",)
    wrong = [turn for turn in value if not _is_message(turn, keys)] if isinstance(value, list) else []
    if column in ("messages", "conversations"):
        if isinstance(value, list) and not wrong:
            return
        way_out = "Write the turns as [{'role': ..., 'content': ...}]"
        if isinstance(value, str):
            way_out = "Read the text first, if it is JSON: dataset.map(lambda row: {...: json.loads(row[...])})"
        elif wrong and _is_message(wrong[0], ("role",)):
            way_out = "Rename the column to `messages`"
        raise ValueError(
            f"The column {column!r} of {name} holds {_short(value)}, and must hold lists of messages with "
            f"{' and '.join(map(repr, keys))}. {way_out}."
        )
    may_be_chat = column in ("prompt", "completion")
    if not isinstance(value, str) and not (may_be_chat and isinstance(value, list) and not wrong):
        wanted = "texts, or lists of messages with 'role' and 'content'" if may_be_chat else "texts"
        raise ValueError(
            f"The column {column!r} of {name} holds {_short(value)}, and must hold {wanted}. Convert it, or name "
            "another column (`dataset_text_field`)."
        )


def _is_message(turn: Any, keys: Sequence[str]) -> bool:
    # The content of a message may be None: that of a call of tools is.
    return isinstance(turn, Mapping) and all(key in turn for key in keys) and turn[keys[0]] is not None


def _missing(number: int, column: str, name: str) -> str:
    return (
        f"Row {number} (from 0) of {name} has None in the column {column!r}: nothing can be read. Leave it out, as in "
        f"dataset.filter(lambda row: row[{column!r}] is not None), or fill it in."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 80 else f'{text[:80]}...'} ({type(value).__name__})"


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _window(args: SFTConfig | None) -> slice:
    if args is None or args.max_length is None or is_prepared(args):
        return slice(None)
    # Packing cuts the end off whatever the mode.
    keep_end = args.truncation_mode == "keep_end" and not args.packing
    return slice(-args.max_length, None) if keep_end else slice(args.max_length)


def _defaults() -> SimpleNamespace:
    fields = dataclasses.fields(SFTConfig)
    return SimpleNamespace(
        **{field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    )


def _model_of_no_size(vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1
        )
    )
