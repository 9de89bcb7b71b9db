"""Two tiny chains: of tokens that tell their bytes, and of words, whose tokens do not; a report of the first."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from cbd_trl import build_chain
from cbd_trl.cli.main import main
from tests.bridge.tokenizers_of_kinds import corpus, make_tokenizer
from tests.chain.helpers import CHAIN_ANCHORS, UPPER_DEPTH, build_tiny_chain, chain_config, chain_rows
from tests.tiny import tiny_model

# The report that many tests read: as few tokens as tell the operators apart.
QUICK = ["--blocks", "3", "--block_length", "24", "--batch_size", "2"]


def run(*words: Any) -> tuple[int, str, str]:
    """`cbd-trl report`: its exit code, and what it showed on either stream."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["report", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


def report_of(folder: Path) -> Any:
    """What a report.json holds; a number that JSON does not have is an error."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


@pytest.fixture(scope="session")
def byte_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chain(
        tiny_model("llama", vocab_size=400, tie_word_embeddings=True, num_hidden_layers=UPPER_DEPTH),
        CHAIN_ANCHORS,
        dataset=Dataset.from_dict({"text": corpus(texts=12)}),
        output_dir=tmp_path_factory.mktemp("bytes") / "byte-chain",
        args=chain_config(),
        processing_class=make_tokenizer(size=400),
        calibration_tokens=256,
    ).path


@pytest.fixture(scope="session")
def word_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_chain(tmp_path_factory.mktemp("words") / "word-chain").path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Held-out text of characters of one to four bytes."""
    return ["数学 👩‍🔬 naïve", "a", *corpus(seed=5, texts=8)]


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    file = tmp_path_factory.mktemp("text") / "held-out.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text of the chain of words."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n".join(chain_rows(12, seed=4)["text"]))
    return file


@pytest.fixture(scope="session")
def measured(byte_chain: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole report."""
    folder = tmp_path_factory.mktemp("report") / "out"
    code, _, err = run(byte_chain, "--data", held_out, "--output", folder, *QUICK)
    assert code == 0, err
    return folder
