"""Names from modules that are imported only when the names are needed."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import overload


class NamesOf(Sequence[str]):
    """The names in a table of a module that takes long to import, read on first use.

    Args:
        module: that holds the table.
        table: name of a mapping or sequence of names in it.
    """

    def __init__(self, module: str, table: str) -> None:
        self.module, self.table = module, table

    def _read(self) -> list[str]:
        return list(getattr(import_module(self.module), self.table))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._read()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())
