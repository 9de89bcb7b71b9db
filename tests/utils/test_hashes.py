"""sha256 of files, worked out again only where a file may have changed."""

import json
import os
import shutil
import time

import pytest

from cbd_trl import Chain, from_chain
from cbd_trl.utils import files as hashes
from tests.chain.helpers import DEEP


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """The files that were really read, in order; every file is settled and worth an entry, in a folder of its own."""
    read = []

    def digest(file, name, work=hashes.hashlib.file_digest):
        read.append(file.name)
        return work(file, name)

    assets = tmp_path / "assets"
    assets.mkdir()
    monkeypatch.setattr(hashes.hashlib, "file_digest", digest)
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(hashes, "_SMALL_BYTES", 0)
    monkeypatch.setattr(hashes, "cached_assets_path", lambda *names: assets)
    hashes._remembered.cache_clear()
    yield read
    hashes._remembered.cache_clear()


@pytest.mark.parametrize("next_process", [False, True])
def test_a_chain_that_stays_is_hashed_once(chain_folder, tmp_path, hashed, next_process):
    folder = shutil.copytree(chain_folder, tmp_path / "chain")
    from_chain(folder, config=DEEP)
    names = [anchor.name for anchor in Chain.from_pretrained(folder, verify=False).anchors]
    used = {str(folder / name / "model.safetensors") for name in names[:2]}
    assert used <= set(hashed) and not any(f"/{names[2]}/" in name for name in hashed), "only what is used"
    hashed.clear()
    if next_process:
        hashes._remembered.cache_clear()
    from_chain(folder, config=DEEP)
    assert not hashed
    weights = folder / names[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or was changed"):
            from_chain(folder, config=DEEP)
    assert hashed == [str(weights)]


def written(file, text):
    file.write_text(text)
    # Files that are written at once may have one time.
    os.utime(file, ns=(time.time_ns(), time.time_ns()))
    return hashes.sha256_of(file)


def test_an_entry_counts_for_its_file_alone(tmp_path, hashed):
    file, assets = tmp_path / "file", tmp_path / "assets"
    first = written(file, "one")
    (entry,) = assets.iterdir()
    body = json.loads(entry.read_text())
    assert body["path"] == str(file) and body["sha256"] == first
    for change in ({"path": "/other"}, {"state": [0, 0, 0, 0]}):
        entry.write_text(json.dumps({**body, "sha256": "forged", **change}))
        hashes._remembered.cache_clear()
        assert hashes.sha256_of(file) == first
        assert json.loads(entry.read_text()) == body, "written anew"
    for damage in ("", "[1]", "{}"):
        entry.write_text(damage)
        hashes._remembered.cache_clear()
        assert hashes.sha256_of(file) == first
    assert written(file, "two") != first
    assert len(list(assets.iterdir())) == 1


def test_small_and_young_files_leave_no_entry(tmp_path, hashed, monkeypatch):
    file, assets = tmp_path / "file", tmp_path / "assets"
    monkeypatch.setattr(hashes, "_SMALL_BYTES", 4)
    written(file, "one")
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 5.0)
    assert len({written(file, f"many {i}") for i in range(20)}) == 20
    assert not list(assets.iterdir())


def test_without_a_folder_to_write_to_files_are_hashed_all_the_same(tmp_path, hashed, monkeypatch):
    def refuse(*names):
        raise PermissionError("read-only")

    monkeypatch.setattr(hashes, "cached_assets_path", refuse)
    file = tmp_path / "file"
    digest = written(file, "one")
    hashes._remembered.cache_clear()
    assert hashes.sha256_of(file) == digest and len(hashed) == 2
