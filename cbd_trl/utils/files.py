"""Writing what must outlive a crash: on the disk before it counts, and an error that says what is still there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def flush(folder: Path) -> None:
    """Have every file below a folder on the disk, so that a power cut after a rename finds them whole.

    Args:
        folder: whatever it holds.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def writing(place: Path, kept: str) -> Iterator[None]:
    """Within it a write that fails is an error with a way out.

    Args:
        place: what is being written.
        kept: a sentence that says what stands in spite of it.

    Raises:
        OSError: the disk is full, or the place cannot be written to.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _failed(place, error, kept) from error
    except RuntimeError as error:
        # All that torch.save says of a full disk.
        if "inline_container" not in str(error):
            raise
        raise _failed(place, error, kept) from error


def check_writable(folder: Path) -> None:
    """Make a folder, and a file in it that is gone at once.

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
