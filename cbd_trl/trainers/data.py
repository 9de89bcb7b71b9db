"""Rows of a dataset: checks before a token is trained on, and the outputs of a cached teacher beside their tokens.

Shapes: B batch rows, T tokens, K kept entries of a position, D teacher width.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import is_conversational
from trl.data_utils import get_dataset_column_names, is_conversational_from_value

from cbd_trl.architectures.base import check_positions, learned_positions_of
from cbd_trl.cache.reader import CachedTeacher, TeacherCache
from cbd_trl.losses.reduction import Scored
from cbd_trl.utils.blocks import IGNORE_INDEX
from cbd_trl.utils.datasets import as_stream, example_rows, is_prepared, prepare, template_reads
from cbd_trl.utils.teacher_rows import PLACES, READ, check_teacher_column, read_teacher_row, teacher_column

# Rows whose lengths are read at a time.
_ROWS = 10_000


def check_end_token(dataset: Any, tokenizer: Any, args: Any, name: str) -> None:
    """Check that the tokenizer has the end token which rows of plain text get.

    Args:
        dataset: as given: not prepared yet.
        tokenizer: of the data.
        args: of the run, a `trl.SFTConfig`.
        name: of the dataset.

    Raises:
        ValueError: it has none, and the rows are plain text.
    """
    if (args.eos_token or tokenizer.eos_token) is not None or "input_ids" in get_dataset_column_names(dataset):
        return
    first: dict[str, Any] = next(iter(dataset))
    if is_conversational(first) or is_conversational_from_value(first):
        return
    raise ValueError(
        f"The tokenizer ({type(tokenizer).__name__}) has no end token (eos_token), and the {name} dataset is of plain "
        "text, to each row of which SFT adds one: the student would never learn to stop. Set tokenizer.eos_token to "
        "a token of its vocabulary, or name one as eos_token in the arguments."
    )


def check_scored(dataset: Any, args: Any, name: str) -> None:
    """Check that some token of a dataset is scored.

    Args:
        dataset: prepared. Of a stream the first row is looked for: TRL leaves out those that are masked as a whole.
        args: of the run.
        name: of the dataset.

    Raises:
        ValueError: there is no scored token.
    """
    if not isinstance(dataset, Dataset):
        scored = next(iter(dataset), None) is not None
    elif "labels" in dataset.column_names:
        scored = any(_is_scored(labels) for row in dataset.select_columns("labels") for labels in row.values())
    else:
        scored = len(dataset) > 0
    if not scored:
        raise ValueError(_nothing_scored(args, name))


def check_lengths(dataset: Any, positions: int | None, args: Any, padding_free: bool, model: str, name: str) -> None:
    """Check that no row is longer than a model has positions.

    Args:
        dataset: prepared, or `None`. Of a stream the length that rows are cut to is what counts.
        positions: that the model has learned; None for one whose rows may be of any length.
        args: of the run.
        padding_free: whether positions begin anew with each row of a pack.
        model: names the model.
        name: of the dataset.

    Raises:
        ValueError: there are such rows, or may be.
    """
    columns = get_dataset_column_names(dataset) if positions is not None and dataset is not None else []
    if "input_ids" not in columns:
        return
    way_out = f"Set max_length={positions} or less (it is {args.max_length}), or cut the rows."
    longest, row = _longest(dataset, padding_free), f"A row of the {name} dataset"
    if longest is None:
        if args.max_length is not None and args.max_length <= positions:
            return
        raise ValueError(
            f"max_length={args.max_length}: rows of the {name} dataset, a stream, may be longer than the {positions} "
            f"positions that {model} has learned, and what stands behind them cannot be read. {way_out}"
        )
    if args.pad_to_multiple_of and not padding_free:
        longest = -(-longest // args.pad_to_multiple_of) * args.pad_to_multiple_of
        row += f", padded to a multiple of {args.pad_to_multiple_of},"
        way_out = f"Lower pad_to_multiple_of, or set max_length to less (it is {args.max_length})."
    check_positions(longest, positions, row, model, way_out)


def check_ids(dataset: Any, vocabulary: int, model: str, name: str) -> None:
    """Check that a model has a vocabulary row for every token id.

    Args:
        dataset: prepared, or None. Rows of a stream are not looked at.
        vocabulary: rows of the model's table.
        model: names the model.
        name: of the dataset.

    Raises:
        ValueError: there is one.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    for batch in dataset.select_columns("input_ids").with_format("arrow").iter(_ROWS):
        highest = pc.max(pc.list_flatten(batch["input_ids"])).as_py()
        if highest is not None and highest >= vocabulary:
            raise ValueError(
                f"A row of the {name} dataset has the token id {highest}, and {model} has {vocabulary} vocabulary "
                "rows: it was made with another tokenizer. Tokenize it with the model's own, or give the text."
            )


def check_before_preparing(
    dataset: Any, eval_dataset: Any, args: Any, tokenizer: PreTrainedTokenizerBase, config: Any
) -> None:
    """Check the rows of a training that comes after other work, as its trainer will.

    Args:
        dataset: as given, not prepared.
        eval_dataset: likewise, or a dict of them, or None.
        args: of the run.
        tokenizer: of the data.
        config: of the model that reads the rows.

    Raises:
        ValueError: see the other checks.
    """
    if not isinstance(dataset, Dataset) and args.max_steps <= 0:
        raise ValueError(
            f"The training dataset is a stream, whose length is not known, and max_steps={args.max_steps}. Set "
            "max_steps, or give a datasets.Dataset."
        )
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r}, and there is nothing to evaluate on. Give an eval_dataset, "
            "or leave eval_strategy out."
        )
    if is_prepared(args):
        return
    positions = learned_positions_of(config)
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, rows in {"training": dataset, **evaluated}.items():
        if rows is None:
            continue
        if teacher_column(rows) is not None:
            check_teacher_column(rows, args, f"the {name} dataset")
        check_end_token(rows, tokenizer, args, name)
        check_ids(rows, config.vocab_size, f"the anchor ({config.model_type})", name)
        with template_reads(rows, tokenizer, args, f"the {name} dataset"):
            scored = any(_is_scored(row["labels"]) for row in _prepared(rows, args, tokenizer))
        if not scored:
            raise ValueError(_nothing_scored(args, name))
        if positions is not None and (args.max_length is None or args.max_length > positions):
            _check_each(_prepared(rows, args, tokenizer), positions, args, config.model_type, name)


class ScoredCollator:
    """A collator that adds the scored positions, as long as the labels are on the host.

    Args:
        inner: makes the batch.
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: rows of the dataset, or packs of rows.

        Returns:
            the inner batch and `scored`, a `cbd_trl.losses.reduction.Scored`.
        """
        batch = self.inner(examples)
        return {**batch, "scored": Scored.of(batch["labels"])}


class TeacherRowsCollator:
    """A collator that adds what the teacher reads, where that is another prompt than the student's.

    Args:
        inner: makes the student's batch, padded, padding-free or packed.
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: rows of the dataset, or packs of rows.

        Returns:
            the inner batch; for rows with `READ` and `PLACES` also `teacher_ids` and `teacher_mask` (R, U) int64, one
            row for each of the student's, and `teacher_scored`, a `Scored` of the teacher's positions before the
            tokens that the student is scored on, in their order.

        Raises:
            ValueError: if a row does not lie in the batch where it should.
        """
        batch = self.inner(examples)
        if not any(READ in example for example in examples):
            return batch
        rows = [read for _, _, read in _rows_beside(examples, batch, self.inner)]
        ids_RU = torch.zeros(len(rows), max(len(ids) for ids, _ in rows), dtype=torch.long)
        mask_RU, before = torch.zeros_like(ids_RU), []
        for number, (ids, places_T) in enumerate(rows):
            ids_RU[number, : len(ids)], mask_RU[number, : len(ids)] = torch.from_numpy(ids), 1
            before.append(number * ids_RU.shape[1] + places_T[places_T >= 0] - 1)
        scored = Scored(torch.from_numpy(np.concatenate(before)))
        targets_N = Scored.of(batch["labels"]).select_next(batch["input_ids"])
        if not torch.equal(scored.select_next(ids_RU), targets_N):
            raise ValueError(
                f"{type(self.inner).__name__} scores other tokens than the dataset's labels do: the teacher, which "
                "reads prompts of its own, has no place for them. Use TRL's collator."
            )
        return {**batch, "teacher_ids": ids_RU, "teacher_mask": mask_RU, "teacher_scored": scored}


def read_from_cache(teacher: CachedTeacher, collator: Any, datasets: Iterable[Any]) -> Any:
    """Make a collator that adds a cached teacher's output to each batch, after checking that the cache has every row.

    Args:
        teacher: reads the cache.
        collator: of the trainer.
        datasets: prepared ones, to be looked up before training; streams, and rows that a collator of the user's turns
            into tokens, are looked up as they come.

    Returns:
        the collator to use instead.

    Raises:
        ValueError: if rows are not in the cache.
    """
    for dataset in datasets:
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            columns = [name for name in ("input_ids", "seq_lengths", READ, PLACES) if name in dataset.column_names]
            examples = dataset.select_columns(columns)
            teacher.cache.check_rows(read for one in examples for _, read, _ in _read_rows(one))
    return CachedTeacherCollator(collator, teacher.cache)


class CachedTeacherCollator:
    """A collator that looks every row of its batch up in a teacher cache.

    In padded, padding-free and packed batches alike the teacher's output stands at the position of the student's for
    the same token, and the tokens are compared once more. Of rows whose teacher reads a prompt of its own, the row
    that it reads is looked up.

    Args:
        inner: makes the batch, such as TRL's `DataCollatorForLanguageModeling`.
        cache: of the teacher.
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Any]], cache: TeacherCache) -> None:
        self.inner = inner
        self.cache = cache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: rows of the dataset, or packs of rows with their `seq_lengths`.

        Returns:
            the inner batch, and at position t what was predicted of token t + 1, 0 where nothing was:
            `teacher_target` (B, T) float32; and of top_k and sampled `teacher_indices` (B, T, K) int32 and
            `teacher_log_probs` (B, T, K) float32, of top_k `teacher_tail` (B, T) float32, of hidden `teacher_hidden`
            (B, T, D).

        Raises:
            ValueError: if a row is not in the cache, or does not lie in the batch where it should.
        """
        batch = self.inner(examples)
        batch.update(self._teacher(examples, batch))
        return batch

    def _teacher(self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = _empty(self.cache, *batch["input_ids"].shape)
        for line, start, (ids, places_T) in _rows_beside(examples, batch, self.inner):
            found = self.cache.lookup(ids)
            scored = np.flatnonzero(places_T >= 1)
            for name, tensor in tensors.items():
                tensor[line, start + scored - 1] = getattr(found, name.removeprefix("teacher_"))[places_T[scored] - 1]
        return tensors


def _read_rows(example: Mapping[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each row of an example its tokens, those that the teacher reads, and where each of the former stands in them
    (-1 for those that it does not predict)."""
    start = 0
    for row in example_rows(example):
        if READ not in example:
            yield row, row, np.arange(len(row))
        elif len(row):
            yield row, *read_teacher_row(example, start, len(row))
        start += len(row)


def _rows_beside(
    examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], collator: Any
) -> Iterator[tuple[int, int, tuple[np.ndarray, np.ndarray]]]:
    """For each row its line and first token in the batch, and what the teacher reads of it: ids and places.

    Raises:
        ValueError: if it does not lie there.
    """
    ids_BT = batch["input_ids"]
    flat = "attention_mask" not in batch
    start = 0
    for number, example in enumerate(examples):
        line = 0 if flat else number
        start = start if flat else 0
        for row, *read in _read_rows(example if "input_ids" in example else _collated(batch, number)):
            place = ids_BT[line, start : start + len(row)]
            if not torch.equal(place, torch.from_numpy(row).to(place.dtype)):
                raise ValueError(
                    f"{type(collator).__name__} did not put a row of {len(row)} tokens at token {start} of batch row "
                    f"{line}: the teacher's predictions would stand at other tokens. Use TRL's collator, which pads "
                    "on the right."
                )
            yield line, start, (read[0], read[1])
            start += len(row)


def _check_each(rows: Iterator[Mapping[str, Any]], positions: int, args: Any, family: str, name: str) -> None:
    wrapped = args.packing and args.packing_strategy == "wrapped"
    for number, row in enumerate(rows):
        length = args.max_length if wrapped else len(row["input_ids"])
        check_positions(
            length,
            positions,
            f"Row {number} of the {name} dataset",
            f"the anchor ({family})",
            f"Set max_length={positions} or less (it is {args.max_length}), or cut the rows.",
        )


def _prepared(dataset: Any, args: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[Mapping[str, Any]]:
    """The rows as TRL prepares and cuts them, one by one."""
    options = copy.copy(args)
    if args.packing and args.packing_strategy != "bfd":
        # What does not fit is carried over.
        options.max_length = None
    return iter(prepare(as_stream(dataset), tokenizer, options))


def _is_scored(labels: Any) -> bool:
    # The first token of a row is never predicted.
    return any(label != IGNORE_INDEX for label in labels[1:])


def _nothing_scored(args: Any, name: str) -> str:
    return (
        f"No token of the {name} dataset is scored: max_length={args.max_length} (truncation_mode="
        f"{args.truncation_mode!r}) cuts every completion off, or its rows are empty, of one token or masked. Raise "
        "max_length, keep the end of the rows (truncation_mode='keep_end'), or give other rows."
    )


def _longest(dataset: Any, padding_free: bool) -> int | None:
    """Tokens of the longest row; None for a stream."""
    if not isinstance(dataset, Dataset):
        return None
    by_row = padding_free and "seq_lengths" in dataset.column_names
    column = "seq_lengths" if by_row else "input_ids"
    longest = 0
    for batch in dataset.select_columns(column).with_format("arrow").iter(_ROWS):
        lengths = pc.list_flatten(batch[column]) if by_row else pc.list_value_length(batch[column])
        longest = max(longest, pc.max(lengths).as_py() or 0)
    return longest


def _collated(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A row whose tokens the collator made."""
    ids_T = batch["input_ids"][number]
    return {"input_ids": ids_T[batch["attention_mask"][number].bool()] if "attention_mask" in batch else ids_T}


def _empty(cache: TeacherCache, batch: int, length: int) -> dict[str, Tensor]:
    settings = cache.settings
    tensors = {"teacher_target": torch.zeros(batch, length)}
    if settings.kind == "hidden":
        assert settings.hidden_size is not None and settings.hidden_dtype is not None
        hidden = torch.zeros(batch, length, settings.hidden_size, dtype=getattr(torch, settings.hidden_dtype))
        return tensors | {"teacher_hidden": hidden}
    assert settings.k is not None
    tensors["teacher_indices"] = torch.zeros(batch, length, settings.k, dtype=torch.int32)
    tensors["teacher_log_probs"] = torch.zeros(batch, length, settings.k)
    return tensors | ({"teacher_tail": torch.zeros(batch, length)} if settings.kind == "top_k" else {})
