"""One tiny chain for the tests that only read one, and a Hub to which it goes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cbd_trl import Chain
from tests.chain.helpers import build_tiny_chain
from tests.chain.hub_repositories import Hub
from tests.chain.hub_server import go_online, serving


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
