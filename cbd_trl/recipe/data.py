"""The datasets of a recipe, and their mix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, ReadInstruction, interleave_datasets
from trl import SFTConfig

from cbd_trl.recipe import corpus
from cbd_trl.recipe.schema import DataPart
from cbd_trl.utils.datasets import load_rows, read_columns, sft_dataset, token_rows

# The text that the package ships.
DEMO = "demo"


def load_data(parts: Sequence[DataPart], tokenizer: Any, seed: int, place: str = "data") -> Dataset:
    """Load the mix of some datasets.

    Args:
        parts: one or more, rows drawn from each by its share until the first of them runs out.
        tokenizer: of the source; the text that the package ships is written in its chat template.
        seed: of the draws.
        place: of the datasets in the recipe, such as "evaluation.data".

    Raises:
        ValueError: one of them cannot be read, or their rows are of several formats.
    """
    loaded = [_columns(_load(part, tokenizer, where), part, where) for where, part in placed(parts, place)]
    if len(loaded) == 1:
        return loaded[0]
    check_mix(parts, [rows.column_names for rows in loaded])
    whole = sum(part.share for part in parts)
    # Oversampling would show the rows of a small dataset many times while the others last.
    return interleave_datasets(
        loaded, probabilities=[part.share / whole for part in parts], seed=seed, stopping_strategy="first_exhausted"
    )


def placed(parts: Sequence[DataPart], place: str) -> list[tuple[str, DataPart]]:
    """Pair datasets with their places in the recipe: `data`, or `data[0]` and so on where there are several."""
    if len(parts) == 1:
        return [(place, parts[0])]
    return [(f"{place}[{number}]", part) for number, part in enumerate(parts)]


def check_data(part: DataPart, tokenizer: Any, args: SFTConfig | None = None) -> list[str]:
    """Check a dataset by its first row, and read no more.

    Args:
        part: the dataset.
        tokenizer: of the source, or None where it is not known: chats are then not laid out.
        args: of the training.

    Returns:
        the columns that would be trained on.

    Raises:
        ValueError: the dataset cannot be read, has no rows, or has no column to train on.
    """
    if part.name == DEMO:
        return _demo_rows(part, None).column_names
    try:
        ReadInstruction.from_spec(part.split)
    except ValueError as error:
        raise ValueError(
            f"the split {part.split!r} of {part.name} cannot be read ({error}). Write train, or a slice: train[:90%]."
        ) from error
    if Path(part.name).is_file() and part.split.partition("[")[0] != "train":
        raise ValueError(
            f"{part.name} is a file, which has no split {part.split!r}: all of it is `train`. Leave split out, or "
            "name a slice, such as train[90%:]."
        )
    try:
        rows = load_rows(part.name, part.config, part.split.partition("[")[0], streaming=True)
        row = next(iter(rows), None)
    except Exception as error:  # whatever a dataset's files, or the Hub, raise
        raise ValueError(_unreadable(part, error)) from error
    if row is None:
        raise ValueError(f"{part.name} ({part.split}) has no rows.")
    if part.column is not None:
        if not isinstance(row.get(part.column), str):
            raise ValueError(f"{part.name} has no column {part.column!r} of text. Its columns: {', '.join(row)}.")
        return ["text"]
    try:
        kept = read_columns(row, part.name)
    except ValueError as error:
        raise ValueError(
            f"{part.name} has the columns {sorted(row)}, and these are not an SFT format: text, messages, prompt and "
            "completion, or input_ids. Name the column that holds the text: {name: ..., column: ...}."
        ) from error
    if tokenizer is not None and row[kept[0]] != []:
        next(token_rows([row], tokenizer, args))
    return kept


def shares_rows(part: DataPart, other: DataPart) -> bool:
    """Check whether two datasets have rows in common, however their file is named.

    Slices are compared without reading the rows, as those of a dataset of very many: one in rows and one in percent
    (`train[:1000]`, `train[90%:]`) count as apart where they are so in a large one.

    Args:
        part: one of them.
        other: the other; a split of either that cannot be read has no rows.
    """
    if _identity(part) != _identity(other):
        return False
    return any(
        split == theirs and max(start, from_) < min(end, to)
        for split, start, end in _spans(part.split)
        for theirs, from_, to in _spans(other.split)
    )


def _identity(part: DataPart) -> tuple[str, str | None]:
    path = Path(part.name)
    if part.name == DEMO or not path.exists():
        return part.name, part.config
    # A configuration is one of the Hub's: of a file there is none.
    return str(path.resolve()), None if path.is_file() else part.config


def _spans(spec: str) -> list[tuple[str, int, int]]:
    """(split, first row, row behind the last) of each slice, of splits of so many rows that rounding is no matter."""
    lengths = {slice_.partition("[")[0].strip(): 10**12 for slice_ in spec.split("+")}
    try:
        return [(one.splitname, one.from_, one.to) for one in ReadInstruction.from_spec(spec).to_absolute(lengths)]
    except ValueError:
        return []


def check_mix(parts: Sequence[DataPart], columns: Sequence[list[str]]) -> None:
    """Check that the rows of several datasets can be mixed.

    Args:
        parts: the datasets.
        columns: of each, those that would be trained on.

    Raises:
        ValueError: their rows are of several formats.
    """
    if len({tuple(sorted(names)) for names in columns}) > 1:
        formats = {part.name: names for part, names in zip(parts, columns, strict=True)}
        raise ValueError(
            f"a mix needs rows of one format, and these have several: {formats}. Name the column that holds the text "
            "of each (`column`), or bring them into one format beforehand."
        )


def _load(part: DataPart, tokenizer: Any, where: str) -> Dataset:
    if part.name == DEMO:
        return _demo_rows(part, tokenizer)
    try:
        return load_rows(part.name, part.config, part.split)
    except Exception as error:  # likewise
        raise ValueError(f"{where}: {_unreadable(part, error)}") from error


def _unreadable(part: DataPart, error: Exception) -> str:
    if Path(part.name).suffix and not Path(part.name).exists():
        return f"there is no file {part.name}, and no dataset of that name on the Hub could be read."
    return f"{part.name} ({part.split}) cannot be read: {' '.join(str(error).split())[:300]}"


def _demo_rows(part: DataPart, tokenizer: Any) -> Dataset:
    training, held_out = corpus.split(tokenizer)
    by_split = {"train": training, "held_out": Dataset.from_dict({"text": held_out})}
    if part.split not in by_split:
        raise ValueError(f"{DEMO} has no split {part.split!r}: there are {' and '.join(by_split)}.")
    return by_split[part.split]


def _columns(rows: Dataset, part: DataPart, where: str) -> Dataset:
    """The columns that a trainer reads, by the names that it has for them."""
    if part.column is not None:
        rows = rows.select_columns([part.column])
        return rows if part.column == "text" else rows.rename_column(part.column, "text")
    rows = sft_dataset(rows, where)
    return rows.select_columns(read_columns(rows[0], part.name))
