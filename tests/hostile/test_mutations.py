"""Some hundreds of single bytes changed at random: the same is loaded, or a ValueError raised, and nothing else."""

import random

import pytest

from cbd_trl.chain.manifest import read_manifest
from cbd_trl.utils.model_folders import load_config
from cbd_trl.utils.tokenizers import stored_tokenizer_hash
from tests.hostile.test_headers import read_all
from tests.hostile.victim import LARGE

ROUNDS = 250


def flips(data, seed, most=None):
    """Copies of this with one byte changed, or several, among the first `most`."""
    choose = random.Random(seed)
    for _ in range(ROUNDS):
        changed = bytearray(data)
        for _ in range(choose.choice((1, 1, 1, 4))):
            changed[choose.randrange(most or len(changed))] ^= choose.randrange(1, 256)
        yield bytes(changed)


def outcome(read):
    """What a reader says: a value, or that it is a ValueError; anything else it raises is the test's failure."""
    try:
        return read()
    except ValueError:
        return None


def test_chain_json(folder):
    file = folder / "chain.json"
    good, refused = read_manifest(folder), 0
    for changed in flips(file.read_bytes(), seed=1):
        file.write_bytes(changed)
        found = outcome(lambda: read_manifest(folder))
        assert found is None or found == good
        refused += found is None
    assert refused > 0.9 * ROUNDS


@pytest.mark.parametrize("name", ["model.safetensors", "statistics.safetensors"])
def test_headers(folder, name):
    file = folder / LARGE / name
    data, good = file.read_bytes(), read_all(file)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for changed in flips(data, seed=2, most=header):
        file.write_bytes(changed)
        found = outcome(lambda: read_all(file))
        # Names, dtypes of one size and metadata are no matter of the header alone; the bytes of the tensors are.
        assert found is None or sorted(found.values()) == sorted(good.values())
        refused += found is None
    assert refused > 0.2 * ROUNDS


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda folder: load_config(folder, "")),
        ("tokenizer.json", stored_tokenizer_hash),
        ("tokenizer_config.json", stored_tokenizer_hash),
    ],
)
def test_files_of_a_model(folder, name, read):
    file = folder / LARGE / name
    refused = 0
    for changed in list(flips(file.read_bytes(), seed=3))[:100]:
        file.write_bytes(changed)
        refused += outcome(lambda: read(folder / LARGE)) is None
    assert refused > 0
