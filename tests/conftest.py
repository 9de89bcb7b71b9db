"""Fixtures shared by all tests: no network, no GPU, one thread."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.budget import pytest_terminal_summary
from tests.tokenizer import tiny_tokenizer

__all__ = ["pytest_terminal_summary"]  # a hook: a table of what each folder of tests took

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Name the warnings of the libraries that no code of ours can avoid."""
    # TRL's configs set the old name by default, and transformers 5.2x warns about it on every config.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:`gradient_checkpointing(_kwargs)?` is deprecated and will be removed in v6:FutureWarning",
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 60 tokens with pad, eos and a chat template."""
    return tiny_tokenizer()
