"""Files that somebody else may have written: read in full or refused by name, and nothing in them is believed."""

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

# Of any JSON file of ours; a tokenizer's vocabulary may take more.
_LARGEST_BYTES = 2**24
# Far more than any of our files has, far less than makes Python's own recursion fail.
_DEEPEST = 40
# transformers writes 10^30 for "no limit".
_MOST_DIGITS = 40


def read_json(file: Path, way_out: str, limit: int = _LARGEST_BYTES) -> Any:
    """Read a JSON file that need not be friendly.

    Args:
        file: to be read.
        way_out: the end of every error: what to do now.
        limit: its largest size, bytes.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not a plain file, too large, or not JSON as `parse_json` takes it; the message names it.
    """
    try:
        # A pipe would be waited for, and a device has no end.
        if file.exists() and not file.is_file():
            raise ValueError("it must be a plain file")
        if (size := file.stat().st_size) > limit:
            raise ValueError(f"{size:,} bytes are more than the {limit:,} that such a file may have")
        return parse_json(file.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {way_out}") from error


def check_inside(folder: Path, file: Path, way_out: str) -> None:
    """Check that a file is not a link out of its folder.

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
    """Parse JSON that means one thing to every reader: UTF-8, no key twice, finite numbers of few digits, not deep.

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


class Untrusted(BaseModel):
    """A JSON object that somebody else may have written: its fields and no others, of exactly these types.

    A bool is not taken for an int, nor text for a number; a whole number will do for a float.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


Schema = TypeVar("Schema", bound=Untrusted)
# Mistakes in one message.
_MOST_MISTAKES = 3


def validated(schema: type[Schema], found: Any, file: Path, way_out: str, defaults: bool = False) -> Schema:
    """Validate what a JSON file holds.

    Args:
        schema: what it has to be.
        found: as `read_json` gives it.
        file: for the message.
        way_out: the end of the error.
        defaults: whether fields that have one may be left out, as by code that makes a record.

    Raises:
        ValueError: naming the file, the first fields that are wrong, and their values.
    """
    try:
        read = schema.model_validate(found)
    except ValidationError as error:
        mistakes = [_mistake(mistake) for mistake in error.errors(include_url=False)[:_MOST_MISTAKES]]
        raise ValueError(f"{file}, {'; '.join(mistakes)}. {way_out}") from None
    if not defaults and (missing := list(_missing_fields(read, ""))):
        mistakes = [f"{field}: the field is missing" for field in missing[:_MOST_MISTAKES]]
        raise ValueError(f"{file}, {'; '.join(mistakes)}. {way_out}")
    return read


def _missing_fields(value: Any, place: str) -> Iterator[str]:
    """Fields that a file leaves out: defaults are for code that makes an object, not for one that was read."""
    if isinstance(value, Untrusted):
        for name in type(value).model_fields:
            field = f"{place}.{name}".lstrip(".")
            if name not in value.model_fields_set:
                yield field
            else:
                yield from _missing_fields(getattr(value, name), field)
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from _missing_fields(entry, f"{place}[{number}]")


def _mistake(error: Mapping[str, Any]) -> str:
    """Put a mistake that pydantic found into words: `anchors[1].dtype: Input should be ..., got 'int8'`."""
    place = ""
    for part in error["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part if _FIELD.fullmatch(part) else shown(part)}"
    field = place.lstrip(".") or "the whole"
    if error["type"] == "missing":
        return f"{field}: the field is missing"
    if error["type"] == "extra_forbidden":
        return f"{field}: there is no field of this name"
    if error["type"] == "value_error":
        cause = str(error["ctx"]["error"])
        return f"{field}: {cause}" + ("" if isinstance(error["input"], dict) else f", got {shown(error['input'])}")
    return f"{field}: {error['msg']}, got {shown(error['input'])}"


_FIELD = re.compile(r"\w{1,60}", re.ASCII)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Format a value for a message, cut where it is long or deep."""
    return _SHORT.repr(value)


@contextmanager
def reading(file: Path, what: str, way_out: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into a ValueError that names the file.

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
