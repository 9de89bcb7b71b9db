"""Fixtures shared by all tests: no network, no GPU, one thread; a tiny chain that is only read, and a Hub."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from transformers import PreTrainedTokenizerFast

from cbd_trl import Chain
from tests.chain.helpers import build_tiny_chain
from tests.chain.hub_repositories import Hub
from tests.chain.hub_server import go_online, serving
from tests.processes import settle
from tests.tokenizer import tiny_tokenizer


def pytest_configure(config: pytest.Config) -> None:
    """Name the warnings of the libraries that no code of ours can avoid."""
    # TRL's configs set the old name by default, and transformers 5.2x warns about it on every config.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:`gradient_checkpointing(_kwargs)?` is deprecated and will be removed in v6:FutureWarning",
    )


def pytest_collection_finish() -> None:
    """Every module of the tests is imported now."""
    settle()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 60 tokens with pad, eos and a chat template."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def chain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_chain(tmp_path_factory.mktemp("built") / "chain").path


@pytest.fixture(scope="session")
def chain(chain_folder: Path) -> Chain:
    return Chain.from_pretrained(chain_folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub with two users, an empty cache, and a client that may go online and is logged in as "me"."""
    with serving(Hub({"token-of-me": "me", "token-of-you": "you"})) as server:
        go_online(monkeypatch, server, tmp_path / "cache")
        yield server
