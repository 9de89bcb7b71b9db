"""Calibration text: rows of any SFT dataset format as blocks of tokens."""

from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, is_conversational

from cbd_trl.utils.blocks import TokenBlocks, cut_blocks

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
) -> TokenBlocks:
    """The first rows of a dataset, one after the other, as at most `max_tokens` tokens in blocks of one length.

    Raises:
        ValueError: the dataset holds no token to predict.
    """
    return cut_blocks(_token_rows(dataset, tokenizer, text_field), tokenizer, max_tokens, block_length)
