"""Imports go one way through the folders of the package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import cbd_trl

# A folder imports from those before it.
ORDER = (
    *("utils", "losses", "architectures", "surgery", "bridge", "cache", "teachers", "cards", "trainers", "chain"),
    *("generation", "report", "demo", "recipe"),
)
# What goes the other way, until it is taken apart: nothing may join it.
BACKWARDS = {
    ("losses/held_out.py", "architectures"),
    ("cache/write_cache.py", "teachers"),
    *((f"cards/{name}.py", "chain") for name in ("anchor", "chain", "history")),
    *((f"cards/{name}.py", "report") for name in ("anchor", "chain", "files", "target")),
}


def imports() -> Iterator[tuple[str, str]]:
    """Each file in a folder, beside each folder that it imports from."""
    package = Path(cbd_trl.__file__).parent
    for file in package.glob("*/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cbd_trl."):
                folder = str(node.module).split(".")[1]
                if (package / folder).is_dir():
                    yield file.relative_to(package).as_posix(), folder


def test_imports_go_one_way() -> None:
    places = {folder: place for place, folder in enumerate(ORDER)}
    found = {(file, folder) for file, folder in imports() if places[folder] > places[file.split("/")[0]]}
    assert found == BACKWARDS
