"""Calibration text: rows of any SFT dataset format as blocks of tokens."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, is_conversational

BLOCK_LENGTH = 512


def calibration_length(config: PretrainedConfig) -> int:
    """Tokens in a calibration block: no more than the model has positions for."""
    return min(BLOCK_LENGTH, int(config.max_position_embeddings))


def row_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, text_field: str = "text") -> str:
    """One row of a language-modelling or prompt-completion dataset, plain or conversational, as text.

    Raises:
        ValueError: the row has none of the known columns.
    """
    if is_conversational(row):
        row = apply_chat_template(
            {key: row[key] for key in ("messages", "prompt", "completion") if key in row}, tokenizer
        )
    if isinstance(row.get(text_field), str):
        return str(row[text_field])
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return str(row["prompt"] + row["completion"])
    raise ValueError(
        f"A dataset row has the columns {sorted(row)}, and none of the SFT formats: {text_field!r}, 'messages', or "
        "'prompt' and 'completion' (or 'input_ids', already tokenised). Rename the columns or set "
        "`dataset_text_field`."
    )


def _token_rows(dataset: Iterable[Any], tokenizer: PreTrainedTokenizerBase, text_field: str) -> Iterator[list[int]]:
    for row in dataset:
        if "input_ids" in row:
            yield list(row["input_ids"])
            continue
        ids = tokenizer(row_text(row, tokenizer, text_field))["input_ids"]
        end = tokenizer.eos_token_id
        yield ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def token_blocks(
    dataset: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    block_length: int = BLOCK_LENGTH,
    text_field: str = "text",
) -> torch.Tensor:
    """The first `max_tokens` tokens of a dataset, rows one after the other, as (N, block length) int64.

    Raises:
        ValueError: the dataset holds less than two tokens.
    """
    tokens: list[int] = []
    for ids in _token_rows(dataset, tokenizer, text_field):
        tokens.extend(ids)
        if len(tokens) >= max_tokens:
            break
    tokens = tokens[:max_tokens]
    length = min(block_length, len(tokens))
    if length < 2:
        raise ValueError(
            f"The dataset holds {len(tokens)} tokens, too few to calibrate on. Give a dataset with text in it."
        )
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length]).view(count, length)
