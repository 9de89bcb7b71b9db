"""safetensors files: read header by header and tensor by tensor, written as the same bytes each time."""

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from cbd_trl.utils.untrusted import parse_json

# Some hundred bytes a tensor. The library would take 100 MB, of which Python makes gigabytes.
_LARGEST_BYTES = 2**24


@dataclass(frozen=True)
class Entry:
    """One tensor.

    Args:
        dtype: as the format names it, such as "BF16".
        shape: its sizes.
        start, stop: its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read the entries of a safetensors file by name, and its metadata; no tensor is read.

    Raises:
        ValueError: it is not a whole and consistent safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_BYTES:
            raise ValueError(f"a header of {length:,} bytes, more than the {_LARGEST_BYTES:,} that any model needs")
        # The library checks the header: lengths, offsets, overlaps, the size of the file.
        with safe_open(path, "pt") as checked:
            metadata: dict[str, str] = checked.metadata() or {}
        with path.open("rb") as file:
            file.seek(8)
            header = parse_json(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file ({error}).") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), start, stop)
    return entries, metadata


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, in a fresh private mapping of their own bytes on each access.

    Nothing is read before an entry is used, a slice reads its own pages only, and what was read leaves the memory with
    the tensor: `safe_open` maps the whole file, whose pages then stay. Changing a tensor does not change the file.

    Args:
        path: the file.

    Raises:
        ValueError: it is not a whole and consistent safetensors file; on access, a dtype or an empty tensor that no
            file of a chain has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, self.metadata = read_header(path)

    def shape(self, key: str) -> tuple[int, ...]:
        """Look up a tensor's shape in the header."""
        return self._entries[key].shape

    def dtype(self, key: str) -> str:
        """Look up a tensor's dtype in the header, as the format names it, such as "BF16"."""
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


# In front of the header: its length, little-endian.
_LENGTH_BYTES = 8


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, its metadata sorted: the library leaves them in an order of chance.

    Args:
        tensors: contiguous ones, of any shape and dtype.
        path: of the file.
        metadata: beside them.
    """
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    with Path(path).open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = _in_order(file.read(length))
        file.seek(_LENGTH_BYTES)
        file.write(header)


def write_tensors(
    path: str | Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write the file that `save_tensors` would write, one tensor after another, none of which is kept.

    Args:
        path: of the file; one that is there is replaced.
        entries: {name: (dtype, shape)} of all tensors.
        tensors: each once, in any order, on any device.
        metadata: beside them.

    Raises:
        ValueError: a tensor is missing, comes twice, or is not what `entries` has.
    """
    # The library's order: the wider dtypes first, so that all are aligned.
    order = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    stop = 0
    for name in order:
        dtype, shape = entries[name]
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _LENGTH_BYTES) * _LENGTH_BYTES)
    missing = set(entries)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for name, tensor in tensors:
            if name not in missing or (tensor.dtype, tuple(tensor.shape)) != entries[name]:
                raise ValueError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, wanted {entries.get(name)}, once."
                )
            missing.remove(name)
            file.seek(_LENGTH_BYTES + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if missing:
            raise ValueError(f"No tensor was given for {sorted(missing)[:5]}.")


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Make the bytes that `save_tensors` would write."""
    data = save(dict(tensors), metadata=None if metadata is None else dict(metadata))
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    return data[:_LENGTH_BYTES] + _in_order(data[_LENGTH_BYTES:start]) + data[start:]


def _in_order(header: bytes) -> bytes:
    """A header of the same length with its metadata sorted; those of the tensors are sorted by the library."""
    entries = json.loads(header)
    if "__metadata__" in entries:
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= len(header)
    return text.ljust(len(header))
