"""Values of a recipe, checked one by one; what is wrong with them is collected, each with its place in the file."""

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from cbd_trl.utils.formatting import did_you_mean, parse_count

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


class Values:
    """Takes values for what a recipe wants them to be.

    Args:
        problems: where what is wrong is added, as "place: what".
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems

    def refuse(self, place: str, what: str) -> None:
        """Note a problem.

        Args:
            place: in the file, such as "anchors[1].args".
            what: is wrong there.
        """
        self.problems.append(f"{place}: {what}")

    def mapping(self, value: Any, place: str, known: Iterable[str], required: Iterable[str] = ()) -> dict[str, Any]:
        """A mapping without its unknown keys, which are refused; empty for anything else.

        Args:
            value: as read.
            place: in the file; "" for the file itself.
            known: keys there may be.
            required: keys there must be.
        """
        known = list(known)
        if not isinstance(value, Mapping):
            self.refuse(
                place or "the file", f"{shown(value)} is no mapping. Write it with the keys {', '.join(known)}."
            )
            return {}
        for key in value:
            if key not in known:
                what = f"there is no such key.{did_you_mean(key, known)}"
                # Of the fields of a config there are hundreds.
                self.refuse(inside(place, key), what + (f" There are: {', '.join(known)}." if len(known) < 20 else ""))
        for key in required:
            if value.get(key) is None:
                self.refuse(inside(place, key), "is missing.")
        return {key: entry for key, entry in value.items() if key in known}

    def text(self, value: Any, place: str) -> str | None:
        """A string; None for None and for anything else, which is refused."""
        if value is None or (isinstance(value, str) and value.strip()):
            return value
        self.refuse(place, f"{shown(value)} is no text.")
        return None

    def whole(self, value: Any, place: str, default: int) -> int:
        """A whole number of at least 2."""
        if isinstance(value, int) and not isinstance(value, bool) and value >= 2:
            return value
        self.refuse(place, f"{shown(value)} is no whole number of at least 2.")
        return default

    def positive(self, value: Any, place: str) -> float | None:
        """A number above 0, or text such as 44M."""
        try:
            number = parse_count(value)
        except ValueError:
            number = 0.0
        if number > 0 and math.isfinite(number):
            return number
        self.refuse(place, f"{shown(value)} is no number above 0. Write 44e6, 44M or 0.5.")
        return None

    def items(self, value: Any, place: str) -> list[tuple[str, Any]]:
        """(place, entry) of a list, or of one value that stands for a list of it."""
        if not isinstance(value, list):
            return [(place, value)]
        if not value:
            self.refuse(place, "the list is empty.")
        return [(f"{place}[{number}]", entry) for number, entry in enumerate(value)]


def inside(place: str, key: Any) -> str:
    """The place of a key."""
    return f"{place}.{key}" if place else str(key)


def shown(value: Any) -> str:
    """A value in a message, cut where it is long or deep."""
    return _SHORT.repr(value)
