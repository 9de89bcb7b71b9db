"""Rows whose teacher reads another prompt than the student (context distillation): both in tokens, side by side.

A dataset says what the teacher reads in a column of its own: `teacher_prompt` beside `prompt` and `completion`, or
`teacher_messages` beside `messages`. Both models predict the same tokens, the student without what only the teacher
is given: a system prompt, examples, retrieved text, a rationale (Snell et al., arXiv 2209.15189; Askell et al., arXiv
2112.00861).

TRL cuts and packs columns that have an entry for every token. So what the teacher reads is kept in two of them: `READ`
holds its token ids as JSON at the first token of a row, "" at all others; `PLACES`, for every scored token of the
student, where the same token stands in them, -1 for all others.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, pack_dataset
from trl.data_utils import get_dataset_column_names

from cbd_trl.utils.blocks import IGNORE_INDEX
from cbd_trl.utils.datasets import TEACHER_COLUMNS, prepare, template_reads, without_limits

READ, PLACES = "teacher_read", "teacher_places"
NOWHERE = -1
# What stands in the column's place for the student, the columns that must be beside it, and the argument that has only
# the tokens that both share scored.
_PROMPT, _MESSAGES = TEACHER_COLUMNS
_COLUMNS = {
    _PROMPT: ("prompt", ("prompt", "completion"), "completion_only_loss"),
    _MESSAGES: ("messages", ("messages",), "assistant_only_loss"),
}
_IDS, _LABELS, _OWN = "teacher_ids", "teacher_labels", "student_prompt"


def teacher_column(dataset: Any) -> str | None:
    """Find the column with what the teacher reads; None where it reads what the student does.

    Args:
        dataset: as given to a trainer, or None.
    """
    columns = get_dataset_column_names(dataset) if dataset is not None else []
    return next((name for name in _COLUMNS if name in columns), None)


def check_teacher_column(
    dataset: Any, args: SFTConfig, name: str, formatted: bool = False, completion_only: bool | None = None
) -> None:
    """Check that a dataset and the arguments leave every token that is scored to both models.

    Args:
        dataset: as given, with a `teacher_column`.
        args: of the training.
        name: of the dataset, for messages.
        formatted: whether a function of the user's makes the text.
        completion_only: `completion_only_loss` of the trainer, which has it from its training rows where the arguments
            leave it open; None before there is one.

    Raises:
        ValueError: they do not.
    """
    column, columns = teacher_column(dataset), get_dataset_column_names(dataset)
    assert column is not None
    own, needed, argument = _COLUMNS[column]
    others = [other for other in _COLUMNS if other in columns and other != column]
    if others:
        raise ValueError(
            f"{name} has the columns {column!r} and {others[0]!r}: the teacher reads one of them. Remove the other."
        )
    if "input_ids" in columns or formatted or not set(needed) <= set(columns):
        found = "a formatting_func makes its text" if formatted else f"its columns are {sorted(columns)}"
        raise ValueError(
            f"{name} has {column!r}, what the teacher reads in place of {own!r}, which needs the text of "
            f"{' and '.join(map(repr, needed))} beside it, and {found}. Give the columns as text or messages, or "
            f"leave {column!r} out."
        )
    value = getattr(args, argument)
    if column == _PROMPT and value is None:
        value = completion_only is not False
    if not value:
        raise ValueError(
            f"{argument}={value} scores tokens of {own!r} too, which the teacher, whose rows begin with {column!r}, "
            f"does not read. Set {argument}=True."
        )
    if args.truncation_mode == "keep_end" and not args.packing:
        raise ValueError(
            f"truncation_mode='keep_end' cuts rows in front, and where a row begins is what {column!r} stands for. "
            "Use truncation_mode='keep_start'."
        )
    if args.packing and args.packing_strategy != "bfd":
        raise ValueError(
            f"packing_strategy={args.packing_strategy!r} cuts rows in the middle, and the rest of a row would be "
            f"without its {column!r}. Use packing_strategy='bfd'."
        )


def prepare_beside(
    dataset: Any,
    args: Any,
    packing: bool,
    prepare: Callable[[Any, Any, bool], Any],
    beside: Callable[[Any], Any],
    columns: list[str],
) -> Any:
    """Prepare a dataset as TRL does, and keep columns of ours, one entry for each token, beside its tokens.

    Args:
        dataset: as given to the trainer.
        args: of the run.
        packing: whether rows are packed.
        prepare: TRL's preparation of a dataset by some args, packed or not, which leaves tokens that it finds alone.
        beside: adds the columns to whole rows.
        columns: their names.

    Returns:
        its rows, with the columns.
    """
    whole = beside(prepare(dataset, without_limits(args), False))
    if not packing or args.max_length is None:
        return prepare(whole, args, packing)
    # TRL packs no columns but its own.
    rows = whole.select_columns(["input_ids", "labels", *columns])
    if args.shuffle_dataset:
        rows = rows.shuffle(seed=args.seed)
    rows = pack_dataset(rows, args.max_length, args.packing_strategy, _workers(dataset, args))
    return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows


def prepare_for_both(
    dataset: Any,
    args: Any,
    packing: bool,
    prepare: Callable[[Any, Any, bool], Any],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> Any:
    """Prepare a dataset with a `teacher_column` as TRL does, with `READ` and `PLACES` beside its tokens.

    Args:
        dataset: checked by `check_teacher_column`.
        args: of the run.
        packing: whether rows are packed.
        prepare: see `prepare_beside`.
        tokenizer: of the data.
        name: of the dataset, for messages.

    Raises:
        ValueError: naming the row whose teacher reads no text before the first scored token, or other scored tokens
            than the student.
    """
    column = teacher_column(dataset)
    assert column is not None
    own = _COLUMNS[column][0]
    workers = _workers(dataset, args)
    if isinstance(dataset, Dataset):
        # Rows in the format of another library would be tensors here.
        dataset = dataset.with_format(None, columns=dataset.format["columns"])
    names = {"own": own, "column": column, "name": name}
    theirs = dataset.map(_exchanged, with_indices=True, fn_kwargs=names, **workers)
    with template_reads(theirs, tokenizer, args, f"{name} ({column})"):
        theirs = prepare(theirs, without_limits(args), False)
    # A chat that TRL prepares anew must not be tokens already.
    given = theirs.map(_put_back, fn_kwargs={"own": own}, remove_columns=["input_ids", "labels"], **workers)

    def beside(rows: Any) -> Any:
        options = {"column": column, "name": name}
        return rows.map(_side_by_side, with_indices=True, fn_kwargs=options, **workers)

    return prepare_beside(given, args, packing, prepare, beside, [READ, PLACES])


def teacher_rows(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: Any) -> Any:
    """Tokenize what the teacher reads of a dataset with a `teacher_column`, as a training does.

    Args:
        dataset: from `sft_dataset`.
        tokenizer: of the data.
        args: of the training.

    Returns:
        a dataset of the same kind with `input_ids`, of which nothing is cut off.

    Raises:
        ValueError: see `check_teacher_column` and `prepare_for_both`.
    """
    check_teacher_column(dataset, args, "the dataset")
    if tokenizer is None:
        raise ValueError(
            "The dataset has to be tokenized, and there is no tokenizer. Pass `processing_class`, that of the student."
        )

    def prepare_by(rows: Any, args: Any, packing: bool) -> Any:
        return prepare(rows, tokenizer, args)

    rows = prepare_for_both(dataset, without_limits(args), False, prepare_by, tokenizer, "the dataset")
    return rows.map(lambda row: {"input_ids": json.loads(row[READ][0])}).select_columns(["input_ids"])


def read_teacher_row(example: Mapping[str, Any], start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What the teacher reads of one row, as far as the student's row goes.

    Args:
        example: a row or a pack of rows with `READ` and `PLACES`.
        start: the row's first token in it.
        length: tokens of the row.

    Returns:
        token ids (u,) int64, and for each of the student's tokens its place in them, -1 where it is not scored,
        (length,) int64.
    """
    places_T = np.asarray(example[PLACES][start : start + length], np.int64)
    ids_U = np.asarray(json.loads(example[READ][start]), np.int64)
    # A row that is cut before its first scored token has one token left: a model cannot read none.
    return ids_U[: max(places_T.max(initial=NOWHERE), 0) + 1], places_T


def longest_teacher_row(dataset: Any) -> int:
    """Count the tokens of the longest row that a teacher reads; 0 of a stream.

    Args:
        dataset: prepared, with `READ`.
    """
    if not isinstance(dataset, Dataset):
        return 0
    texts = (text for example in dataset.select_columns(READ) for text in example[READ])
    return max((len(json.loads(text)) for text in texts if text), default=0)


def _workers(dataset: Any, args: Any) -> dict[str, Any]:
    return {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}


def _exchanged(row: Mapping[str, Any], number: int, own: str, column: str, name: str) -> dict[str, Any]:
    kinds = type(row[column]).__name__, type(row[own]).__name__
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"Row {number} (from 0) of {name} has a {kinds[0]} as {column!r} and a {kinds[1]} as {own!r}: both must "
            "be texts, or both lists of messages."
        )
    if row[column] == []:
        raise ValueError(_empty(column, number, name))
    return {own: row[column], _OWN: row[own]}


def _put_back(row: Mapping[str, Any], own: str) -> dict[str, Any]:
    return {own: row[_OWN], _IDS: row["input_ids"], _LABELS: row["labels"]}


def _side_by_side(row: Mapping[str, Any], number: int, column: str, name: str) -> dict[str, Any]:
    """The columns of ours; of a completion, which both rows end with, the teacher reads the student's tokens."""
    ids, labels, theirs, their_labels = (row[key] for key in ("input_ids", "labels", _IDS, _LABELS))
    ours, others = _scored(labels), _scored(their_labels)
    if column == _PROMPT and ours and others:
        # Where the two prompts end in other tokens those of the completion may be cut otherwise: the student's count.
        theirs = theirs[: others[0]] + ids[ours[0] :]
        others = [others[0] + place - ours[0] for place in ours]
    if [ids[place] for place in ours] != [theirs[place] for place in others]:
        raise ValueError(
            f"Row {number} (from 0) of {name}: the student is scored on {len(ours)} tokens, and the teacher, which "
            f"reads {column!r}, would predict {len(others)}, or other ones. What the assistant says must be the same "
            "in both."
        )
    places = [NOWHERE] * len(ids)
    for ours_at, theirs_at in zip(ours, others, strict=True):
        if ours_at and not theirs_at:
            raise ValueError(_empty(column, number, name))
        # The first token of a row is not predicted.
        places[ours_at] = theirs_at if ours_at else NOWHERE
    return {READ: [json.dumps(theirs), *[""] * (len(ids) - 1)][: len(ids)], PLACES: places}


def _empty(column: str, number: int, name: str) -> str:
    return (
        f"Row {number} (from 0) of {name} has an empty {column!r}: the teacher has nothing to predict the first token "
        "from. Fill it in, or leave the row out."
    )


def _scored(labels: list[int]) -> list[int]:
    return [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
