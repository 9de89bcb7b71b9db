"""Held-out text as token blocks, the same tokens for every model, and what a loss on them is in bits per byte."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.losses.reduction import scored_targets
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.calibration import token_blocks
from cbd_trl.utils.datasets import sft_dataset


def held_out_rows(rows: Iterable[Mapping[str, Any]], column: str) -> Any:
    """Held-out text as a data set, checked whole.

    Args:
        rows: of any SFT format.
        column: what is measured: "text" stands for whatever the format has, any other name for that column alone.

    Returns:
        a `Dataset`, or an `IterableDataset`.

    Raises:
        ValueError: a row has no text there; the message names the columns that the rows have.
    """
    if column == "text":
        return sft_dataset(rows, "the held-out text")
    for row in rows:
        if not isinstance(row.get(column), str):
            found = f"{type(row[column]).__name__} in the column" if column in row else "no column"
            raise ValueError(
                f"A row of the held-out text has {found} {column!r}, of which text is to be measured; its columns are "
                f"{sorted(row)}. Name one that holds text in every row, or leave --text_column (text_field) out: "
                "'text', chats, and prompts with completions are found by themselves."
            )
    return Dataset.from_dict({"text": [row[column] for row in rows]})


def held_out_blocks(tokenizer: Any, texts: Any, length: int, count: int) -> TokenBlocks:
    """The first `count` blocks of `length` tokens of held-out text, each row read as training would read it.

    Args:
        tokenizer: a transformers tokenizer; special tokens written in the texts are read as such.
        texts: texts, or rows of any SFT format (chats are read in the chat template), in order until there are enough
            tokens. A plain text ends with the end-of-text token.
        length: T.
        count: N.

    Raises:
        ValueError: if the texts are too short.
    """
    if not isinstance(texts, Dataset | IterableDataset):
        texts = [{"text": text} if isinstance(text, str) else text for text in texts]
    blocks = token_blocks(texts, tokenizer, length * count, length)
    found = tuple(blocks.input_ids.shape)
    if found != (count, length):
        raise ValueError(
            f"The held-out texts fill {found[0]} blocks of {found[1]} tokens, {count} blocks of {length} are needed: "
            "the same number for every model. Give more texts, or ask for fewer or shorter blocks."
        )
    return blocks


def scored_bytes(tokenizer: Any, blocks: TokenBlocks) -> int | None:
    """Count the bytes of text that the scored tokens of the blocks stand for.

    Args:
        tokenizer: the one the blocks were made with.
        blocks: held-out text.

    Returns:
        their number; a special token, such as the end of a text, stands for none. None where the tokens do not tell
        their bytes (see `token_bytes`) or stand for no text at all: the loss can be told, bits per byte cannot.
    """
    try:
        texts = token_bytes(tokenizer)
    except ValueError:
        return None
    lengths = torch.tensor([len(data or b"") for data in texts])
    return int(lengths[scored_targets(blocks.labels)].sum()) or None


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """A held-out loss in a unit that does not depend on the tokenizer.

    Args:
        loss: nats per scored token.
        tokens: scored tokens.
        num_bytes: bytes they stand for, from `scored_bytes`.
    """
    return loss * tokens / (math.log(2) * num_bytes)


def add_bits_per_byte(report: Mapping[str, Any], tokenizer: Any, blocks: TokenBlocks) -> None:
    """Put "bits_per_byte" beside every loss of a sweep, in place: None where the tokens do not tell their bytes.

    Args:
        report: what `sweep` returned; each anchor gets a number, each target {operator: number}.
        tokenizer: the one the blocks were made with.
        blocks: that the losses were measured on.
    """
    count = scored_bytes(tokenizer, blocks)

    def bits(loss: float) -> float | None:
        return None if count is None else bits_per_byte(loss, blocks.scored, count)

    for entry in report["anchors"]:
        entry["bits_per_byte"] = bits(entry["loss"])
    for entry in report["targets"]:
        entry["bits_per_byte"] = {name: bits(loss) for name, loss in entry["loss"].items()}
