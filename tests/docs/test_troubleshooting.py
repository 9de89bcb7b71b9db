"""Every message in docs/guides/troubleshooting.md is one that the package, or the library it names, can say."""

import ast
import functools
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.reading import ROOT

GUIDE = ROOT / "docs" / "guides" / "troubleshooting.md"
_ENTRY = re.compile(r"^- `([^`]+)`(?: \((\w+)\))?", re.MULTILINE)
_LEAST = 15


def entries(text: str) -> list[tuple[str, str]]:
    """Each message that begins a line, and the library that says it.

    Args:
        text: Markdown.
    """
    return [(message, library or "cbd_trl") for message, library in _ENTRY.findall(text)]


def texts_of(source: str) -> list[str]:
    """The texts in a module: parts that are joined as one, and `...` where a value stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def says(texts: list[str], message: str) -> bool:
    """Is the message, whose `...` stand for anything, in one of the texts?"""
    pieces = [re.escape(piece.strip()) for piece in message.split("...") if piece.strip()]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    return any(pattern.search(text) for text in texts)


@functools.cache
def texts_of_library(name: str, start: str = "") -> list[str]:
    """The texts of those modules of a library, two folders deep, that hold the first words of a message."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed"
    files = (file for pattern in ("*.py", "*/*.py") for file in Path(spec.origin).parent.glob(pattern))
    sources = [source for file in sorted(files) if start in (source := file.read_text(encoding="utf-8"))]
    return [text for source in sources for text in texts_of(source)]


@pytest.mark.parametrize(("message", "library"), entries(GUIDE.read_text()))
def test_every_message_is_one_that_can_be_met(message, library):
    fixed = message.replace("...", "").strip()
    assert len(fixed) >= _LEAST, f"{message!r} has too few fixed words to search for"
    # Of a large library only some modules are parsed; of the package all, once.
    start = "" if library == "cbd_trl" else max(message.split("..."), key=len).strip()[:_LEAST]
    assert says(texts_of_library(library, start), message), (
        f"{library} says {message!r} nowhere: quote what it says now, or take the entry out of {GUIDE.name}"
    )


def test_no_message_stands_twice_and_there_are_enough():
    found = [message for message, _ in entries(GUIDE.read_text())]
    assert len(found) == len(set(found)) >= 25


def test_a_message_that_nobody_says_is_found_out():
    source = 'raise ValueError(\n    f"{file} holds {n} rows, "\n    "too few: give more."\n)'
    assert says(texts_of(source), "... holds ... rows, too few")
    assert not says(texts_of(source), "... holds ... rows, too many")
    assert not says(texts_of(source), "too few: ... holds")
    assert entries("- `one ... two` (trl) why\n- not one\n- `three` why\n") == [
        ("one ... two", "trl"),
        ("three", "cbd_trl"),
    ]
