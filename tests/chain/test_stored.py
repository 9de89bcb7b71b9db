"""Chains on users' disks stay readable, and a manifest is read without loading torch."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from cbd_trl import Chain, build_chain, from_chain
from cbd_trl.chain.manifest import read_manifest, write_manifest
from tests.chain.helpers import chain_config, chain_rows
from tests.stored import CHAIN, stored_teacher
from tests.tokenizer import tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A copy, since writing cards beside it would change it."""
    return shutil.copytree(CHAIN, tmp_path / "chain")


def test_a_stored_chain_is_verified_and_read(folder):
    chain = Chain.from_pretrained(folder)
    upper, lower = chain.anchors
    assert (upper.num_parameters, lower.num_parameters, lower.parent) == (6896, 4944, upper.name)
    assert (lower.block_map, lower.kept_layers, lower.tokens_seen) == ([[0, 1], [2]], [0, 2], 45)
    assert lower.arguments["learning_rate"] == 0.01 and lower.losses["teacher_ce"] == pytest.approx(4.529, abs=1e-3)
    assert chain.tokenizer().get_vocab() == tiny_tokenizer().get_vocab()
    assert all(anchor.load_statistics().tokens for anchor in chain.anchors)
    # The source in other coordinates, in bfloat16.
    tokens = torch.arange(3, 40)[None]
    found, expected = upper.load_model(torch.float32)(tokens).logits, stored_teacher()(tokens).logits
    assert (found - expected).abs().max() < 0.1 * expected.std()


def test_a_stored_chain_makes_models(folder):
    chain = Chain.from_pretrained(folder)
    lower = chain.anchors[1]
    made = from_chain(folder, config={"num_hidden_layers": 2, "intermediate_size": 24})
    assert made.num_parameters() == lower.num_parameters
    assert all(torch.equal(made.state_dict()[key], tensor) for key, tensor in lower.load_state_dict().items())


def test_a_build_goes_on_from_a_stored_chain(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.name != "README.md" and path.is_file()}
    anchors = [{"num_hidden_layers": 2}]
    options = {"dataset": chain_rows(), "processing_class": tiny_tokenizer(), "calibration_tokens": 256}
    build_chain(stored_teacher().bfloat16(), anchors, output_dir=folder, args=chain_config(max_steps=1), **options)
    assert {path: path.read_bytes() for path in before} == before


def test_the_manifest_is_written_as_it_was_read(folder):
    text = (folder / "chain.json").read_text()
    write_manifest(folder, read_manifest(folder))
    assert (folder / "chain.json").read_text() == text


_READ = """
import sys
from pathlib import Path
from cbd_trl.chain.manifest import read_manifest
print(read_manifest(Path(sys.argv[1])).anchors[0].name)
loaded = [name for name in ("torch", "transformers", "trl", "datasets", "numpy") if name in sys.modules]
assert not loaded, loaded
"""


def test_reading_a_manifest_loads_no_torch(folder):
    body = json.loads((folder / "chain.json").read_text())
    done = subprocess.run([sys.executable, "-c", _READ, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == body["anchors"][0]["name"]
