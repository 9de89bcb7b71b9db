"""A disk that is full, a folder that cannot be written to: a clear error, and nothing lost."""

import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbd_trl import Chain
from cbd_trl.utils.files import check_writable, writing
from tests.crash.builds import build, build_and_die, fingerprints, forked

WAY_OUT = r".*Make room on the disk or the folder writable, and run the same again"
NOBODY = 65534


def build_and_tell(folder: Path, bytes_per_file: int | None = None, user: int | None = None) -> None:
    """Build, and write the error that ended it beside the folder, in a process of its own.

    Args:
        bytes_per_file: a file that is to become longer fails, as every file does on a full disk.
        user: id of the user who builds.
    """
    told = (folder.parent / "told").open("w")
    # From here, because the folders above may be closed to that user.
    os.chdir(folder.parent)
    if bytes_per_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, bytes_per_file))
    if user is not None:
        os.seteuid(user)
    with told:
        try:
            build_and_die(Path(folder.name), anchors=1)
        except OSError as error:
            told.write(str(error))


def error_of(folder: Path, **how: int) -> str:
    assert forked(build_and_tell, folder, *how.values()) == 0
    return (folder.parent / "told").read_text()


def test_what_is_finished_outlives_a_full_disk(tmp_path: Path) -> None:
    """The source takes 196 kB, and its anchor 132 kB; the anchor's optimizer has twice as much to write."""
    folder = tmp_path / "chain"
    message = r"^chain/\.work/33K/checkpoint-2 could not be written \(.*\)\. No checkpoint had been written yet\."
    told = error_of(folder, bytes_per_file=210_000)
    assert re.search(message + WAY_OUT, told), told
    assert [anchor.name for anchor in Chain.from_pretrained(folder).anchors] == ["49K"]
    before = fingerprints(folder / "49K")
    assert error_of(folder) == ""
    assert len(Chain.from_pretrained(folder).anchors) == 2 and fingerprints(folder / "49K") == before


def test_an_anchor_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    told = error_of(tmp_path / "chain", bytes_per_file=100_000)
    message = r"^chain/49K could not be written \(.*File too large.*\)\. The anchors above it are whole"
    assert re.search(message + WAY_OUT, told), told
    assert not (tmp_path / "chain" / "chain.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a disk of 900 kB can be made by root alone")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full(small_disk: Path) -> None:
    folder = small_disk / "chain"
    assert forked(build_and_die, folder) == 1
    names = [anchor.name for anchor in Chain.from_pretrained(folder).anchors]
    before = {name: fingerprints(folder / name) for name in names}
    assert names[0] == "49K" and len(names) < 3
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert forked(build_and_die, folder) == 0
    assert len(Chain.from_pretrained(folder).anchors) == 3
    assert {name: fingerprints(folder / name) for name in names} == before


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"file/chain could not be written \(.*Not a directory.*Nothing was changed" + WAY_OUT
    ):
        build(tmp_path / "file" / "chain")


def test_a_read_only_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    """Root may write anywhere, so another user builds."""
    tmp_path.chmod(0o755)
    (tmp_path / "chain").mkdir(mode=0o555)
    told = error_of(tmp_path / "chain", **({"bytes_per_file": 10**9, "user": NOBODY} if os.geteuid() == 0 else {}))
    assert re.search(r"^chain could not be written \(.*Permission denied.*\)\. Nothing was changed" + WAY_OUT, told), (
        told
    )
    assert not list((tmp_path / "chain").iterdir())


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"), writing(tmp_path, "All is well."):
        raise RuntimeError("out of memory")
    check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())
