"""One tiny chain for the tests that only read one, and a Hub to which it goes."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from transformers.utils import hub as transformers_hub

from cbd_trl import Chain, build_chain
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source
from tests.chain.hub_repositories import Hub
from tests.chain.hub_server import serving
from tests.tokenizer import tiny_tokenizer


@pytest.fixture(scope="session")
def chain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama chain of 6 layers, 4 layers, and 4 layers half as wide."""
    folder = tmp_path_factory.mktemp("built") / "chain"
    build_chain(
        chain_source(),
        CHAIN_ANCHORS,
        dataset=chain_rows(),
        output_dir=folder,
        args=chain_config(),
        processing_class=tiny_tokenizer(),
        eval_dataset=chain_rows(4, seed=9),
        calibration_tokens=256,
    )
    return folder


@pytest.fixture(scope="session")
def chain(chain_folder: Path) -> Chain:
    return Chain.from_pretrained(chain_folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub with two users, an empty cache, and a client that may go online and is logged in as "me"."""
    with serving(Hub({"token-of-me": "me", "token-of-you": "you"})) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Xet's own protocol is not HTTP requests that one could answer here; without it the client sends files by LFS.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "token-of-me")
        # transformers keeps a client, with the address of the first time.
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        # Between its tries the client waits for half a minute in all.
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        yield server
