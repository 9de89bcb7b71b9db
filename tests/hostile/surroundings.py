"""What lies around a chain, and whether anything there was opened or changed."""

import ctypes
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Linux tells of every opening of a file in a folder, whatever language the reader is written in.
_OPENED, _NONBLOCK = 0x20, 0o4000


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, with what it holds or where it leads."""
    return {path.relative_to(folder).as_posix(): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "a folder" if path.is_dir() else "neither file nor folder"


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing in a folder is opened (where the system can tell) or changed."""
    before = snapshot(folder)
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]
    watch = _watch(folders)
    try:
        yield
        opened = b"" if watch is None else _read(watch)
    finally:
        if watch is not None:
            os.close(watch)
    assert not opened, f"something in {folder} was opened: {opened!r}"
    assert snapshot(folder) == before


def _watch(folders: list[Path]) -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(_NONBLOCK)
    assert watch >= 0, os.strerror(ctypes.get_errno())
    for folder in folders:
        assert libc.inotify_add_watch(watch, os.fsencode(folder), _OPENED) >= 0, os.strerror(ctypes.get_errno())
    return int(watch)


def _read(watch: int) -> bytes:
    try:
        return os.read(watch, 2**16)
    except BlockingIOError:
        return b""
