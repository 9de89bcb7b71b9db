"""Token rows as blocks: the one place where text is cut for a model to read, be it measured or calibrated on.

Shapes: N blocks, T tokens in each.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import SFTConfig

from cbd_trl.utils.datasets import token_rows

# The label of a token that is not scored, in torch and everywhere after it.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class TokenBlocks:
    """Text in blocks of one length, without padding.

    Args:
        input_ids: (N, T) int64, what a model reads. Every block begins with `start`.
        labels: (N, T) int64, the same tokens, -100 where one is read but never scored: `start`, in front of a block
            and in front of a row inside a block. Not shifted: the first token of a block is nobody's prediction.
        start: token ids that begin a text; empty where the tokenizer begins one with nothing.
    """

    input_ids: Tensor
    labels: Tensor
    start: tuple[int, ...] = ()

    def __len__(self) -> int:
        """N."""
        return len(self.input_ids)

    @property
    def scored(self) -> int:
        """How many tokens are predicted and scored."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


def marks_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find the ids that a tokenizer puts before a text by itself, such as BOS, and those behind it.

    Args:
        tokenizer: any.
    """
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    # Of a vocabulary that has no "a" nothing is between.
    starts = range(len(whole) - len(bare) + 1) if bare else [len(whole)]
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
    return ([], []) if start is None else (whole[:start], whole[start + len(bare) :])


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the ids that a tokenizer puts before a text by itself, such as BOS.

    Args:
        tokenizer: any.
    """
    return marks_around(tokenizer)[0]


def cut_blocks(
    rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, max_tokens: int, block_length: int
) -> TokenBlocks:
    """Cut rows of tokens, one after the other, into blocks that each begin as the tokenizer begins a text.

    A model that was trained with BOS in front reads a block that begins in the middle of a row without it 0.7 to 1.4
    nats a token worse (Gemma 3 270M). So where a block ends inside a row, the next one goes on behind a BOS of its
    own; a row that has one gets no second.

    Args:
        rows: token ids of each row; read no further than needed.
        tokenizer: theirs.
        max_tokens: of all blocks together, at most.
        block_length: T; where there are fewer tokens, one shorter block.

    Raises:
        ValueError: there is no token to predict, or no room for one in a block.
    """
    rows = iter(rows)
    first = list(itertools.islice(rows, 1))
    start = _text_start(tokenizer, first[0] if first else ())
    length = min(block_length, max_tokens)
    if length <= len(start):
        raise ValueError(
            f"Blocks of {length} tokens hold nothing but what the tokenizer begins a text with ({list(start)}). Ask "
            f"for {len(start) + 1} or more."
        )
    ids: list[int] = []
    labels: list[int] = []
    for row in itertools.chain(first, rows):
        begins = bool(start) and tuple(row[: len(start)]) == start
        content = list(row[len(start) :] if begins else row)
        while len(ids) < max_tokens and (content or begins):
            room = length - len(ids) % length
            front = start[:room] if begins or room == length else ()
            part = content[: room - len(front)]
            ids += [*front, *part]
            labels += [*[IGNORE_INDEX] * len(front), *part]
            content, begins = content[len(part) :], False
        if len(ids) >= max_tokens:
            break
    length = min(length, len(ids))
    whole = len(ids) - len(ids) % length if length else 0
    shape = (-1, max(length, 1))
    blocks = TokenBlocks(torch.tensor(ids[:whole]).view(shape), torch.tensor(labels[:whole]).view(shape), start)
    if not blocks.scored:
        count = sum(label != IGNORE_INDEX for label in labels)
        raise ValueError(f"The dataset holds {count} tokens, too few to calibrate on. Give a dataset with text in it.")
    return blocks


def _text_start(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> tuple[int, ...]:
    """What begins a text: what the tokenizer puts there, or BOS where a chat template alone writes it. In ChatML
    the token called BOS begins every turn, not the text."""
    bos = tokenizer.bos_token_id
    written = bos is not None and list(row[:1]) == [bos] and list(row).count(bos) == 1
    return tuple(prefix_ids(tokenizer) or ([bos] if written else []))


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
