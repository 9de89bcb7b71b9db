"""Calibration text: rows of any SFT dataset format as blocks of tokens."""

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import SFTConfig

from cbd_trl.utils.blocks import TokenBlocks, cut_blocks
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
) -> TokenBlocks:
    """Cut the first rows of a dataset, one after the other, as at most `max_tokens` tokens in blocks of one length.

    Args:
        dataset: in any format of SFTTrainer, read no further than is needed.
        tokenizer: of the model.
        max_tokens: taken at most.
        block_length: tokens in a block at most.
        args: of the training, which decide how rows are read and cut; None for text that nothing is trained on.

    Raises:
        ValueError: the dataset cannot be read, or holds no token to predict.
    """
    return cut_blocks(token_rows(dataset, tokenizer, args), tokenizer, max_tokens, block_length)
