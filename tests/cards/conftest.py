"""A chain built from a source on a Hub, with a card that states a license, and of text that is on the Hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cbd_trl import Chain, build_chain
from tests.cards.helpers import HUB_ROWS, SOURCE
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source
from tests.chain.hub_repositories import Hub
from tests.chain.hub_server import go_online, serving
from tests.tokenizer import tiny_tokenizer


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source's repository holds."""
    folder = tmp_path_factory.mktemp("on-the-hub") / "source"
    source = chain_source()
    # So that cards are followed in no time.
    source.generation_config.max_new_tokens = 3
    source.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: Apache-2.0\n---\n# A source\n")
    return folder


@pytest.fixture(scope="session")
def chain(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Of three anchors, in a folder called "tiny-chain"; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    rows = chain_rows(8)
    rows.info.download_checksums = {f"hf://datasets/{HUB_ROWS}@0123/rows.jsonl": {}}
    with serving(Hub()) as server, pytest.MonkeyPatch.context() as patch:
        go_online(patch, server, folder / "cache")
        patch.delenv("HF_TOKEN")
        server.commit(SOURCE, source_folder, "main")
        return build_chain(
            SOURCE,
            CHAIN_ANCHORS,
            dataset=rows,
            output_dir=folder / "tiny-chain",
            args=chain_config(max_steps=1, save_strategy="no"),
            calibration_tokens=64,
        )


@pytest.fixture
def hub(source_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that holds the source, and a client that is logged in as "me"."""
    with serving(Hub({"token-of-me": "me"})) as server:
        go_online(monkeypatch, server, tmp_path / "cache")
        server.commit(SOURCE, source_folder, "main")
        yield server
