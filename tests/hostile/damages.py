"""Ways to tamper with a chain.

Afterwards it is sealed again with the checksum and the sha256 that fit, as somebody would who knows the format.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile.victim import LARGE, SMALL, plant, record, seal

COMMIT = "0123456789" * 4
OUTSIDE = "outside"


@dataclass(frozen=True)
class Case:
    """One hostile chain.

    Args:
        name: of the test.
        damage: done to a copy of a good chain, beside which the folder `OUTSIDE` lies.
        message: why it is refused, a pattern.
        without_hashes: refused too where the sha256 are not compared.
    """

    name: str
    damage: Callable[[Path], None]
    message: str
    without_hashes: bool = True


def raw(content: bytes) -> Callable[[Path], None]:
    """chain.json is this."""
    return lambda folder: (folder / "chain.json").write_bytes(content) and None


def replaced(old: str, new: str) -> Callable[[Path], None]:
    """Its text is changed in one place."""

    def damage(folder: Path) -> None:
        file = folder / "chain.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return damage


def body(**fields: Any) -> Callable[[Path], None]:
    """Its top has other values."""
    return lambda folder: seal(folder, lambda found: found.update(fields))


def anchor(**fields: Any) -> Callable[[Path], None]:
    """The record of the smaller anchor has other values."""
    return lambda folder: seal(folder, lambda found: found["anchors"][1].update(fields))


def blocks(*layers: list[int], costs: list[Any] | None = None) -> list[dict[str, Any]]:
    """Blocks of these layers, of which the last is kept."""
    return [
        {"layers": block, "kept": block[-1], "cost": cost}
        for block, cost in zip(layers, costs or [None] * len(layers), strict=True)
    ]


def lists(name: str, digest: Any = "0" * 64) -> Callable[[Path], None]:
    """A file is listed that is not there."""
    return lambda folder: seal(folder, lambda found: found["anchors"][1]["files"].update({name: digest}))


def planted(name: str, content: bytes = b"x") -> Callable[[Path], None]:
    """A file is there, and listed."""
    return lambda folder: plant(folder, name, content)


def unlisted(name: str, content: bytes = b"{}") -> Callable[[Path], None]:
    """A file is there, and not listed."""

    def damage(folder: Path) -> None:
        (folder / LARGE / name).parent.mkdir(exist_ok=True)
        (folder / LARGE / name).write_bytes(content)

    return damage


def fields(name: str, **values: Any) -> Callable[[Path], None]:
    """A JSON file of the larger anchor has other values."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / LARGE / name).read_text())
        plant(folder, name, json.dumps({**found, **values}).encode())

    return damage


def link(name: str, target: str, content_of: str | None = None) -> Callable[[Path], None]:
    """A file of the larger anchor is a link; listed with the sha256 of what it leads to, where that is a file."""

    def damage(folder: Path) -> None:
        file = folder / LARGE / name
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        file.symlink_to(target)
        if content_of is not None:
            record(folder, name, (folder.parent / content_of).read_bytes())

    return damage


def without_weights(folder: Path) -> None:
    """The smaller anchor lists none."""
    seal(folder, lambda found: found["anchors"][1]["files"].pop("model.safetensors"))


def link_of_folder(folder: Path) -> None:
    """A whole anchor lies elsewhere."""
    shutil.rmtree(folder / LARGE)
    (folder / LARGE).symlink_to(f"../{OUTSIDE}/{LARGE}")


def link_of_manifest(folder: Path) -> None:
    """chain.json lies elsewhere."""
    (folder / "chain.json").unlink()
    (folder / "chain.json").symlink_to(f"../{OUTSIDE}/chain.json")


def pipe(name: str) -> Callable[[Path], None]:
    """A file is a pipe, into which nobody writes."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def swapped(name: str) -> Callable[[Path], None]:
    """A file of one anchor lies in the other, the records left alone."""

    def damage(folder: Path) -> None:
        shutil.copyfile(folder / LARGE / name, folder / SMALL / name)

    return damage


def swapped_anchors(folder: Path) -> None:
    """The folders change places, and chain.json knows the new sha256."""
    (folder / LARGE).rename(folder / "middle")
    (folder / SMALL).rename(folder / LARGE)
    (folder / "middle").rename(folder / SMALL)

    def change(found: dict[str, Any]) -> None:
        one, other = found["anchors"]
        one["files"], other["files"] = other["files"], one["files"]

    seal(folder, change)


def other_weights(folder: Path) -> None:
    """Weights of other values, and the old sha256."""
    file = folder / SMALL / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def twice(folder: Path) -> None:
    """An anchor has the name of the other, but for capitals."""

    def change(found: dict[str, Any]) -> None:
        found["anchors"][1].update(name=LARGE.upper())

    seal(folder, change)


def pinned(**repo: Any) -> Callable[[Path], None]:
    """The smaller anchor is said to lie in this repository."""
    return anchor(repo=repo)


# JSON of a depth at which Python's own reader gives up.
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
