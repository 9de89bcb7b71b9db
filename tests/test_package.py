"""The package as its users meet it: the public names, the version, and an import that costs nothing."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions, version
from importlib.resources import files
from pathlib import Path

import pytest

import cbd_trl

PUBLIC_NAMES = [
    *("BridgeDistillConfig", "BridgeDistillTrainer", "BridgeStep"),
    *("Chain", "DistillConfig", "DistillTrainer", "build_chain", "chain_from_anchors"),
    *("consolidate_chain", "describe_targets", "from_chain", "make_targets"),
]
ROOT = Path(__file__).parents[1]
# Extras that the package uses through transformers and TRL, which import them.
IMPORTED_BY_OTHERS = {"bitsandbytes", "peft"}


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
    assert f"\nversion: {cbd_trl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def _normalize(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@functools.cache
def _requirements(*extras: str) -> dict[str, str]:
    """What pyproject.toml lists, the dependencies or those of the extras: {distribution: versions}."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["optional-dependencies"]
    lines = [line for extra in extras for line in listed[extra]] if extras else project["dependencies"]
    found = [re.match(r"([\w.-]+)(?:\[\w+\])?(.*)", line) for line in lines]
    return {_normalize(match[1]): match[2] for match in found}


def _declared(*extras: str) -> set[str]:
    """The distributions among them."""
    return set(_requirements(*extras))


def _release(text: str) -> str:
    """A version without a local part, such as +cpu, and without zeros at its end."""
    return re.sub(r"(\.0)+$", "", text.split("+")[0])


@functools.cache
def _imported(*folders: str) -> set[str]:
    """The distributions that the modules of some folders import, at the top or inside a function."""
    modules: set[str] = set()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    # Scripts of benchmarks/ find what lies beside them.
    own = {"cbd_trl", "tests", "benchmarks", *(file.stem for file in (ROOT / "benchmarks").glob("*.py"))}
    names = packages_distributions()
    return {_normalize(names[module][0]) for module in modules - sys.stdlib_module_names - own}


def test_every_dependency_is_imported():
    assert _declared() - _imported("cbd_trl") == set()


def test_everything_imported_is_a_dependency_or_in_an_extra_for_users():
    imported = _imported("cbd_trl")
    assert imported - _declared() == _declared("eval", "gguf")
    assert _declared("peft", "quantized") == IMPORTED_BY_OTHERS


def test_the_extra_dev_has_what_tests_and_benchmarks_import():
    assert _imported("tests", "benchmarks", "examples") - _declared() <= _declared("dev")
    assert _declared("eval", "gguf", "peft", "quantized") <= _declared("dev")


def test_the_lock_pins_what_is_declared():
    lock = {_normalize(line.split("==")[0]) for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert (_declared() | _declared("dev", "docs")) - lock == set()


@pytest.mark.skipif(not os.environ.get("OLDEST_VERSIONS"), reason="for the CI job that installs the oldest versions")
def test_the_oldest_versions_are_those_declared():
    """A version that something else does not allow, or that nobody runs, is declared in vain."""
    needed = {**_requirements(), **_requirements("dev")}
    installed = {name: _release(version(name)) for name in needed}
    assert installed == {name: _release(re.match(r">=([\d.]+)", found)[1]) for name, found in needed.items()}


def test_import_loads_neither_torch_nor_transformers():
    code = "import sys, cbd_trl; dir(cbd_trl); print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_types_are_shipped():
    assert files("cbd_trl").joinpath("py.typed").is_file()


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    """pytest passes over folders of some names in silence, by default those called "build"."""
    skipped = pytestconfig.getini("norecursedirs")
    folders = {part for file in (ROOT / "tests").rglob("test_*.py") for part in file.relative_to(ROOT).parts[:-1]}
    assert [name for name in folders if any(fnmatch(name, pattern) for pattern in skipped)] == []
