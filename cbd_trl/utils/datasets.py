"""Data sets as `trl.SFTTrainer` reads them: checked, and turned into tokens by its own preparation.

Every place that reads rows comes here, so that what is calibrated on, cached, generated from and measured is what is
trained.
"""

import copy
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from jinja2 import TemplateError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import clone_chat_template, get_training_chat_template, has_generation_markers

logger = logging.get_logger(__name__)

# Columns that hold a row's text. TRL takes whichever it meets first for the one that says whether a row is a chat, so
# those that are not read are dropped.
_TEXTS = ("prompt", "completion", "messages", "conversations", "chosen", "rejected")
# What TRL reads beside them: of a chat, and of a row that is tokenised.
_BESIDE_CHATS = ("tools", "chat_template_kwargs")
_BESIDE_TOKENS = ("labels", "completion_mask", "assistant_masks", "seq_lengths", "position_ids")
_SCANNED_ROWS = 10_000


def sft_dataset(
    dataset: Any, name: str, args: SFTConfig | None = None, prompts: bool = False, formatted: bool = False
) -> Any:
    """Check that SFTTrainer can read a data set, and give it as SFTTrainer takes it.

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
        raise ValueError(f"The data set given as {name} is empty: it has no rows. Give one with rows.")
    # Rows that a collator or a transform of the user's reads are theirs.
    if formatted or _is_prepared(args) or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        return dataset
    field = "text" if args is None else args.dataset_text_field
    columns = text_columns(first, name, field, prompts)
    others = [other for other in _TEXTS if other in first and other not in columns and other != field]
    if others and columns[0] != "input_ids":
        dataset = dataset.remove_columns(others)
    if isinstance(dataset, Dataset):
        kept = _rows_with_text(dataset, columns, name)
    else:
        options = {"columns": columns, "name": name}
        kept = dataset.filter(_has_text, with_indices=True, fn_kwargs=options)
    first = next(iter(kept), None)
    if first is None:
        raise ValueError(f"The data set given as {name} holds nothing but empty chats. Give one with text.")
    for column in columns:
        _check_value(first[column], column, name)
    options = first.get("chat_template_kwargs", {})
    if not isinstance(options, Mapping):
        raise ValueError(
            f"The column 'chat_template_kwargs' of {name} holds {_short(options)}, and must hold dicts. Read the text "
            "first, if it is JSON."
        )
    return kept


def sft_datasets(datasets: Any, name: str, args: SFTConfig | None = None, formatted: bool = False) -> Any:
    """`sft_dataset` of each data set to evaluate on.

    Args:
        datasets: one, a dict of them, or what is none: None, or the name of one that is known.
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
    """The columns that SFTTrainer makes the tokens of a row from.

    Args:
        row: the first of a data set.
        name: of the data set, for messages.
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
        "'prompt' and 'completion' (or 'input_ids', already tokenised). Rename the columns or set "
        "`dataset_text_field`."
    )


def read_columns(row: Mapping[str, Any], name: str) -> list[str]:
    """All columns of a row that SFTTrainer reads, in their order.

    Args:
        row: the first of a data set.
        name: of the data set, for messages.

    Raises:
        ValueError: it has none of the SFT formats.
    """
    columns = text_columns(row, name)
    if columns == ("input_ids",):
        columns += _BESIDE_TOKENS
    elif not isinstance(row[columns[0]], str):
        columns += _BESIDE_CHATS
    return [column for column in row if column in columns]


def training_tokenizer(tokenizer: PreTrainedTokenizerBase, args: SFTConfig | None) -> PreTrainedTokenizerBase:
    """The tokenizer as SFTTrainer changes it before it reads a row: `eos_token` and `chat_template_path`.

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
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(
                f"eos_token={args.eos_token!r} is not in the vocabulary of the {type(tokenizer).__name__}. Name one "
                "of its tokens, or leave eos_token out."
            )
        tokenizer.eos_token = args.eos_token
    path = args.chat_template_path
    if path is not None and os.path.isfile(path) and path.endswith((".jinja", ".j2")):
        with open(path, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    elif path is not None:
        # Of a model it changes the rows of the vocabulary alone.
        clone_chat_template(_model_of_no_size(len(tokenizer)), tokenizer, path)
    return tokenizer


def prepared_rows(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: SFTConfig | None = None) -> Any:
    """A data set with `input_ids`, made of any SFT format by TRL's own preparation, neither truncated nor packed.

    Args:
        dataset: see `sft_dataset`.
        tokenizer: of the data; None for a data set that has `input_ids`.
        args: of the training; None for text that nothing is trained on.

    Returns:
        a data set of the same kind: rows of a stream are prepared when they are read.

    Raises:
        ValueError: it cannot be read, or needs a tokenizer.
    """
    dataset = sft_dataset(dataset, "dataset", args)
    first = next(iter(dataset))
    if "input_ids" in first:
        return dataset.select_columns([name for name in ("input_ids", "seq_lengths") if name in first])
    if tokenizer is None:
        raise ValueError(
            f"The data set has the columns {sorted(first)} and has to be tokenised, but there is no tokenizer. Pass "
            "`processing_class`."
        )
    options: Any = _defaults() if args is None else copy.copy(args)
    # What is cut off, and what is left of a row, is decided by `cut_rows`.
    options.max_length = None
    return prepare(dataset, tokenizer, options).select_columns(["input_ids"])


def prepare(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: Any) -> Any:
    """TRL's own preparation of rows, without a trainer: neither packed nor shuffled.

    Args:
        dataset: from `sft_dataset`. A stream is prepared as it is read, without progress bars or files.
        tokenizer: of the data; it is not changed.
        args: of the training.

    Returns:
        a data set of the same kind, with `input_ids` and `labels`, cut to `args.max_length`.
    """
    tokenizer, args = training_tokenizer(tokenizer, args), copy.copy(args)
    args.shuffle_dataset = False
    first, template = next(iter(dataset)), tokenizer.chat_template
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


def token_rows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: SFTConfig | None = None
) -> Iterator[list[int]]:
    """Token ids of each row, as training makes and truncates them; no more rows are prepared than are taken.

    Args:
        dataset: see `sft_dataset`.
        tokenizer: of the data.
        args: of the training; None for text that nothing is trained on, of which nothing is cut off.

    Yields:
        n ids; of packed rows each by itself.

    Raises:
        ValueError: see `prepared_rows`; or the chat template cannot read a row.
    """
    # A stream: rows are looked at and prepared one by one, without progress bars or files.
    dataset = _one_dataset(dataset, "dataset")
    stream = dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset
    try:
        for row in cut_rows(prepared_rows(stream, tokenizer, args), args):
            yield row.tolist()
    except TemplateError as error:
        raise ValueError(f"The chat template cannot read a row of the data set: {error}.") from error


def cut_rows(prepared: Iterable[Mapping[str, Any]], args: SFTConfig | None) -> Iterator[np.ndarray]:
    """Token ids of each prepared row, truncated as in training.

    Args:
        prepared: from `prepared_rows`.
        args: of the training.

    Yields:
        (n,) int32. Rows whose scored tokens are all cut off are among them, which TRL drops if they are not packed.
    """
    window = _window(args)
    for example in prepared:
        for row in example_rows(example):
            yield row[window]


def example_rows(example: Mapping[str, Any]) -> list[np.ndarray]:
    """The rows of an example: itself, or those packed into it.

    Args:
        example: `input_ids`, and `seq_lengths` if several rows lie in it end to end.

    Returns:
        token ids of each row, (n,) int32.
    """
    token_ids = np.asarray(example["input_ids"], np.int32)
    if "seq_lengths" not in example:
        return [token_ids]
    return np.split(token_ids, np.cumsum(np.asarray(example["seq_lengths"], np.int64))[:-1])


def _window(args: SFTConfig | None) -> slice:
    if args is None or args.max_length is None or _is_prepared(args):
        return slice(None)
    # Packing cuts the end off whatever the mode.
    keep_end = args.truncation_mode == "keep_end" and not args.packing
    return slice(-args.max_length, None) if keep_end else slice(args.max_length)


def _is_prepared(args: SFTConfig | None) -> bool:
    options: Any = (args and args.dataset_kwargs) or {}  # a string on the command line, a dict once parsed
    return bool(options.get("skip_prepare_dataset"))


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


def _one_dataset(dataset: Any, name: str) -> Any:
    """A data set, made of rows where it is none."""
    if isinstance(dataset, Dataset | IterableDataset):
        return dataset
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        splits = ", ".join(map(repr, dataset))
        raise ValueError(
            f"{name} is a {type(dataset).__name__} with the splits {splits}: one of them is needed. Name it, as in "
            f"{name}=dataset[{next(iter(dataset), 'train')!r}], or load it with split=..."
        )
    rows: Any = list(dataset) if isinstance(dataset, Iterable) and not isinstance(dataset, str | Mapping) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}: a datasets.Dataset, an IterableDataset or a list of rows (dicts) "
            "is needed. Make one with datasets.Dataset.from_list(rows) or datasets.load_dataset(...)."
        )
    # `Dataset.from_list` has the columns of the first row alone.
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"The rows given as {name} have values of several types in a column: {error}.") from error


def _check_value(value: Any, column: str, name: str) -> None:
    """Refuse what TRL would take for something else, or fail at."""
    place = f"The column {column!r} of {name}"
    if column == "input_ids":
        return
    if column in ("messages", "conversations"):
        keys = ("from", "value") if column == "conversations" else ("role",)
        turn = value[0] if isinstance(value, list) else None
        if isinstance(turn, Mapping) and all(key in turn for key in keys):
            return
        way_out = "Write the turns as [{'role': ..., 'content': ...}]"
        if isinstance(value, str):
            way_out = "Read the text first, if it is JSON: dataset.map(lambda row: {...: json.loads(row[...])})"
        elif isinstance(turn, Mapping) and "role" in turn:
            way_out = "Rename the column to `messages`"
        raise ValueError(
            f"{place} holds {_short(value)}, and must hold lists of messages with {' and '.join(map(repr, keys))}. "
            f"{way_out}."
        )
    is_chat = isinstance(value, list) and isinstance(value[0], Mapping) and "role" in value[0]
    if not isinstance(value, str) and not (is_chat and column in ("prompt", "completion")):
        chats = ", or lists of messages with 'role' and 'content'" if column in ("prompt", "completion") else ""
        raise ValueError(
            f"{place} holds {_short(value)}, and must hold texts{chats}. Convert it, or name another column "
            "(`dataset_text_field`)."
        )


def _check_row(row: Mapping[str, Any], number: int, columns: Sequence[str], name: str) -> None:
    for column in (*columns, "chat_template_kwargs"):
        if column in columns and column not in row:
            raise ValueError(
                f"Row {number} of {name} has the columns {sorted(row)} and no {column!r}, which the first row has. "
                "Give all rows the same columns."
            )
        if column in row and row[column] is None:
            raise ValueError(_missing(number, column, name))


def _missing(number: int, column: str, name: str) -> str:
    return (
        f"Row {number} (from 0) of {name} has None in the column {column!r}: nothing can be read. Leave it out, as in "
        f"dataset.filter(lambda row: row[{column!r}] is not None), or fill it in."
    )


def _has_text(row: Mapping[str, Any], number: int, columns: Sequence[str], name: str) -> bool:
    """Whether a row of a stream is no empty chat."""
    _check_row(row, number, columns, name)
    if any(isinstance(row[column], list) and not row[column] for column in columns):
        if _is_main_process():
            logger.warning_once(f"There are empty chats in {name}, a stream: they are skipped.")
        return False
    if len({isinstance(row[column], str) for column in columns}) > 1:
        raise ValueError(_mixed(number, name, columns))
    return True


def _mixed(number: int, name: str, columns: Sequence[str]) -> str:
    return (
        f"Row {number} of {name} has text in one of the columns {list(columns)} and messages in the other. Give both "
        "as text, or both as lists of messages."
    )


def _rows_with_text(dataset: Dataset, columns: Sequence[str], name: str) -> Dataset:
    """The rows that are no empty chats. Read column by column: nothing of a row is made for it."""
    scanned = [column for column in (*columns, "chat_template_kwargs") if column in dataset.column_names]
    number, empty = 0, []
    for batch in dataset.select_columns(scanned).with_format("arrow").iter(_SCANNED_ROWS):
        bare = np.zeros(len(batch), bool)
        for column in scanned:
            values = batch[column]
            if values.null_count:
                raise ValueError(_missing(number + pc.index(pc.is_null(values), True).as_py(), column, name))
            if column in columns and (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
                bare |= pc.equal(pc.list_value_length(values), 0).to_numpy()
        empty.append(bare)
        number += len(batch)
    empty_N = np.concatenate(empty)
    types = {pa.types.is_nested(dataset.features.arrow_schema.field(column).type) for column in columns}
    if len(types) > 1:
        raise ValueError(_mixed(0, name, columns))
    if not empty_N.any():
        return dataset
    if _is_main_process():
        first = int(empty_N.argmax())
        logger.warning_once(
            f"{int(empty_N.sum())} of {len(empty_N)} rows of {name} are empty chats, such as row {first}: skipped."
        )
    return dataset.select(np.flatnonzero(~empty_N))


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 80 else f'{text[:80]}...'} ({type(value).__name__})"
