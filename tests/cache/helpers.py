"""A tiny teacher, rows of tokens, and what it says about them by the plainest way."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig

from cbd_trl.cache.format import Settings
from cbd_trl.cache.shards import CachedRow


def make_args(folder: Any, **overrides: Any) -> SFTConfig:
    """SFTConfig for the CPU, quiet."""
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_length": 32}
    return SFTConfig(str(folder), **{**quiet, **overrides})


def token_dataset(count: int = 12, seed: int = 0, vocabulary: int = 60, longest: int = 14) -> Dataset:
    """Tokenized rows of 3 to `longest` tokens."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(6, vocabulary, generator.integers(3, longest + 1)).tolist() for _ in range(count)]
    return Dataset.from_dict({"input_ids": rows})


@torch.no_grad()
def direct_log_probs(model: Any, token_ids: list[int], temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) at the positions of one row, (n - 1, V)."""
    logits = model(input_ids=torch.tensor([token_ids])).logits[0, :-1].float()
    return torch.log_softmax(logits / temperature, -1)


def make_settings(**overrides: Any) -> Settings:
    """Settings of a top-k cache of no model."""
    defaults = {"kind": "top_k", "vocabulary_rows": 64, "teacher": None, "teacher_fingerprint": "x"}
    return Settings(
        **{**defaults, "tokenizer_sha256": None, "k": 4, "temperature": 1.0, "value_bits": 16, **overrides}
    )


def random_prediction(positions: int, vocabulary: int, k: int, seed: int = 0) -> CachedRow:
    """Distinct ids anywhere in the vocabulary, log-probabilities that sum to less than 1."""
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.choice(vocabulary, k, replace=False) for _ in range(positions)]).astype(np.int32)
    logs = torch.log_softmax(torch.from_numpy(generator.normal(size=(positions, k + 1)).astype(np.float32)) * 3, -1)
    return CachedRow(logs[:, 0].clone(), torch.from_numpy(ids), logs[:, :-1].clone(), logs[:, -1].clone())
