"""From a YAML file to a `Recipe`, everything that is wrong with the file said together."""

import dataclasses
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cbd_trl.recipe.arguments import read_arguments
from cbd_trl.recipe.schema import AnchorPart, BridgePart, DataPart, EvaluationPart, Place, Recipe, lines_of, without
from cbd_trl.recipe.values import Values, inside, shown
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.formatting import did_you_mean

_KEYS = ("source", "data", "anchors", "bridge", "evaluation", "output_dir", "calibration_tokens", "args")
_REQUIRED = ("source", "data", "anchors", "output_dir")
_SIZES = ("shape", "size", "ratio")
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """The safe loader, which refuses a key that stands twice: the last one would win in silence."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` names behind the mapping's own keys, once no own key stands twice.

        Here and not where a mapping is made: what is merged is flattened before, and has keys of both from then on.
        """
        if id(node) not in self._checked:
            self._checked.add(id(node))
            keys = [key.value if key.tag == _MERGE else self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for number, key in enumerate(keys) if key in keys[:number]]
            if twice:
                several = " Merge several mappings as a list: <<: [*one, *other]." if twice[0] == "<<" else ""
                raise ValueError(f"line {node.start_mark.line + 1}: the key {twice[0]!r} stands there twice.{several}")
        super().flatten_mapping(node)
        # A few merges of merges would be more keys than there is memory for; the last of each is the one that counts.
        node.value = list({id(key): (key, value) for key, value in reversed(node.value)}.values())[::-1]


def read_recipe(recipe: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: its file, or the name of one that the package ships (`shipped_recipes`).
        changes: "key=value" with the place of the key, such as `args.max_steps=20` or `anchors[0].size=85M`.

    Returns:
        the recipe; what is wrong with it is in its `problems`.

    Raises:
        ValueError: there is no such file, it is no YAML mapping, or a change is of no such form.
    """
    file = find_recipe(recipe)
    try:
        text = file.read_text(encoding="utf-8")
        # The loader is a safe one: plain data, and no object of any class.
        raw = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"The recipe {recipe} cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"The recipe {recipe} holds no mapping. Its keys are: {', '.join(_KEYS)}.")
    for change in changes:
        _change(raw, change)
    lines = without(lines_of(text), (change.partition("=")[0] for change in changes))
    return dataclasses.replace(parse_recipe(raw, file.stem), lines=lines)


def parse_recipe(raw: Any, name: str) -> Recipe:
    """A recipe from what its YAML says.

    Args:
        raw: as read.
        name: of the recipe.

    Returns:
        the recipe, its `problems` among it.
    """
    problems: list[str] = []
    values = Values(problems)
    given = values.mapping(raw, "", _KEYS, _REQUIRED)
    # Where there are none, `mapping` has said so.
    listed = [] if given.get("anchors") is None else values.items(given["anchors"], "anchors")
    anchors = [_anchor(values, *item) for item in listed]
    return Recipe(
        name=name,
        source=_place(values, given.get("source")),
        data=_data(values, given.get("data"), "data"),
        anchors=tuple(anchor for anchor in anchors if anchor is not None),
        output_dir=values.text(given.get("output_dir"), "output_dir") or "chain",
        bridge=_bridge(values, given.get("bridge")),
        evaluation=_evaluation(values, given.get("evaluation")),
        args=read_arguments(values, given.get("args"), "args", DistillConfig),
        calibration_tokens=values.whole(given.get("calibration_tokens", 8192), "calibration_tokens", 8192),
        problems=tuple(problems),
    )


def _place(values: Values, value: Any) -> Place | None:
    if value is None or isinstance(value, str):
        name = values.text(value, "source")
        return None if name is None else Place(name)
    given = values.mapping(value, "source", ("name", "revision"), ("name",))
    name = values.text(given.get("name"), "source.name")
    return None if name is None else Place(name, values.text(given.get("revision"), "source.revision"))


def _data(values: Values, value: Any, place: str) -> tuple[DataPart, ...]:
    if value is None:
        return ()
    items = values.items(value, place)
    parts = [_data_part(values, where, entry, len(items) > 1) for where, entry in items]
    return tuple(part for part in parts if part is not None)


def _data_part(values: Values, place: str, value: Any, of_several: bool) -> DataPart | None:
    given = {"name": value} if isinstance(value, str) else value
    known, required = ("name", "config", "split", "column", "share"), ("name", "share") if of_several else ("name",)
    given = values.mapping(given, place, known, required)
    name, config, split, column = (
        values.text(given.get(key), inside(place, key)) for key in ("name", "config", "split", "column")
    )
    share = values.positive(given.get("share", 1), inside(place, "share"))
    return None if name is None else DataPart(name, config, split or "train", column, share or 1.0, place)


def _anchor(values: Values, place: str, value: Any) -> AnchorPart | None:
    if not isinstance(value, dict):
        number = values.positive(value, place)
        return None if number is None else AnchorPart(number)
    given = values.mapping(value, place, (*_SIZES, "args", "data"))
    named = [key for key in _SIZES if key in given]
    if not named and len(given) < len(value):
        # A misspelt key, which has been refused.
        return None
    if len(named) != 1:
        values.refuse(place, f"one of {', '.join(_SIZES)} says how large it is; there are {len(named)} of them.")
        return None
    what = _what(values, named[0], given[named[0]], inside(place, named[0]))
    if what is None:
        return None
    args = read_arguments(values, given.get("args"), inside(place, "args"), DistillConfig)
    return AnchorPart(what, args, _data(values, given.get("data"), inside(place, "data")))


def _what(values: Values, key: str, value: Any, place: str) -> dict[str, Any] | float | None:
    if key == "shape":
        if isinstance(value, dict) and value:
            # `build_chain` has them among the config fields; here they stand beside the shape.
            for other in {"args", "data", "dataset"} & value.keys():
                values.refuse(inside(place, other), "is no config field. Write `args` and `data` beside `shape`.")
            return {field: entry for field, entry in value.items() if field not in ("args", "data", "dataset")}
        values.refuse(place, f"{shown(value)} is no mapping of config fields. Write {{num_hidden_layers: 16}}.")
        return None
    number = values.positive(value, place)
    if number is not None and (number <= 1) != (key == "ratio"):
        wanted = "a ratio to the anchor above, below 1" if key == "ratio" else "a number of parameters, such as 44M"
        values.refuse(place, f"{value!r} is not {wanted}.")
        return None
    return number


def _bridge(values: Values, value: Any) -> BridgePart | None:
    if value is None:
        return None
    given = values.mapping(value, "bridge", ("model", "args", "data"), ("model",))
    model = values.text(given.get("model"), "bridge.model")
    args = read_arguments(values, given.get("args"), "bridge.args", BridgeDistillConfig)
    data = _data(values, given.get("data"), "bridge.data")
    return None if model is None else BridgePart(model, args, data)


def _evaluation(values: Values, value: Any) -> EvaluationPart | None:
    if value is None:
        return None
    given = values.mapping(value, "evaluation", ("data", "sizes", "tokens", "length"), ("data",))
    data = _data(values, given.get("data"), "evaluation.data")
    sizes = values.items(given["sizes"], "evaluation.sizes") if "sizes" in given else []
    counts = [values.positive(size, place) for place, size in sizes]
    tokens, length = (
        values.whole(given.get(key, default), f"evaluation.{key}", default)
        for key, default in (("tokens", 8192), ("length", 256))
    )
    if tokens < length:
        values.refuse("evaluation.tokens", f"{tokens} are fewer than the {length} of one block (evaluation.length).")
    return EvaluationPart(data, tuple(size for size in counts if size is not None), tokens, length)


def _change(raw: dict[str, Any], change: str) -> None:
    """Set one value, as `--set` says it."""
    key, separator, text = change.partition("=")
    steps = re.findall(r"[^.\[\]]+|\[\d+\]", key)
    if not separator or not steps or "".join(steps) != key.replace(".", ""):
        raise ValueError(f"--set {change}: write the place of a key and its value, such as args.max_steps=20.")
    value = _read_value(text, change)
    place: Any = raw
    for step in steps[:-1]:
        place = _entry(place, step, change)
    last = steps[-1]
    if last.startswith("["):
        _entry(place, last, change)
        place[int(last[1:-1])] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ValueError(f"--set {change}: {shown(place)} is no mapping, so {last!r} cannot be set in it.")


def _read_value(text: str, change: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--set {change}: {text!r} cannot be read as YAML ({' '.join(str(error).split())}). Write a value as it "
            "would stand in the file: close its brackets, and put quotes around text that has a colon or bracket in "
            "it, such as --set 'source=\"a: b\"'."
        ) from error


def _entry(place: Any, step: str, change: str) -> Any:
    """What a step of a place leads to; a mapping that is not there yet is made."""
    if not step.startswith("["):
        if isinstance(place, dict):
            return place.setdefault(step, {})
    elif isinstance(place, list) and int(step[1:-1]) < len(place):
        return place[int(step[1:-1])]
    raise ValueError(f"--set {change}: there is no {step.strip('[]')} in {shown(place)}.")


def shipped_recipes() -> dict[str, str]:
    """The recipes that the package ships.

    Returns:
        name -> the first line of the file, which says what it builds.
    """
    found = sorted(_folder().glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for file in found}


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe.

    Args:
        recipe: a file, or the name of a recipe that the package ships.

    Raises:
        ValueError: there is neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    names = shipped_recipes()
    if str(recipe) in names:
        return _folder() / f"{recipe}.yaml"
    raise ValueError(
        f"There is no recipe {str(recipe)!r}: no such file, and none of the recipes that come with cbd-trl "
        f"({', '.join(names)}).{did_you_mean(recipe, names)}"
    )


def _folder() -> Path:
    return Path(str(files("cbd_trl").joinpath("recipe", "shipped")))
