"""Reads the flags, the YAML file and the rows that the subcommands of `cbd-trl` have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from gzip import BadGzipFile
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, ScriptArguments, TrlParser

from cbd_trl.utils.formatting import did_you_mean

_ADAPTER_FLAGS = ("use_peft", "use_rslora", "use_dora")
_FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


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


def load_rows(name: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """A dataset from a local file or from the Hub.

    Args:
        name: a .jsonl, .json, .csv, .parquet or .txt file (each also with .gz behind), or what `datasets.load_dataset`
            takes. A text file gives one row per line that is not blank.
        config: configuration of a dataset on the Hub.
        split: of a dataset on the Hub, or a slice of one, such as `train[:90%]`. A file has one split, which is all of
            it, and slices of that: `train[90%:]`.
        streaming: read while training.

    Raises:
        ValueError: for a local file of another kind, one that is not there, or one whose content cannot be read.
    """
    from datasets import load_dataset

    path = Path(name)
    if not path.exists() and path.suffix.lower() in (*_FILE_KINDS, ".gz"):
        raise ValueError(f"There is no file {name}. Give a file that exists, or the Hub id of a dataset.")
    if not path.is_file():
        with _explained_rows(name):
            return load_dataset(name, name=config, split=split, streaming=streaming)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    kind = _FILE_KINDS.get(suffix.lower())
    if kind is None:
        raise ValueError(
            f"{name} is not a dataset file that can be read: its name must end in {', '.join(_FILE_KINDS)}."
        )
    own = split if split.startswith("train[") else "train"
    with _explained_rows(name):
        rows = load_dataset(kind, data_files=str(path), split=own, streaming=streaming)
    return rows.filter(lambda row: bool(row["text"].strip())) if kind == "text" else rows


@contextmanager
def _explained_rows(name: str) -> Iterator[None]:
    """What `datasets` says of a file that it cannot read, which is a traceback without the file, as one sentence."""
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    try:
        yield
    except (DatasetGenerationError, ArrowInvalid, BadGzipFile, UnicodeDecodeError, StopIteration) as error:
        # The cause is wrapped, except where an error of rows that differ is told in full.
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration):
            raise ValueError(f"{name} is empty: there are no rows to read. Give a file with rows.") from error
        if Path(name).is_dir():
            wanted = "every file in it to have the same kind and columns; or give one file"
        elif isinstance(cause, UnicodeDecodeError):
            wanted = "text in UTF-8: convert it, as in `iconv -f latin1 -t utf-8`"
        else:
            wanted = "what its name says: in .jsonl one JSON object on each line, all with the same columns"
        raise ValueError(
            f"The rows of {name} cannot be read: {' '.join(str(cause).split())} ({type(cause).__name__}). "
            f"Wanted {wanted}."
        ) from error


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
