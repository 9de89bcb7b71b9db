"""A teacher of tiny size that ends some of its completions, and prompts for it."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cbd_trl.generation import Corpus, DecodingConfig, generate_completions
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

# Of different lengths, so that batches are padded.
PROMPTS = [
    {"prompt": " ".join(f"w{(7 * i + 3 * j) % 54}" for j in range(n))} for i, n in enumerate((4, 1, 6, 2, 3, 5, 1))
]


def tiny_teacher(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A model of two layers whose end-of-text token is likely enough to be met."""
    model = tiny_model(family, **{"num_hidden_layers": 2, **overrides})
    model.lm_head.weight.data[2] *= 2.0
    return model


def complete(path: Path, model: Any = None, dataset: Any = None, **options: Any) -> Corpus:
    """Generate 8 tokens at most for each of `PROMPTS`.

    Args:
        path: of the file.
        model: instead of `tiny_teacher()`.
        dataset: instead of `PROMPTS`.
        options: fields of `DecodingConfig`, or arguments of `generate_completions`.
    """
    fields = DecodingConfig.__dataclass_fields__
    decoding = {"max_new_tokens": 8} | {name: options.pop(name) for name in list(options) if name in fields}
    arguments = {"processing_class": tiny_tokenizer(), "batch_size": 3, "disable_tqdm": True, "use_cpu": True}
    return generate_completions(
        tiny_teacher() if model is None else model,
        PROMPTS if dataset is None else dataset,
        path,
        decoding=DecodingConfig(**decoding),
        **{**arguments, **options},
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What is in a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def alone(model: Any, ids: list[int], **options: Any) -> list[int]:
    """The new tokens of greedy `model.generate` on one row, 8 at most."""
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, **options}
    written = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **options)
    return written[0, len(ids) :].tolist()
