"""One safetensors file, its tensors mapped one by one."""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, in a fresh private mapping of their own bytes on each access.

    Nothing is read before an entry is used, a slice reads its own pages only, and what was read leaves the memory with
    the tensor: `safe_open` maps the whole file, whose pages then stay. Changing a tensor does not change the file.

    Args:
        path: the file.

    Raises:
        ValueError: it is no whole and consistent safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # The library checks the header: lengths, offsets, overlaps, the size of the file.
            with safe_open(path, "pt") as checked:
                self.metadata: dict[str, str] = checked.metadata() or {}
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._entries: dict[str, Any] = json.loads(file.read(length))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a safetensors file ({error}).") from error
        self._entries.pop("__metadata__", None)
        self._start = 8 + length

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self._entries[key]["shape"])

    def dtype(self, key: str) -> str:
        """A tensor's dtype as the format names it, such as "BF16", from the header."""
        return str(self._entries[key]["dtype"])

    def __getitem__(self, key: str) -> torch.Tensor:
        first, last = (self._start + offset for offset in self._entries[key]["data_offsets"])
        page = first - first % mmap.ALLOCATIONGRANULARITY
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            mapped = mmap.mmap(descriptor, last - page, access=mmap.ACCESS_COPY, offset=page)
        finally:
            os.close(descriptor)
        shape = self.shape(key)
        flat = torch.frombuffer(mapped, dtype=_DTYPES[self.dtype(key)], count=math.prod(shape), offset=first - page)
        return flat.view(shape)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
