"""What a safetensors file says of its tensors, checked."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

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
    """The tensors of a safetensors file by name, and its metadata; no tensor is read.

    Raises:
        ValueError: it is no whole and consistent safetensors file.
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
