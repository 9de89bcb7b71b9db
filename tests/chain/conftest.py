"""One tiny chain for the tests that only read one."""

from pathlib import Path

import pytest

from cbd_trl import Chain
from tests.chain.helpers import build_tiny_chain


@pytest.fixture(scope="session")
def chain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_chain(tmp_path_factory.mktemp("built") / "chain").path


@pytest.fixture(scope="session")
def chain(chain_folder: Path) -> Chain:
    return Chain.from_pretrained(chain_folder)
