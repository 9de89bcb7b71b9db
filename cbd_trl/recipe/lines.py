"""On which line of its file a place of a recipe stands."""

import re
from collections.abc import Iterable, Mapping

import yaml


def lines_of(text: str) -> dict[str, int]:
    """The line of every place, counted from 1.

    Args:
        text: YAML that has been read before.

    Returns:
        place, such as "anchors[0].args" -> line. What is repeated by an alias stands where it was first written.
    """
    found: dict[str, int] = {}
    root, seen = yaml.compose(text, Loader=yaml.SafeLoader), set()
    stack = [("", root)] if root is not None else []
    while stack:
        place, node = stack.pop()
        # A few aliases of aliases would be more places than there is time for.
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = f"{place}.{key.value}" if place else str(key.value)
                found[inner] = key.start_mark.line + 1
                stack.append((inner, value))
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                found[f"{place}[{number}]"] = value.start_mark.line + 1
                stack.append((f"{place}[{number}]", value))
    return found


def without(lines: Mapping[str, int], changed: Iterable[str]) -> dict[str, int]:
    """The lines of what stands in the file as it is.

    Args:
        lines: from `lines_of`.
        changed: places that have another value now.
    """
    over = tuple(changed)
    return {
        place: line
        for place, line in lines.items()
        if not any(place == other or place.startswith((f"{other}.", f"{other}[")) for other in over)
    }


def with_line(problem: str, lines: Mapping[str, int]) -> str:
    """A problem behind its line, where its place or what that is part of has one.

    Args:
        problem: "place: what is wrong there".
        lines: from `lines_of`.
    """
    place = problem.partition(": ")[0]
    while place and place not in lines:
        place = re.sub(r"(\.[^.\[\]]*|\[\d+\]|^[^.\[\]]*)$", "", place)
    return f"line {lines[place]}, {problem}" if place else problem
