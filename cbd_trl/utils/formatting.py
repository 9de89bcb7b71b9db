"""Names in front of a reader: what to call a model, and which name was meant."""

import difflib
import os
import re
from collections.abc import Collection, Iterable, Sequence


def readable_name(name: str | None) -> str | None:
    """A Hub id as it is, the last folder of a local path, None for a model without a name."""
    if not name or name == "None":
        return None
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or os.path.isdir(name) else name


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """What an error about an unknown name ends with.

    Args:
        name: what was given.
        known: the names that exist.

    Returns:
        " Did you mean 'x'?" with the closest one; empty where none is close.
    """
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def format_count(num_parameters: float) -> str:
    """A parameter count as people say it: 85.2M, 1.35B, 41.2k."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if num_parameters >= size:
            return f"{num_parameters / size:.4g}{unit}"
    return f"{num_parameters:.0f}"


_COUNT = re.compile(r"([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([kmb]?)", re.IGNORECASE)


_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


def parse_count(text: str | float) -> float:
    """A parameter count as people write it.

    Args:
        text: a number, or text such as `138e6`, `138M`, `1.2B`.

    Returns:
        the number.

    Raises:
        ValueError: for any other text.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text)
    match = _COUNT.fullmatch(str(text).strip().replace(",", "").replace("_", ""))
    if match is None:
        raise ValueError(f"{text!r} is no number of parameters: write 138e6, 138M or 1.2B.")
    return float(match[1]) * _UNITS[match[2].lower()]


def anchor_name(num_parameters: int, taken: Collection[str] = ()) -> str:
    """`134515008` -> `"135M"`, or `"135M-2"` where that name is taken."""
    stem = str(num_parameters)
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if num_parameters >= scale:
            value = num_parameters / scale
            stem = f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"
            break
    alike = sum(name == stem or name.startswith(f"{stem}-") for name in taken)
    return f"{stem}-{alike + 1}" if alike else stem


def format_seconds(seconds: float) -> str:
    """Seconds as people say them: `40 s`, `6 min`, `1 h 5 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


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
