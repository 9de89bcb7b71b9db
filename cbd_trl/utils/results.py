"""Results that outlive an interrupted run: a JSON file, whole after every measurement."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or the next run, sees the old text or the new one and never a part.

    Args:
        path: the file; its folder is made if need be.
        text: its whole content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Results:
    """Values by key, kept in a JSON file.

    Args:
        path: the file, read if it is there; None keeps them in memory.

    Raises:
        ValueError: if the file is not what this class writes.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._values: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            try:
                values = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{self.path} is not JSON ({error}): delete it to measure everything anew."
                ) from error
            if not isinstance(values, dict):
                raise ValueError(
                    f"{self.path} holds a {type(values).__name__}, wanted the results of an earlier run by key: "
                    "delete it to measure everything anew."
                )
            self._values = values

    def get(self, key: str) -> Any:
        """The value of a key, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value, on disk too.

        Args:
            key: its name; an earlier value is replaced.
            value: anything JSON can write.
        """
        self._values[key] = value
        if self.path is not None:
            write_text(self.path, json.dumps(self._values, indent=1) + "\n")
