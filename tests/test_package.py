"""The package as its users meet it: the public names, the version, and an import that costs nothing."""

import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import cbd_trl

PUBLIC_NAMES = [
    *("BridgeDistillConfig", "BridgeDistillTrainer", "BridgeStep"),
    *("Chain", "DistillConfig", "DistillTrainer", "build_chain", "chain_from_anchors", "describe_targets"),
    *("from_chain", "make_targets"),
]
ROOT = Path(__file__).parents[1]


def test_public_names_are_exactly_these():
    assert sorted(cbd_trl.__all__) == PUBLIC_NAMES
    assert sorted(name for name in dir(cbd_trl) if not name.startswith("_")) == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_loads_from_its_module(name):
    assert getattr(cbd_trl, name).__name__ == name


def test_unknown_attribute_lists_the_public_names():
    with pytest.raises(AttributeError, match=r"no attribute 'BridgeDistill'.*Chain, DistillConfig.*from_chain"):
        cbd_trl.BridgeDistill  # noqa: B018 - reading the attribute is the test


def test_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cbd_trl.__version__ == project["version"]


def test_import_loads_neither_torch_nor_transformers():
    code = "import sys, cbd_trl; dir(cbd_trl); print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_types_are_shipped():
    assert files("cbd_trl").joinpath("py.typed").is_file()
