"""sha256 of files, worked out once as long as a file stays as it is: remembered in memory, and on disk for the next
process."""

import functools
import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from huggingface_hub import cached_assets_path

# A change is seen by inode, size and times. These could miss one that comes right after another.
_SETTLED_SECONDS = 5.0
# What is smaller is hashed in the time that looking it up takes.
_SMALL_BYTES = 2**20

State = tuple[int, ...]


def sha256_of(path: Path) -> str:
    """A file's sha256.

    It is looked up where the file has the inode, size and times that it had when it was worked out before; a file
    younger than a few seconds is read every time. What is remembered from process to process lies in the assets of
    the Hugging Face cache (`HF_ASSETS_CACHE`), an entry a file; without a folder to write to, nothing is.
    """
    found = path.stat()
    state = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    young = time.time() - max(found.st_mtime, found.st_ctime) < _SETTLED_SECONDS
    return _digest(path) if young else _remembered(path.resolve(), state)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _remembered(path: Path, state: State) -> str:
    if path.stat().st_size < _SMALL_BYTES:
        return _digest(path)
    known = _read_entry(path, state)
    if known is None:
        known = _digest(path)
        _write_entry(path, state, known)
    return known


def _entry_of(path: Path) -> Path:
    name = hashlib.sha256(str(path).encode()).hexdigest()
    return cached_assets_path("cbd_trl", "sha256") / f"{name}.json"


def _read_entry(path: Path, state: State) -> str | None:
    with suppress(OSError, ValueError, TypeError, KeyError):
        entry = json.loads(_entry_of(path).read_text(encoding="utf-8"))
        if (entry["path"], entry["state"]) == (str(path), list(state)):
            return str(entry["sha256"])
    return None


def _write_entry(path: Path, state: State, digest: str) -> None:
    with suppress(OSError, ValueError):
        entry = _entry_of(path)
        temporary = entry.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"path": str(path), "state": state, "sha256": digest}), encoding="utf-8")
        temporary.replace(entry)
