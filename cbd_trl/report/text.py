"""Held-out text as token blocks, the same number of tokens for every model.

Shapes: N blocks, T tokens in each.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.chain.calibration import token_blocks
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


def held_out_blocks(tokenizer: Any, texts: Any, length: int, count: int) -> Tensor:
    """The first `count` blocks of `length` tokens of held-out text, each row read as training would read it.

    Args:
        tokenizer: a transformers tokenizer; special tokens written in the texts are read as such.
        texts: texts, or rows of any SFT format (chats are read in the chat template), in order until there are enough
            tokens. A plain text ends with the end-of-text token.
        length: T.
        count: N.

    Returns:
        (N, T) int64.

    Raises:
        ValueError: if the texts are too short.
    """
    if not isinstance(texts, Dataset | IterableDataset):
        texts = [{"text": text} if isinstance(text, str) else text for text in texts]
    blocks = token_blocks(texts, tokenizer, length * count, length)
    if tuple(blocks.shape) != (count, length):
        raise ValueError(
            f"The held-out texts fill {len(blocks)} blocks of {blocks.shape[1]} tokens, {count} blocks of {length} "
            "are needed: the same number for every model. Give more texts, or ask for fewer or shorter blocks."
        )
    return blocks


def scored_bytes(tokenizer: Any, blocks: Tensor) -> int:
    """Bytes of text that the predicted tokens of the blocks stand for: of all but the first token of each.

    Args:
        tokenizer: the one the blocks were made with, one that keeps every byte (see `token_bytes`).
        blocks: (N, T) int64.

    Returns:
        their number; a special token, such as the end of a text, stands for none.

    Raises:
        ValueError: the tokenizer's tokens do not tell their bytes.
    """
    lengths = torch.tensor([len(data or b"") for data in token_bytes(tokenizer)])
    return int(lengths[blocks[:, 1:]].sum())


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """A held-out loss in a unit that does not depend on the tokenizer.

    Args:
        loss: nats per predicted token.
        tokens: predicted tokens.
        num_bytes: bytes they stand for, from `scored_bytes`.
    """
    return loss * tokens / (math.log(2) * num_bytes)
