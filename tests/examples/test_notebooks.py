"""The notebooks: executed as they are, without a network; and what of them is committed."""

import json
import re
from pathlib import Path

import pytest

from tests.examples.notebooks import NOTEBOOKS, ROOT, execute, is_install, pictures, point_to, read

_MACHINE_PATHS = re.compile(r"(?<![\w.:/-])/(?:home|root|tmp|usr|opt|work|var|mnt|content|Users|private)/\S*")
_REPOSITORY = r"https://github\.com/([\w.-]+/[\w.-]+)"


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _printed(notebook) -> str:
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_both_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["any_size_from_a_chain", "distill_your_own_anchor"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_draws(path, tmp_path):
    committed = read(path)
    executed = execute(committed, tmp_path)
    assert not [output for cell in _code(executed) for output in cell.outputs if output.output_type == "error"]
    assert all(cell.execution_count for cell in _code(executed) if not is_install(cell))
    drawn, shown = pictures(executed), pictures(committed)
    assert drawn and {cell: len(images) for cell, images in drawn.items()} == {
        cell: len(images) for cell, images in shown.items()
    }
    assert (tmp_path / "chain" / "chain.json").is_file()
    assert _printed(executed).splitlines()[0] == _printed(committed).splitlines()[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed(path):
    text, notebook = path.read_text(), read(path)
    assert path.stat().st_size < 400_000
    assert pictures(notebook)
    assert not _MACHINE_PATHS.findall(text)
    for cell in _code(notebook):
        assert bool(cell.execution_count) != is_install(cell), (
            f"executed, or not, and should be otherwise: {cell.source}"
        )
        assert not [
            output for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"
        ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_and_installation_lead_to_one_repository(path):
    notebook = read(path)
    [badge] = re.findall(r"\(https://colab\.research\.google\.com/github/([\w./-]+)\)", notebook.cells[0].source)
    [install] = [cell.source for cell in _code(notebook) if is_install(cell)]
    assert install == _code(notebook)[0].source and "%pip install -q git+{REPOSITORY}" in install
    [repository] = re.findall(rf'REPOSITORY = "{_REPOSITORY}"', install)
    assert badge == f"{repository}/blob/main/{path.relative_to(ROOT)}"


def test_another_repository_is_one_command(tmp_path):
    text = point_to(NOTEBOOKS[0].read_text(), "https://github.com/me/my.fork/")
    assert len(re.findall('github(?:.com)?/me/my.fork[/\\\\"]', text)) == 2
    assert "OWNER" not in text and json.loads(text)["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_to_files(path):
    prose = "".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    places = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose)
    assert places and not [place for place in places if not (Path(path.parent) / place).exists()]
