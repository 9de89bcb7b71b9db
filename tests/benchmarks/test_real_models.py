"""A GGUF file out of wheels that hold it in parts."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from benchmarks.real_models import joined_gguf

# The order of the wheels' names is not that of the parts.
PARTS = {"part2": ("model.gguf.part00", b"GGUF and "), "part1": ("model.gguf.part01", b"the rest")}


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    found = []
    for wheel, (name, content) in {
        **PARTS,
        "whole": ("SHA256SUMS", hashlib.sha256(b"GGUF and the rest").hexdigest().encode() + b"  model.gguf\n"),
    }.items():
        found.append(tmp_path / f"{wheel}.whl")
        with zipfile.ZipFile(found[-1], "w") as archive:
            archive.writestr(f"{wheel}/__init__.py", "")
            archive.writestr(f"{wheel}/data/{name}", content)
    return sorted(found)


def test_parts_are_put_together_in_their_order(wheels, tmp_path):
    file = joined_gguf(wheels, tmp_path)
    assert file == tmp_path / "model.gguf" and file.read_bytes() == b"GGUF and the rest"


def test_a_missing_part_is_found_by_its_hash(wheels, tmp_path):
    with pytest.raises(ValueError, match=r"part00, has the SHA-256 .*fetch them again"):
        joined_gguf([wheel for wheel in wheels if wheel.stem != "part1"], tmp_path)


def test_without_a_hash_nothing_is_put_together(wheels, tmp_path):
    with pytest.raises(ValueError, match="one GGUF file was expected"):
        joined_gguf([wheel for wheel in wheels if wheel.stem != "whole"], tmp_path)
