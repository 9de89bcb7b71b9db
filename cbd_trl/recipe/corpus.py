"""The text the package ships: instructions and answers written by SmolLM2-135M-Instruct (see NOTICE beside it)."""

import gzip
import json
from importlib.resources import files
from typing import Any

from datasets import Dataset

from cbd_trl.utils.blocks import prefix_ids

# Every tenth row is kept from training: what the losses are measured on.
HELD_OUT_EVERY = 10


def read_rows(limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of the corpus.

    Args:
        limit: only so many of them, from the start.

    Returns:
        [{"prompt": str, "completion": str, "complete": whether the answer ended by itself}].
    """
    packed = files("cbd_trl.recipe").joinpath("written.jsonl.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def as_chat(row: dict[str, Any], tokenizer: Any) -> str:
    """A row as the text of a conversation.

    Args:
        row: one of `read_rows`.
        tokenizer: with a chat template; without one, prompt and answer are joined by a line break.

    Returns:
        the text, special tokens written out but for those that the tokenizer puts before any text; an answer that was
        cut off has no end-of-turn mark.
    """
    if not getattr(tokenizer, "chat_template", None):
        return f"{row['prompt']}\n{row['completion']}"
    question = [{"role": "user", "content": row["prompt"]}]
    if row["complete"]:
        answer = {"role": "assistant", "content": row["completion"]}
        text = tokenizer.apply_chat_template([*question, answer], tokenize=False)
    else:
        text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False) + row["completion"]
    return text.removeprefix(tokenizer.decode(prefix_ids(tokenizer)))


def split(tokenizer: Any, limit: int | None = None) -> tuple[Dataset, list[str]]:
    """The corpus as conversations, for training and held out.

    Args:
        tokenizer: of the source.
        limit: only so many rows, from the start.

    Returns:
        the training rows, a dataset with one column "text", and the held-out texts.
    """
    texts = [as_chat(row, tokenizer) for row in read_rows(limit)]
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [text for number, text in enumerate(texts, start=1) if number % HELD_OUT_EVERY]
    return Dataset.from_dict({"text": training}), held_out
