"""Calibration text: rows of any SFT dataset format as blocks of tokens."""

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import SFTConfig

from cbd_trl.utils.datasets import token_rows

BLOCK_LENGTH = 512


def calibration_length(config: PretrainedConfig) -> int:
    """Tokens in a calibration block: no more than the model has positions for."""
    return min(BLOCK_LENGTH, int(config.max_position_embeddings))


def token_blocks(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    block_length: int = BLOCK_LENGTH,
    args: SFTConfig | None = None,
) -> torch.Tensor:
    """The first `max_tokens` tokens of a dataset, rows one after the other, as (N, block length) int64.

    Args:
        dataset: in any format of SFTTrainer, read no further than is needed.
        tokenizer: of the model.
        max_tokens: taken at most.
        block_length: tokens in a block at most.
        args: of the training, which decide how rows are read and cut; None for text that nothing is trained on.

    Raises:
        ValueError: the dataset cannot be read, or holds less than two tokens.
    """
    tokens: list[int] = []
    for ids in token_rows(dataset, tokenizer, args):
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
