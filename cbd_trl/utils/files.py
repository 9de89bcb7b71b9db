"""Files that must outlive a crash: written in one step, flushed before they count, told apart by their sha256."""

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path
from safetensors import SafetensorError

# What the temporary file, or folder, of an atomic write is called: this and the name that it will have.
TEMPORARY = ".tmp-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file, which takes the place of a file once the block ends without an error.

    A reader, or the next run, sees the old content or the new one and never a part, whether the process is killed or
    the power fails. The temporary file has one name, so one process writes at a time, and what a killed one left is
    written over.

    Args:
        path: the file; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    # A link that lies there is not followed.
    temporary.unlink(missing_ok=True)
    yield temporary
    _flush_file(temporary)
    os.replace(temporary, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file in one step (see `replacing`).

    Args:
        path: the file; its folder is made if need be.
        content: all of it.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file in one step, as UTF-8 (see `replacing`).

    Args:
        path: the file; its folder is made if need be.
        text: all of it.
    """
    write_bytes(path, text.encode())


def flush(folder: Path) -> None:
    """Have every file below a folder on the disk, so that a power cut after a rename finds them whole.

    Args:
        folder: whatever it holds.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            _flush_file(path)


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(place: Path, kept: str) -> Iterator[None]:
    """Turn a write that fails into an error with a way out.

    Args:
        place: what is being written.
        kept: a sentence about what stands in spite of it.

    Raises:
        OSError: the disk is full, or the place cannot be written to.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _failed(place, error, kept) from error
    except RuntimeError as error:
        # All that torch.save reports of a full disk.
        if "inline_container" not in str(error):
            raise
        raise _failed(place, error, kept) from error


def check_writable(folder: Path) -> None:
    """Check that a folder can be made and written to, by a file that is gone at once.

    Args:
        folder: made if there is none.

    Raises:
        OSError: it cannot be written to.
    """
    with writing(folder, "Nothing was changed."):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _failed(place: Path, error: Exception, kept: str) -> OSError:
    return OSError(
        f"{place} could not be written ({error}). {kept} Make room on the disk or the folder writable, and run the "
        "same again; or choose another output_dir."
    )


# A change is seen by inode, size and times. These could miss one that comes right after another.
_SETTLED_SECONDS = 5.0
# What is smaller is hashed in the time that looking it up takes.
_SMALL_BYTES = 2**20

State = tuple[int, ...]


def sha256_of(path: Path) -> str:
    """Hash a file.

    The sha256 is looked up where the file has the inode, size and times that it had when it was computed before; a
    file younger than a few seconds is read every time. What is remembered from process to process lies in the assets
    of the Hugging Face cache (`HF_ASSETS_CACHE`), an entry a file; without a folder to write to, nothing is.
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
        entry = json.dumps({"path": str(path), "state": state, "sha256": digest})
        # Another process may write the same entry at the same time, and one of them then fails, which is no matter.
        write_text(_entry_of(path), entry)


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
