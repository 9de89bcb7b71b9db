"""The schema of a recipe, and reading one from YAML: every mistake in the file at once, each with its line."""

import copy
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from cbd_trl.utils.formatting import did_you_mean, parse_count
from cbd_trl.utils.untrusted import shown

_REQUIRED = ("source", "data", "anchors", "output_dir")
_SIZES = ("shape", "size", "ratio", "model")
_MERGE = "tag:yaml.org,2002:merge"
# Errors that taking out another one may cause.
_LACKS = ("missing", "no_size", "too_short")
# More names than this are not listed in an error: a config has hundreds.
_LISTED = 20


class RecipeError(ValueError):
    """A recipe cannot be built.

    Args:
        name: of the recipe.
        problems: "place: what is wrong there", each.
        lines: place -> line in the file.
    """

    def __init__(self, name: str, problems: Sequence[str], lines: Mapping[str, int] | None = None) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = [f"  - {with_line(problem, lines or {})}" for problem in problems]
        way_out = "Change the file, or one key for this run: --set KEY=VALUE, such as --set source=DIR."
        super().__init__("\n".join([f"The recipe {name} cannot be built ({count}):", *listed, way_out]))


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _sized(value: Any) -> Any:
    """Read a bare number, or the name of a model, as the mapping that it stands for."""
    if isinstance(value, Mapping | list):
        return value
    if isinstance(value, str) and not _is_count(value):
        return {"model": value}
    ratio = isinstance(value, int | float) and value <= 1
    return {"ratio" if ratio else "size": value}


def _count(value: Any) -> Any:
    # Other types are left to pydantic; `str` of a list of YAML aliases may be longer than memory.
    return parse_count(value) if isinstance(value, str) else value


def _is_count(text: str) -> bool:
    try:
        parse_count(text)
    except ValueError:
        return False
    return True


def _number(value: Any) -> Any:
    """Read the text that YAML makes of 4e-4, which has no dot, as the number it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_shape(fields: dict[str, Any]) -> dict[str, Any]:
    # `build_chain` has them among the config fields; in a recipe they stand beside the shape.
    if other := sorted({"args", "data", "dataset"} & fields.keys()):
        raise ValueError(f"{', '.join(other)} cannot be a config field. Write `args` and `data` beside `shape`.")
    return fields


def _check_args(config: str) -> AfterValidator:
    def check(value: dict[str, Any]) -> dict[str, Any]:
        # It imports TRL, which takes seconds; this module is read to list recipes, too.
        from cbd_trl.recipe.arguments import arguments_model

        checked = arguments_model(config).model_validate(value)
        return {name: getattr(checked, name) for name in value}

    return AfterValidator(check)


Text = Annotated[str, Field(pattern=r"\S")]
Shape = Annotated[dict[str, Any], Field(min_length=1), AfterValidator(_check_shape)]
Count = Annotated[float, BeforeValidator(_count), Field(gt=1, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Ratio = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]


def _check_size(value: Any) -> Any:
    kind: Any = Shape if isinstance(value, Mapping) else Count
    return TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)


Size = Annotated[Mapping[str, Any] | float, PlainValidator(_check_size)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SourcePart(_Part):
    """A model.

    Args:
        name: a folder or a Hub id.
        revision: of a Hub id.
    """

    name: Text
    revision: Text | None = None


class DataPart(_Part):
    """One dataset of a mix.

    Args:
        name: a .jsonl, .json, .csv, .parquet or .txt file, a Hub id, or `demo`, the text that the package ships.
        config: configuration of a dataset on the Hub.
        split: one of its splits, or a slice of one, such as `train[:90%]`; of `demo` "train" or "held_out".
        column: the column that holds the text; None for rows in a format of SFTTrainer.
        share: of the rows of the mix, relative to the other shares.
    """

    name: Text
    config: Text | None = None
    split: Text = "train"
    column: Text | None = None
    share: Positive = 1.0


def _check_shares(parts: tuple[DataPart, ...]) -> tuple[DataPart, ...]:
    if len(parts) > 1 and (missing := [part.name for part in parts if "share" not in part.model_fields_set]):
        raise ValueError(f"{', '.join(missing)} has no share, which every dataset of a mix needs.")
    return parts


Data = Annotated[
    tuple[Annotated[DataPart, BeforeValidator(_named)], ...],
    BeforeValidator(_listed),
    Field(min_length=1),
    AfterValidator(_check_shares),
]
Arguments = Annotated[dict[str, Any], _check_args("DistillConfig")]
BridgeArguments = Annotated[dict[str, Any], _check_args("BridgeDistillConfig")]


class AnchorPart(_Part):
    """One lower anchor, given by one of the first four fields.

    Args:
        shape: config fields.
        size: a parameter count.
        ratio: of the parameters of the anchor above it.
        model: one that exists already: a folder or a Hub id.
        revision: of its Hub id.
        args: fields of `DistillConfig`, for this anchor alone.
        data: for this anchor alone; empty for the recipe's.
    """

    shape: Shape | None = None
    size: Count | None = None
    ratio: Ratio | None = None
    model: Text | None = None
    revision: Text | None = None
    args: Arguments = {}
    data: Data = ()

    @model_validator(mode="after")
    def _one_size(self) -> "AnchorPart":
        count = sum(getattr(self, name) is not None for name in _SIZES)
        if count != 1:
            kind = "no_size" if count == 0 else "several_sizes"
            names = f"{', '.join(_SIZES[:-1])} and {_SIZES[-1]}"
            message = "give one of {names}; there are {count}."
            raise PydanticCustomError(kind, message, {"names": names, "count": count})
        if self.revision is not None and self.model is None:
            raise PydanticCustomError("revision", "there is a revision, and no model that it could be of.")
        return self

    @property
    def target(self) -> Mapping[str, Any] | float:
        """The anchor as `build_chain` takes it."""
        if self.model is not None:
            return {"model": self.model, "revision": self.revision}
        return next(value for name in _SIZES if (value := getattr(self, name)) is not None)


class BridgePart(_Part):
    """The first student of a source with another tokenizer.

    Args:
        model: anchor zero, before it is trained.
        args: fields of `BridgeDistillConfig`.
        data: for the bridge alone; empty for the recipe's.
    """

    model: Text
    args: BridgeArguments = {}
    data: Data = ()


class EvaluationPart(_Part):
    """What the finished chain is measured on.

    Args:
        data: text that nothing was trained on.
        sizes: targets to measure beside the anchors, each a parameter count or config fields.
        operators: each makes every target; the first decides its shape. "random" stands for fresh weights.
        length: tokens in a block.
        tokens: the most tokens.
    """

    data: Data
    sizes: Annotated[tuple[Size, ...], BeforeValidator(_listed)] = ()
    operators: Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(min_length=1)] = ("nested",)
    length: Annotated[int, Field(ge=2)] = 256
    tokens: Annotated[int, Field(ge=2)] = 8192

    @field_validator("tokens")
    @classmethod
    def _one_block(cls, tokens: int, info: ValidationInfo) -> int:
        length = info.data.get("length", 2)
        if tokens < length:
            raise ValueError(f"{tokens} are fewer than the {length} of one block (evaluation.length).")
        return tokens


class RecipeKeys(_Part):
    """The keys of a recipe's file; see `Recipe`. Those that must be there have a default, so that the rest of a file
    without one can be checked, too."""

    source: Annotated[SourcePart | None, BeforeValidator(_named)] = None
    data: Data = ()
    anchors: Annotated[
        tuple[Annotated[AnchorPart, BeforeValidator(_sized)], ...], BeforeValidator(_listed), Field(min_length=1)
    ] = ()
    bridge: BridgePart | None = None
    evaluation: EvaluationPart | None = None
    output_dir: Text = "chain"
    calibration_tokens: Annotated[int, Field(ge=2)] = 8192
    shape_search: Annotated[int, Field(ge=2)] | None = None
    shape_trainings: Annotated[int, Field(ge=0)] = 0
    shape_training_steps: Annotated[int, Field(ge=1)] = 50
    args: Arguments = {}


class Recipe(RecipeKeys):
    """A whole chain as data.

    Args:
        source: the model that the chain is distilled from.
        data: text to train on.
        anchors: the lower ones, largest first.
        bridge: None for a source that anchors can be cut from.
        evaluation: None for no measurement.
        output_dir: the chain's folder.
        calibration_tokens: tokens behind the statistics.
        shape_search, shape_trainings, shape_training_steps: how shapes of anchors given by a size or a ratio are
            found, as of `build_chain`.
        args: fields of `DistillConfig`, for every anchor.
        name: of the file.
        problems: what is wrong with the file itself, each with its place; what is wrong is left out of the other
            fields.
        lines: place -> line in the file.
    """

    name: str
    problems: tuple[str, ...] = ()
    lines: Mapping[str, int] = {}


def read_recipe(recipe: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: its file, or the name of one that the package ships (`shipped_recipes`).
        changes: "key=value" with the place of the key, such as `args.max_steps=20` or `anchors[0].size=85M`.

    Returns:
        the recipe; what is wrong with it is in its `problems`.

    Raises:
        ValueError: there is no such file, it does not hold a YAML mapping, or a change has another form.
    """
    file = find_recipe(recipe)
    try:
        text = file.read_text(encoding="utf-8")
        # The loader is a safe one: plain data, and no object of any class.
        raw = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"The recipe {recipe} cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        keys = ", ".join(RecipeKeys.model_fields)
        raise ValueError(f"The recipe {recipe} must be a mapping with the keys {keys}.")
    for change in changes:
        _change(raw, change)
    lines = unchanged_lines(lines_of(text), (change.partition("=")[0] for change in changes))
    return parse_recipe(raw, file.stem).model_copy(update={"lines": lines})


def parse_recipe(raw: Mapping[str, Any], name: str) -> Recipe:
    """Validate what YAML was read as.

    Args:
        raw: as read; not changed.
        name: of the recipe.

    Returns:
        the recipe, with its `problems` and without what they are about.
    """
    raw = copy.deepcopy(dict(raw))
    problems = [f"{key}: is missing." for key in _REQUIRED if raw.get(key) is None]
    raw = {key: value for key, value in raw.items() if value is not None or key not in RecipeKeys.model_fields}
    keys, taken_out = None, False
    while keys is None:
        try:
            keys = RecipeKeys.model_validate(raw)
        except ValidationError as error:
            # What is wrong is taken out, so that the rest is checked as well, here and in `check_recipe`.
            found = [(_place(raw, details["loc"]), details) for details in error.errors(include_url=False)]
            for place, details in found:
                if not taken_out or details["type"] not in _LACKS:
                    problems.append(f"{_format_place(place)}: {_message(details)}")
                _take_out(raw, place[:-1] if details["type"] == "missing" else place)
            taken_out = True
    return Recipe.model_construct(**dict(keys), name=name, problems=tuple(problems), lines={})


def shipped_recipes() -> dict[str, str]:
    """List the recipes that the package ships.

    Returns:
        name -> the first line of the file, a summary.
    """
    found = sorted(_folder().glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for file in found}


def find_recipe(recipe: str | Path) -> Path:
    """Find the file of a recipe.

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
        f"There is no recipe {str(recipe)!r}: it must be a file, or one of the recipes that come with cbd-trl "
        f"({', '.join(names)}).{did_you_mean(recipe, names)}"
    )


def lines_of(text: str) -> dict[str, int]:
    """Find the line of every place, counted from 1.

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


def unchanged_lines(lines: Mapping[str, int], changed: Iterable[str]) -> dict[str, int]:
    """Keep the lines of places whose value is that of the file.

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
    """Put the line of a problem in front of it, where its place or what that is part of has one.

    Args:
        problem: "place: what is wrong there".
        lines: from `lines_of`.
    """
    place = problem.partition(": ")[0]
    while place and place not in lines:
        place = re.sub(r"(\.[^.\[\]]*|\[\d+\]|^[^.\[\]]*)$", "", place)
    return f"line {lines[place]}, {problem}" if place else problem


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


def _change(raw: dict[str, Any], change: str) -> None:
    """Set one value, as `--set` gives it."""
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
        raise ValueError(f"--set {change}: {shown(place)} has no key {last!r} to set: it must be a mapping.")


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
    """Follow one step of a place; a mapping that is not there yet is made."""
    if not step.startswith("["):
        if isinstance(place, dict):
            return place.setdefault(step, {})
    elif isinstance(place, list) and int(step[1:-1]) < len(place):
        return place[int(step[1:-1])]
    raise ValueError(f"--set {change}: there is no {step.strip('[]')} in {shown(place)}.")


def _folder() -> Path:
    return Path(str(files("cbd_trl").joinpath("recipe", "shipped")))


def _place(raw: Any, steps: Iterable[int | str]) -> tuple[int | str, ...]:
    """Drop from a place what is not in the file: the number of a value that stands for a list of one, and so on."""
    place: list[int | str] = []
    for step in steps:
        if isinstance(raw, Mapping) and (isinstance(step, str) or step in raw):
            raw = raw.get(step)
        elif isinstance(step, int) and isinstance(raw, list):
            raw = raw[step]
        else:
            continue
        place.append(step)
    return tuple(place)


def _format_place(place: Iterable[int | str]) -> str:
    """Write a place as errors and `--set` do: `anchors[0].args`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")


def _take_out(raw: Any, place: Sequence[Any]) -> None:
    """Remove a place, and with one in a list what comes behind it, so that the numbers of the others stay."""
    *outer, last = place
    for step in outer:
        if not ((isinstance(raw, Mapping) and step in raw) or (isinstance(raw, list) and step in range(len(raw)))):
            # It was taken out with what it is part of.
            return
        raw = raw[step]
    if isinstance(raw, list):
        del raw[last:]
        return
    # pydantic writes a key that is not text, such as a date, in its own way.
    others = [key for key in raw if not isinstance(key, str)]
    for key in [last] if last in raw else others:
        del raw[key]


def _message(details: ErrorDetails) -> str:
    """Say what is wrong in the words of this package."""
    kind, value = details["type"], shown(details["input"])
    if kind in ("extra_forbidden", "invalid_key"):
        known = _known_keys(details["loc"])
        names = f" The keys are: {', '.join(known)}." if len(known) <= _LISTED else ""
        return f"there is no such key.{did_you_mean(details['loc'][-1], known)}{names}"
    if kind == "missing" and details["msg"] == "Field required":
        return "is missing."
    if kind == "value_error":
        return str(details["ctx"]["error"])
    if kind == "too_short":
        return f"{value} must not be empty."
    if kind == "model_type":
        return f"{value} must be a mapping with the keys {', '.join(_known_keys((*details['loc'], '')))}."
    if details["msg"].startswith("Input should "):
        wanted = details["msg"].removeprefix("Input should ").replace("dictionary", "mapping")
        return f"{value} must {wanted}."
    return details["msg"]


def _known_keys(place: Sequence[int | str]) -> list[str]:
    """Look up the keys that the mapping around a place may have."""
    model: Any = RecipeKeys
    for step in place[:-1]:
        if step == "args":
            from cbd_trl.recipe.arguments import arguments_model

            model = arguments_model("BridgeDistillConfig" if place[0] == "bridge" else "DistillConfig")
        elif isinstance(step, str) and step in model.model_fields:
            model = next(_models(model.model_fields[step].annotation), model)
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)
