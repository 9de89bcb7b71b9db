"""Writing safetensors files that are the same bytes each time: the library puts metadata in an order of chance."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save, save_file
from torch import Tensor

# In front of the header: its length, little-endian.
_LENGTH_BYTES = 8


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

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


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The same as `save_tensors` writes."""
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
