"""Names in front of a reader: what to call a model, and which name was meant."""

import difflib
import os
from collections.abc import Iterable


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
