"""Reads the flags, the YAML file and the rows that the subcommands of `cbd-trl` have in common."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, ScriptArguments, TrlParser

from cbd_trl.utils.datasets import load_rows
from cbd_trl.utils.formatting import did_you_mean, parse_count

_ADAPTER_FLAGS = ("use_peft", "use_rslora", "use_dora")


class UsageError(ValueError):
    """The flags are wrong, as against what they ask for."""


class _Parser(TrlParser):
    """TrlParser with errors of one line: the stock usage text of a training command is 300 flags long."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.rstrip(".") + ".")

    def known_flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def parse_flags(
    name: str,
    description: str,
    types: list[Any],
    flags: list[str],
    positional: dict[str, str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> list[Any]:
    """The dataclasses filled from flags and YAML, and the namespace of the positional arguments if there are any.

    Args:
        name: of the command.
        description: of the command.
        types: dataclasses to fill.
        flags: as typed.
        positional: names and help of positional arguments.
        defaults: of flags, instead of those of the dataclasses.

    Raises:
        UsageError: for unknown flags, values of the wrong type, or a config file that cannot be read.
    """
    parser = _Parser(
        types, prog=f"cbd-trl {name}", description=description, epilog="Flags can stand in a YAML file: --config FILE."
    )
    for argument, text in (positional or {}).items():
        parser.add_argument(argument, nargs="?", help=text)
    parser.set_defaults_with_config(**(defaults or {}))
    if "--config" in flags and flags.index("--config") == len(flags) - 1:
        raise UsageError("--config needs the path of a YAML file.")
    # TrlParser reads `--config FILE` only.
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    try:
        *parsed, remaining = parser.parse_args_and_config(flags, return_remaining_strings=True)
    except OSError as error:
        raise UsageError(f"The config file cannot be read: {error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        file = flags[flags.index("--config") + 1]
        raise UsageError(
            f"The config file {file} is not YAML ({' '.join(str(error).split())}). Wanted a line of `flag: value` for "
            "each flag, in UTF-8."
        ) from error
    if remaining:
        _refuse_unknown(remaining, parser.known_flags())
    return parsed


def _refuse_unknown(remaining: list[str], known: list[str]) -> NoReturn:
    unknown = next((text for text in remaining if text.startswith("--")), remaining[0])
    raise UsageError(f"There is no flag {unknown!r}.{did_you_mean(unknown, known)}")


def require(**values: Any) -> None:
    """Refuse flags that were left out.

    Args:
        values: of the flags by name, None where a flag is missing.

    Raises:
        UsageError: naming those.
    """
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.")


def changed_flags(arguments: Any) -> list[str]:
    """Names of the flags that are not at their default.

    Args:
        arguments: one of the parsed dataclasses.
    """
    return [
        field.name
        for field in fields(arguments)
        if field.default is not MISSING and getattr(arguments, field.name) != field.default
    ]


def refuse_adapter(model: ModelConfig, what: str) -> None:
    """Refuse flags of an adapter where nothing is trained.

    Args:
        model: the flags.
        what: is done instead, as in "a cache is written".

    Raises:
        UsageError: naming the first.
    """
    adapter = [name for name in changed_flags(model) if name.startswith("lora_") or name in _ADAPTER_FLAGS]
    if adapter:
        raise UsageError(
            f"--{adapter[0]} shapes an adapter that is trained, and {what} without training: it would be "
            "ignored. Leave it out; a teacher with an adapter is to be merged first."
        )


def evaluation_rows(script: ScriptArguments, args: Any) -> Any:
    """The rows to evaluate on, None where no evaluation is asked for.

    Args:
        script: names the dataset.
        args: of the training.

    Raises:
        ValueError: the dataset is a file, which has no other split.
    """
    if args.eval_strategy == "no":
        return None
    assert script.dataset_name is not None
    if Path(script.dataset_name).is_file():
        raise ValueError(
            f"--eval_strategy {args.eval_strategy}: {script.dataset_name} is a file, without a split to evaluate on. "
            "Use a dataset with splits, or --eval_strategy no."
        )
    return load_rows(script.dataset_name, script.dataset_config, script.dataset_test_split, script.dataset_streaming)


def parse_sizes(values: list[Any] | str | float) -> list[float]:
    """The sizes of `--sizes`, or of YAML.

    Args:
        values: counts, several of them in one text with commas between.

    Returns:
        the numbers, in their order.

    Raises:
        ValueError: for what is no count.
    """
    items = values if isinstance(values, list) else [values]
    return [parse_count(part) for item in items for part in str(item).split(",") if part.strip()]


def parse_anchors(values: list[Any] | str | float | dict[str, Any] | None) -> list[dict[str, Any] | float]:
    """The anchors of `--anchors`, or of YAML.

    Args:
        values: JSON objects, counts and ratios; or one JSON list of them.

    Returns:
        what `build_chain` takes.

    Raises:
        ValueError: if there are none, or one is neither an object nor a number.
    """
    items = values if isinstance(values, list) else [] if values is None else [values]
    if len(items) == 1 and isinstance(items[0], str) and items[0].lstrip().startswith("["):
        items = _json(items[0], "--anchors")
    if not items:
        raise ValueError(
            "--anchors is missing: name at least one lower anchor, such as --anchors 85M 44M, or --anchors "
            "'[{\"num_hidden_layers\": 16}]'."
        )
    return [_parse_anchor(item) for item in items]


def _parse_anchor(item: Any) -> dict[str, Any] | float:
    if isinstance(item, str) and item.lstrip().startswith("{"):
        item = _json(item, "--anchors")
    if isinstance(item, dict):
        return item
    try:
        return parse_count(item)
    except ValueError as error:
        raise ValueError(
            f"--anchors: {item!r} is neither config fields nor a size. Write '{{\"num_hidden_layers\": 16}}', 85e6, "
            "85M, or a ratio such as 0.6."
        ) from error


def parse_shape(value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """The config fields of `--shape`, or of YAML.

    Args:
        value: a JSON object, a mapping, or None.

    Raises:
        ValueError: for anything else.
    """
    shape = _json(value, "--shape") if isinstance(value, str) else value
    if shape is not None and not isinstance(shape, dict):
        raise ValueError(
            f"--shape: {value!r} is not an object of config fields such as '{{\"num_hidden_layers\": 20}}'."
        )
    return shape


def parse_bridge(value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """What `--bridge`, or YAML, says.

    Args:
        value: a JSON object, a mapping, or None.

    Returns:
        `model`, and `args` and `dataset` where they are given.

    Raises:
        ValueError: for anything else.
    """
    bridge = _json(value, "--bridge") if isinstance(value, str) else value
    if bridge is None:
        return None
    if not isinstance(bridge, dict) or "model" not in bridge or bridge.keys() - {"model", "args", "dataset"}:
        raise ValueError(
            f"--bridge: {value!r} is not an object with a `model`, and `args` and `dataset` where they are wanted. "
            'Write \'{"model": "DIR", "args": {"max_steps": 4000}}\'.'
        )
    return bridge


def _json(text: str, flag: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{flag}: {text!r} is not JSON ({error}). Field names stand in double quotes, the whole in single ones: "
            "'{\"num_hidden_layers\": 16}'."
        ) from error
