"""One tiny chain for the tests that only read one."""

from pathlib import Path

import pytest

from cbd_trl import Chain, build_chain
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source
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
