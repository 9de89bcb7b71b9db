"""Held-out text as token blocks, the same number of tokens for every model.

Shapes: N blocks, T tokens in each.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from cbd_trl.chain.calibration import token_blocks


def held_out_blocks(tokenizer: Any, texts: Iterable[str], length: int, count: int) -> Tensor:
    """The first `count` blocks of `length` tokens of the texts, joined by the end-of-text token.

    Args:
        tokenizer: a transformers tokenizer; special tokens written in the texts are read as such.
        texts: held-out texts, read in order until there are enough tokens.
        length: T.
        count: N.

    Returns:
        (N, T) int64.

    Raises:
        ValueError: if the texts are too short.
    """
    rows = ({"text": text} for text in texts)
    blocks = token_blocks(rows, tokenizer, length * count, length)
    if tuple(blocks.shape) != (count, length):
        raise ValueError(
            f"The held-out texts fill {len(blocks)} blocks of {blocks.shape[1]} tokens, {count} blocks of {length} "
            "are needed: the same number for every model. Give more texts, or ask for fewer or shorter blocks."
        )
    return blocks
