"""Files that somebody else may have written: read in full or refused by name, and nothing in them is believed."""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)


# Of any JSON file of ours; a tokenizer's vocabulary may take more.
_LARGEST_BYTES = 2**24
# Far more than any of our files has, far less than makes Python's own recursion fail.
_DEEPEST = 40
# transformers writes 10^30 for "no limit".
_MOST_DIGITS = 40


def read_json(file: Path, way_out: str, limit: int = _LARGEST_BYTES) -> Any:
    """What a JSON file holds, for one that need not be friendly.

    Args:
        file: to be read.
        way_out: the end of every error: what to do now.
        limit: its largest size, bytes.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no plain file, too large, or not JSON as `parse_json` takes it; the message names it.
    """
    try:
        # A pipe would be waited for, and a device has no end.
        if file.exists() and not file.is_file():
            raise ValueError("it is no plain file")
        if (size := file.stat().st_size) > limit:
            raise ValueError(f"{size:,} bytes are more than the {limit:,} that such a file may have")
        return parse_json(file.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {way_out}") from error


def check_inside(folder: Path, file: Path, way_out: str) -> None:
    """Refuse a file that is a link out of its folder.

    Args:
        folder: that it is to lie in.
        file: below it, whether it is there or not.
        way_out: the end of the error.

    Raises:
        ValueError: naming the file.
    """
    try:
        place, root = file.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} leads nowhere ({error}). {way_out}") from error
    # In the Hub's cache a snapshot's files are links to blobs that lie beside the snapshots.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (place.is_relative_to(root) or place.is_relative_to(blobs)):
        raise ValueError(f"{file} is a link that leaves {folder}. Put the file itself there. {way_out}")


def parse_json(data: bytes) -> Any:
    """JSON that means one thing to every reader: UTF-8, no key twice, only finite numbers of few digits, not deep.

    Raises:
        ValueError: it is not.
    """
    try:
        found = json.loads(
            data.decode(), object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_number
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(found)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_MOST_DIGITS]} is not finite")
    return value


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(_DEEPEST):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return
        level = [entry for value in level for entry in (value.values() if isinstance(value, dict) else value)]
    raise ValueError("it is nested too deeply")


def check_fields(entry: Any, fields: Mapping[str, tuple[type, ...]], where: str, way_out: str) -> None:
    """Refuse an object that does not have exactly these fields, or one of another type.

    Args:
        entry: as JSON has it.
        fields: name -> types; an int is no bool, and a whole number will do for a float.
        where: the file, and where in it.
        way_out: the end of every error.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {type(entry).__name__}. {way_out}")
    missing, unknown = sorted(fields.keys() - entry.keys()), sorted(entry.keys() - fields.keys())
    if missing or unknown:
        raise ValueError(f"{where}: missing keys {missing}, unknown keys {shown(unknown)}. {way_out}")
    for key, types in fields.items():
        value = entry[key]
        fine = isinstance(value, types) or (float in types and type(value) is int)
        if not fine or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"{where}: {key} must be of type {wanted}, got {shown(value)}. {way_out}")


def shown(value: Any) -> str:
    """A value of any size in a few words."""
    return reprlib.repr(value)


@contextmanager
def reading(file: Path, what: str, way_out: str) -> Iterator[None]:
    """Whatever a library raises while it reads a file is a ValueError that names the file.

    Args:
        file: read by somebody else's code.
        what: it is read as.
        way_out: the end of the error.

    Raises:
        ValueError: for any error.
    """
    try:
        yield
    except Exception as error:  # what others' readers raise of nonsense has no end
        raise ValueError(f"{file} cannot be read as {what} ({type(error).__name__}: {error}). {way_out}") from error


def name_remote_code(place: str, revision: str | None = None, token: str | bool | None = None) -> None:
    """Warn of the code that `trust_remote_code=True` will run: its classes, their repository, the commit. A model
    without code of its own gives no warning. Nothing is run here.

    Args:
        place: path or Hub id of a model.
        revision, token: of a Hub id.
    """
    found: dict[str, Any] = {}
    # What cannot be read cannot be loaded either, and loading says so.
    with suppress(OSError, ValueError):
        found, _ = PretrainedConfig.get_config_dict(place, revision=revision, token=token)
    # "owner/name--module.Class" is a class of another repository.
    classes = sorted(set(_texts(found.get("auto_map"))))
    if classes:
        commit = found.get("_commit_hash") or revision
        logger.warning(
            f"trust_remote_code=True: {', '.join(classes)} of {place} "
            f"({f'at {commit}' if commit else 'as it is now'}) will run on this machine with all your rights. Read it "
            "first, and pin the commit that you have read as the revision."
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _texts(inside)
