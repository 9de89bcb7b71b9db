"""One safetensors file, its tensors mapped one by one."""

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from cbd_trl.utils.tensor_header import read_header

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, in a fresh private mapping of their own bytes on each access.

    Nothing is read before an entry is used, a slice reads its own pages only, and what was read leaves the memory with
    the tensor: `safe_open` maps the whole file, whose pages then stay. Changing a tensor does not change the file.

    Args:
        path: the file.

    Raises:
        ValueError: it is no whole and consistent safetensors file; on access, a dtype or an empty tensor that no file
            of a chain has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, self.metadata = read_header(path)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return self._entries[key].shape

    def dtype(self, key: str) -> str:
        """A tensor's dtype as the format names it, such as "BF16", from the header."""
        return self._entries[key].dtype

    def __getitem__(self, key: str) -> torch.Tensor:
        entry = self._entries[key]
        if entry.dtype not in _DTYPES or entry.start == entry.stop:
            raise ValueError(
                f"{self.path} holds {key} as {entry.dtype} of shape {entry.shape}: it must be {', '.join(_DTYPES)}, "
                "and not empty."
            )
        page = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            mapped = mmap.mmap(descriptor, entry.stop - page, access=mmap.ACCESS_COPY, offset=page)
        finally:
            os.close(descriptor)
        count, offset = math.prod(entry.shape), entry.start - page
        return torch.frombuffer(mapped, dtype=_DTYPES[entry.dtype], count=count, offset=offset).view(entry.shape)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
