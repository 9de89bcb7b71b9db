"""Reads the flags of the subcommands of `cbd-trl`, and the YAML file that holds some of them; prints their help."""

import argparse
import json
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cbd_trl.utils.formatting import did_you_mean, parse_count
from cbd_trl.utils.lazy import NamesOf

if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments

_ADAPTER_FLAGS = ("use_peft", "use_rslora", "use_dora")
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}
_OF_TRL = "the options of TRL's ScriptArguments, SFTConfig and ModelConfig"


class UsageError(ValueError):
    """The flags are wrong, as opposed to the work that they request."""


@dataclass(frozen=True)
class Command:
    """A subcommand whose flags are the fields of dataclasses.

    `--help` lists the fields of `own`, and imports neither torch nor TRL: nor must the modules of these dataclasses.
    `--help-all` lists all flags.

    Args:
        name: what is typed behind `cbd-trl`.
        usage: what is usually typed behind the name.
        description: what it does.
        own: dataclasses of this project.
        types: returns the dataclasses to fill, in order; None for `own`.
        others: what `--help-all` lists besides, in words, where there are `types`.
        positional: help of the positional arguments, by name.
        defaults: values of flags that replace the defaults of the dataclasses.
        hyphens: write options with hyphens in the help, where none is TRL's; both ways are read.
    """

    name: str
    usage: str
    description: str
    own: tuple[type, ...]
    types: Callable[[], list[Any]] | None = None
    others: str = _OF_TRL
    positional: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    hyphens: bool = False

    def parse(self, flags: list[str]) -> list[Any]:
        """Fill the dataclasses from flags and YAML.

        Args:
            flags: as typed behind the name.

        Returns:
            the dataclasses, and the namespace of the positional arguments if there are any.

        Raises:
            SystemExit: help was requested, and is printed.
            UsageError: for unknown flags, values of the wrong type, or a config file that cannot be read.
        """
        if {"-h", "--help"} & set(flags) or ("--help-all" in flags and self.types is None):
            print(self.help(), end="")
            raise SystemExit(0)
        parser = self._parser()
        if "--help-all" in flags:
            parser.print_help()
            raise SystemExit(0)
        return _parse(parser, flags)

    def help(self) -> str:
        """Format the command's own flags, without importing what the others come from."""
        parser = argparse.ArgumentParser(
            prog=f"cbd-trl {self.name}",
            usage=f"cbd-trl {self.name} {self.usage}",
            description=self.description,
            formatter_class=_HelpFormatter,
        )
        for name, text in self.positional.items():
            parser.add_argument(name, nargs="?", help=text)
        if self.types is not None:
            parser.add_argument(
                "--help-all", help=f"List {self.others} too (takes some seconds).", action="store_true"
            )
        parser.add_argument("--config", help="YAML file of options, a line each; flags win over it.", metavar="FILE")
        for kind in self.own:
            hints = typing.get_type_hints(kind)
            for option in fields(kind):
                default = self.defaults.get(option.name, option.default)
                name = option.name.replace("_", "-") if self.hyphens else option.name
                _add_to_help(parser, f"--{name}", hints[option.name], default, option.metadata)
        return parser.format_help()

    def _parser(self) -> Any:
        parser = _trl_parser()(
            list(self.own) if self.types is None else self.types(),
            prog=f"cbd-trl {self.name}",
            usage=f"cbd-trl {self.name} {self.usage}",
            description=self.description,
            epilog="Every option can stand in a YAML file: --config FILE.",
        )
        for name, text in self.positional.items():
            parser.add_argument(name, nargs="?", help=text)
        parser.set_defaults_with_config(**self.defaults)
        return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _add_to_help(parser: argparse.ArgumentParser, flag: str, hint: Any, default: Any, metadata: Any) -> None:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    nargs = "?" if kinds == [bool] else None
    if typing.get_origin(kinds[0]) is list:
        kinds, nargs = list(typing.get_args(kinds[0])), "+"
    metavar, text = _METAVARS.get(kinds[0], "JSON"), metadata.get("help", "")
    choices = metadata.get("choices")
    if isinstance(choices, NamesOf):
        # To list these would import torch.
        metavar, text = "NAME", f"{text} --help-all lists the names."
    elif choices is not None:
        metavar = f"{{{','.join(map(str, choices))}}}"
    parser.add_argument(flag, help=text, default=default, metavar=metavar, nargs=nargs)


@cache
def _trl_parser() -> type:
    from trl import TrlParser

    class Parser(TrlParser):
        """TrlParser with errors of one line: the stock usage text of a training command is 300 flags long."""

        def error(self, message: str) -> NoReturn:
            raise UsageError(message.rstrip(".") + ".")

        def known_flags(self) -> list[str]:
            return [flag for action in self._actions for flag in action.option_strings]

    return Parser


def _parse(parser: Any, flags: list[str]) -> list[Any]:
    import yaml

    # TrlParser reads `--config FILE` only.
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if flags[-1:] == ["--config"]:
        raise UsageError("--config needs the path of a YAML file.")
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
        unknown = next((text for text in remaining if text.startswith("--")), remaining[0])
        raise UsageError(f"There is no flag {unknown!r}.{did_you_mean(unknown, parser.known_flags())}")
    return parsed


def require(**values: Any) -> None:
    """Check that flags were given.

    Args:
        values: of the flags by name, None where a flag is missing.

    Raises:
        UsageError: naming those that are missing.
    """
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.")


def changed_flags(arguments: Any) -> list[str]:
    """List the flags that are not at their default.

    Args:
        arguments: one of the parsed dataclasses.
    """
    return [
        field.name
        for field in fields(arguments)
        if field.default is not MISSING and getattr(arguments, field.name) != field.default
    ]


def check_no_adapter(model: "ModelConfig", what: str) -> None:
    """Check that no flag shapes an adapter, where nothing is trained.

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
            "ignored. Leave it out; merge an adapter into the teacher first."
        )


def loading_options(model: "ModelConfig", given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Collect the keyword arguments of `from_pretrained` from the flags of a model.

    Args:
        model: the flags.
        given: further arguments, which win over the flags.

    Returns:
        revision, attn_implementation and dtype, whether set or None, and `quantization_config` where there is one.
    """
    from trl import get_quantization_config

    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(given or {}),
    }
    quantization = get_quantization_config(model)
    return options if quantization is None else {**options, "quantization_config": quantization}


def training_rows(script: "ScriptArguments") -> Any:
    """Load the rows to train on.

    Args:
        script: names the dataset.
    """
    from cbd_trl.utils.datasets import load_rows

    assert script.dataset_name is not None
    return load_rows(script.dataset_name, script.dataset_config, script.dataset_train_split, script.dataset_streaming)


def evaluation_rows(script: "ScriptArguments", args: Any) -> Any:
    """Load the rows to evaluate on, None where no evaluation is requested.

    Args:
        script: names the dataset.
        args: of the training.

    Raises:
        ValueError: the dataset is a file, which has no other split.
    """
    from cbd_trl.utils.datasets import load_rows

    if args.eval_strategy == "no":
        return None
    assert script.dataset_name is not None
    if Path(script.dataset_name).is_file():
        raise ValueError(
            f"--eval_strategy {args.eval_strategy.value}: {script.dataset_name} is a file, without a split to "
            "evaluate on. Use a dataset with splits, or --eval_strategy no."
        )
    return load_rows(script.dataset_name, script.dataset_config, script.dataset_test_split, script.dataset_streaming)


def parse_names(values: list[str] | None) -> list[str]:
    """Split the values of a flag at commas, and keep each name once.

    Args:
        values: as parsed, None where the flag was left out.
    """
    return list(dict.fromkeys(part.strip() for value in values or [] for part in value.split(",") if part.strip()))


def parse_sizes(values: list[Any] | str | float) -> list[float]:
    """Read the sizes of `--sizes`, or of YAML.

    Args:
        values: counts, several of them in one text with commas between.

    Returns:
        the numbers, in their order.

    Raises:
        ValueError: a value is not a count.
    """
    items = values if isinstance(values, list) else [values]
    return [parse_count(part) for item in items for part in str(item).split(",") if part.strip()]


def parse_shape(value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """Read the config fields of `--shape`, or of YAML.

    Args:
        value: a JSON object, a mapping, or None.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"--shape: {value!r} is not JSON ({error}). Put field names in double quotes and the whole in single "
                "ones: '{\"num_hidden_layers\": 16}'."
            ) from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(
            f"--shape: {value!r} must be an object of config fields, such as '{{\"num_hidden_layers\": 20}}'."
        )
    return value
