"""A good chain, copies to tamper with, and what lies beside them."""

import shutil
from pathlib import Path

import pytest

from tests.hostile.damages import OUTSIDE
from tests.hostile.victim import write_chain


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good chain of two anchors; not to be changed."""
    return write_chain(tmp_path_factory.mktemp("original") / "chain")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it. Beside it lies another, to which hostile names and links lead."""
    shutil.copytree(original, tmp_path / OUTSIDE)
    shutil.copyfile(original / "large" / "tokenizer.json", tmp_path / OUTSIDE / "tokenizer.4.0.0.json")
    return Path(shutil.copytree(original, tmp_path / "chain"))
