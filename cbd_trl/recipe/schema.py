"""What a recipe says: a whole chain as data."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml


class RecipeError(ValueError):
    """A recipe cannot be built.

    Args:
        name: of the recipe.
        problems: each with its place in the file.
        lines: of the places.
    """

    def __init__(self, name: str, problems: Sequence[str], lines: Mapping[str, int] | None = None) -> None:
        self.problems = tuple(problems)
        count = "one thing is" if len(problems) == 1 else f"{len(problems)} things are"
        told = [f"  - {with_line(problem, lines or {})}" for problem in problems]
        way_out = "Change the file, or one key for this run: --set KEY=VALUE, such as --set source=DIR."
        super().__init__("\n".join([f"The recipe {name} cannot be built, {count} to be put right:", *told, way_out]))


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


@dataclass(frozen=True)
class Place:
    """A model, wherever it is.

    Args:
        name: a folder or a Hub id.
        revision: of a Hub id.
    """

    name: str
    revision: str | None = None


@dataclass(frozen=True)
class DataPart:
    """One dataset of a mix.

    Args:
        name: a .jsonl, .json, .csv, .parquet or .txt file, a Hub id, or `demo`, the text that the package ships.
        config: configuration of a dataset on the Hub.
        split: which of its splits, or a slice of one, such as `train[:90%]`; of `demo` "train" or "held_out".
        column: the column that holds the text; None for rows in a format of SFTTrainer.
        share: of the rows of the mix, to scale.
        where: where the recipe says so, such as "data[0]".
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    share: float = 1.0
    where: str = "data"


@dataclass(frozen=True)
class AnchorPart:
    """One lower anchor.

    Args:
        what: config fields, a parameter count or a ratio, as `build_chain` takes them.
        args: fields of `DistillConfig` that are its own.
        data: of its own; empty for the recipe's.
    """

    what: Mapping[str, Any] | float
    args: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[DataPart, ...] = ()


@dataclass(frozen=True)
class BridgePart:
    """What a source of another tokenizer teaches first.

    Args:
        model: anchor zero, before it is trained.
        args: fields of `BridgeDistillConfig` that are its own.
        data: of its own; empty for the recipe's.
    """

    model: str
    args: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[DataPart, ...] = ()


@dataclass(frozen=True)
class EvaluationPart:
    """What the finished chain is measured on.

    Args:
        data: text that nothing was trained on.
        sizes: parameter counts of targets to measure beside the anchors.
        tokens: the most tokens.
        length: tokens in a block.
    """

    data: tuple[DataPart, ...]
    sizes: tuple[float, ...] = ()
    tokens: int = 8192
    length: int = 256


@dataclass(frozen=True)
class Recipe:
    """A whole chain, as one file says it. Where something is missing or wrong, `problems` says so.

    Args:
        name: of the file.
        source: the model at the head.
        data: what is trained on.
        anchors: the lower ones, largest first.
        output_dir: the chain's folder.
        bridge: None for a source that anchors can be cut from.
        evaluation: None for no measurement.
        args: fields of `DistillConfig`, for every anchor.
        calibration_tokens: tokens behind the statistics.
        problems: what is wrong with the file itself, each with its place in it.
        lines: of the places in the file.
    """

    name: str
    source: Place | None
    data: tuple[DataPart, ...]
    anchors: tuple[AnchorPart, ...]
    output_dir: str
    bridge: BridgePart | None = None
    evaluation: EvaluationPart | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    calibration_tokens: int = 8192
    problems: tuple[str, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict)
