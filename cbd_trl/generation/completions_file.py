"""A file of completions that outlives an interrupted run: whole batches are appended, and nothing else is changed."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbd_trl.cache.format import write_atomically

FORMAT_VERSION = 1
# Two names for the same weights are no difference: their fingerprint is compared.
_FOR_PEOPLE = ("teacher",)


class CompletionsFile:
    """A JSON-lines file, and beside it, in a file with `.settings` behind its name, how its rows are made.

    Args:
        path: of the file, which need not exist.
        settings: of every row: numbers, strings and None.
        batch_size: rows that are written together.

    Attributes:
        rows: in whole batches, so far.

    Raises:
        ValueError: if the file was not written by this class, was made in another way, or is damaged.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], batch_size: int) -> None:
        self.path = Path(path)
        self._settings = {"format_version": FORMAT_VERSION, **settings}
        self._batch_size = batch_size
        self._record = self.path.with_name(f"{self.path.name}.settings")
        self.rows, self._size = self._look()

    def begin(self) -> None:
        """Cut off what is left of a batch that was interrupted. Of several processes one does this, and appends."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._record, (json.dumps(self._settings, indent=1) + "\n").encode())
        with self.path.open("ab") as file:
            file.truncate(self._size)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, which are on the disk when this returns.

        Args:
            rows: of whole batches, the last of the file excepted.
        """
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += len(rows)

    def _look(self) -> tuple[int, int]:
        """Rows and bytes that stay."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            # A first try that failed before its first row binds nobody to its settings.
            return 0, 0
        if not self._record.is_file():
            raise ValueError(
                f"{self.path} exists, and {self._record.name} beside it does not: it was not generated here, or that "
                "file was moved. Nothing is added to it. Give another output_file."
            )
        self._check_settings()
        ends = self._line_ends()
        total: int = self._settings["rows"]
        if len(ends) > total:
            raise ValueError(
                f"{self.path} has {len(ends)} rows, and {total} are generated: the file was changed. Delete it to "
                "generate it anew, or give another output_file."
            )
        rows = total if len(ends) == total else len(ends) // self._batch_size * self._batch_size
        return rows, ends[rows - 1] if rows else 0

    def _check_settings(self) -> None:
        found = self._read_record()
        names = {*found, *self._settings} - {*_FOR_PEOPLE}
        differing = [
            f"{name} is {found.get(name)!r}, asked for {self._settings.get(name)!r}"
            for name in sorted(names)
            if found.get(name) != self._settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.path} was generated in another way: {'; '.join(differing)}. All rows of a file are made alike "
                f"(these by {found.get('teacher') or 'a model made in memory'}). Give another output_file, or the "
                "settings it was made with."
            )

    def _read_record(self) -> dict[str, Any]:
        try:
            found = json.loads(self._record.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"it holds a {type(found).__name__}")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._record} cannot be read ({error}), so how the rows of {self.path} were made is not known. "
                "Give another output_file."
            ) from error
        return found

    def _line_ends(self) -> list[int]:
        """Where each whole line ends, in bytes."""
        ends: list[int] = []
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{self.path}, line {len(ends) + 1} is not JSON ({error}): the file was changed or damaged. "
                        "Delete it to generate it anew, or give another output_file."
                    ) from error
                ends.append((ends[-1] if ends else 0) + len(line))
        return ends
