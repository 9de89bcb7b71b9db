"""Names, counts, sizes and durations as people read and write them."""

import difflib
import os
import re
from collections.abc import Collection, Iterable, Sequence

_COUNT_UNITS = {"k": 1e3, "M": 1e6, "B": 1e9}
_BYTE_UNITS = {" kB": 1e3, " MB": 1e6, " GB": 1e9}
# Powers of 1000 and of 1024, by the letters that people type.
_BYTES = {"": 1, "b": 1}
_BYTES |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_BYTES |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([kmgt]?i?b|)", re.IGNORECASE)
_COUNT = re.compile(r"([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([kmb]?)", re.IGNORECASE)


def format_count(count: float) -> str:
    """Write a count of parameters, tokens or operations in short: 85.2M, 1.35B, 41.2k."""
    return _with_unit(count, _COUNT_UNITS, 4, "")


def with_active(text: str, total: int, active: int) -> str:
    """Add to a count of parameters how many of them a token is computed with, where these are not all: `30.5B (3.34B
    active)`.

    Args:
        text: the count, as it is written.
        total, active: the two.
    """
    return text if active == total else f"{text} ({format_count(active)} active)"


def format_bytes(count: float) -> str:
    """Write a number of bytes in short, in powers of 1000: 3.21 GB, 12 MB."""
    return _with_unit(count, _BYTE_UNITS, 3, " B")


def _with_unit(count: float, units: dict[str, float], digits: int, none: str) -> str:
    for unit, size in reversed(units.items()):
        if count >= size:
            return f"{count / size:.{digits}g}{unit}"
    return f"{count:.0f}{none}"


def parse_count(text: str | float) -> float:
    """Read a parameter count as people write it.

    Args:
        text: a number, or text such as `138e6`, `138M`, `1.2B`.

    Raises:
        ValueError: for any other text.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text)
    match = _COUNT.fullmatch(_without_separators(str(text)))
    if match is None:
        raise ValueError(f"{text!r} must be a number of parameters: write 138e6, 138M or 1.2B.")
    units = {unit.lower(): size for unit, size in _COUNT_UNITS.items()}
    return float(match[1]) * units.get(match[2].lower(), 1.0)


def parse_bytes(size: str | float) -> int:
    """Read a number of bytes as people write it: MB and GB are powers of 1000, MiB and GiB of 1024.

    Args:
        size: a number of bytes, or text such as `250MB`, `1.5 GiB`.

    Raises:
        ValueError: for anything else, or less than one byte.
    """
    match = None if isinstance(size, bool) else _SIZE.fullmatch(_without_separators(str(size)))
    unit = None if match is None else _BYTES.get(match[2].lower())
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"{size!r} must be a positive number of bytes: write 250MB (10^6), 250MiB (2^20) or 2.5e8.")
    return int(float(match[1]) * unit)


def _without_separators(number: str) -> str:
    """Leave out what separates thousands. A comma elsewhere stays: it may be meant for a point, as in 1,2."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", number.strip().replace("_", ""))


def format_seconds(seconds: float) -> str:
    """Write a duration in short: `40 s`, `6 min`, `1 h 5 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def anchor_name(num_parameters: int, taken: Collection[str] = ()) -> str:
    """Name a model by its size, in the fewest digits: `134515008` is `"135M"`, or `"135M-2"` where that is taken."""
    stem = str(num_parameters)
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if num_parameters >= scale:
            value = num_parameters / scale
            stem = f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"
            break
    same = sum(name == stem or name.startswith(f"{stem}-") for name in taken)
    return f"{stem}-{same + 1}" if same else stem


def readable_name(name: str | None) -> str | None:
    """Shorten a local path to its last folder; a Hub id stays as it is, and a model without a name gives None."""
    if not name or name == "None":
        return None
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or os.path.isdir(name) else name


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Suggest the closest known name, for the end of an error.

    Args:
        name: what was given.
        known: the names that exist.

    Returns:
        " Did you mean 'x'?" with the closest one; empty where none is close.
    """
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], align: Sequence[str] = ()) -> str:
    """Write a table in Markdown; a bar or a line break in a cell stays inside its cell.

    Args:
        header: titles of the columns.
        rows: their cells.
        align: "left" or "right" of each column; empty leaves it to the reader.

    Returns:
        the lines, without a line break at the end.
    """
    rules = [{"left": ":---", "right": "---:"}[side] for side in align] or ["---"] * len(header)
    lines = [[_cell(cell) for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rules, *lines[1:]))


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
