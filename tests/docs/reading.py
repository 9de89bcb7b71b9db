"""What a guide tells a reader to do: its commands, its Python, and the files it shows, in their order."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_SHELL = ("bash", "sh", "shell", "console")
# What the first line of a shown file looks like: its name, in a comment.
_FILE_NAME = re.compile(r"# ([\w./-]+\.(?:yaml|yml|json|jsonl|txt))\b")
# A line of an indented block, or inline code, is a command if it begins like one.
_PROGRAMS = r"(?:\w+=\S+ +)*(?:cbd-trl|python|accelerate|make|pip|torchrun|deepspeed) "
_INDENTED = re.compile(rf"^    ({_PROGRAMS}[^\n]*(?:(?<=\\)\n[^\n]*)*)", re.MULTILINE)
_INLINE = re.compile(rf"(?<!`)`({_PROGRAMS}[^`]*)`(?!`)")


@dataclass(frozen=True)
class Step:
    """Something that a guide tells its reader to do.

    Args:
        kind: "command", "python" or "file".
        text: the command, the block, or what is in the file.
        line: of the guide, from 1.
        name: of the file.
    """

    kind: str
    text: str
    line: int
    name: str = ""


def guides() -> list[Path]:
    """README.md and every guide in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read_steps(text: str) -> list[Step]:
    """The steps of a guide.

    Args:
        text: Markdown.

    Returns:
        the commands of its shell blocks, indented blocks and inline code; its Python blocks; and the fenced files
        whose first line is a comment with their name.
    """
    steps: list[Step] = []
    for fence in _FENCE.finditer(text):
        language, block = fence[2], textwrap.dedent(fence[3])
        line = _line(text, fence.start()) + 1
        named = _FILE_NAME.match(block)
        if language in _SHELL:
            steps += [Step("command", command, line + below) for below, command in _commands(block)]
        elif language == "python":
            steps.append(Step("python", block, line))
        elif named:
            steps.append(Step("file", block, line, named[1]))
    # What is left is prose, at its old place.
    prose = _FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), text)
    for pattern in (_INDENTED, _INLINE):
        for match in pattern.finditer(prose):
            # Inline code may go over the end of a line.
            [(_, command)] = _commands(re.sub(r"(?<!\\)\n", " ", match[1]))
            steps.append(Step("command", command, _line(text, match.start())))
    return sorted(steps, key=lambda step: step.line)


def _commands(block: str) -> Iterator[tuple[int, str]]:
    """The commands of a shell block, each with the lines above it; those that go on behind a backslash are one."""
    begun, above = "", 0
    for number, line in enumerate(block.splitlines()):
        line = line.removeprefix("$ ").strip()
        if not begun:
            above = number
        if line.endswith("\\"):
            begun += line.removesuffix("\\")
        elif begun or (line and not line.startswith("#")):
            yield above, begun + line
            begun = ""


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
