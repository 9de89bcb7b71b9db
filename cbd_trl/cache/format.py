"""cache.json: what a teacher cache holds and how it was made; read, checked, and written in one step."""

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbd_trl.cache.checks import AGAIN, HIDDEN_DTYPES, KINDS, check_manifest
from cbd_trl.utils.untrusted import check_inside, read_json, shown

__all__ = ["HIDDEN_DTYPES", "KINDS"]

MANIFEST = "cache.json"
HEAD_FILE = "head.safetensors"
FORMAT_VERSION = 1
# A line or two a shard, of which the largest caches have some hundred thousand.
_LARGEST_BYTES = 2**28


@dataclass(frozen=True)
class Settings:
    """How a cache was made. Every row of it was made like this.

    Attributes:
        kind: top_k, sampled or hidden.
        vocabulary_rows: rows V of the teacher's head.
        teacher: Hub id or folder name, for people; None for a model made in memory.
        teacher_fingerprint: of its config and a sample of its weights.
        tokenizer_fingerprint: of the vocabulary; None where no tokenizer was given.
        k: kept tokens or draws of a position; None for hidden states.
        temperature: the log-probabilities were taken at; None for hidden states, which serve any.
        value_bits: 16 for quantised log-probabilities, 32 for exact ones; None for hidden states.
        seed: of the draws; None where nothing is drawn.
        width: D of the hidden states, else None.
        dtype: of the hidden states, else None.
        scale, softcap: of the head of the hidden states.
    """

    kind: str
    vocabulary_rows: int
    teacher: str | None
    teacher_fingerprint: str
    tokenizer_fingerprint: str | None
    k: int | None = None
    temperature: float | None = None
    value_bits: int | None = None
    seed: int | None = None
    width: int | None = None
    dtype: str | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Shard:
    """One file of rows.

    Attributes:
        file: its name.
        rows, tokens: how many are in it.
        size: bytes.
        sha256: of the file.
    """

    file: str
    rows: int
    tokens: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of cache.json.

    Attributes:
        settings: of every row.
        shards: in the order they were written.
        highest_id: the highest token id that is kept, -1 for none.
        rows_wanted: rows the cache has once the last command is through; None where a stream does not tell.
        complete: whether it is through.
        head_sha256: of head.safetensors, else None.
    """

    settings: Settings
    shards: tuple[Shard, ...] = ()
    highest_id: int = -1
    rows_wanted: int | None = None
    complete: bool = False
    head_sha256: str | None = None

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)


def check_kind(kind: str) -> None:
    """Refuse a kind of cache that does not exist.

    Args:
        kind: to be one of `KINDS`.

    Raises:
        ValueError: with the ones there are.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kind={kind!r}: there is no such teacher cache.{hint} There are: {', '.join(KINDS)}.")


def read_manifest(folder: Path) -> Manifest:
    """Read and check cache.json; the shards are not looked at.

    Args:
        folder: of the cache.

    Returns:
        the manifest.

    Raises:
        ValueError: missing, unreadable, of another format version, or with a value that none of ours has.
    """
    file = folder / MANIFEST
    check_inside(folder, file, AGAIN)
    try:
        body = read_json(file, AGAIN, _LARGEST_BYTES)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no teacher cache: there is no {MANIFEST} in it. Give the --output_dir of `cbd-trl cache`."
        ) from None
    version = body.get("format_version") if isinstance(body, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {shown(version)}; this version of cbd-trl reads {FORMAT_VERSION}. Use the "
            "cbd-trl that wrote it, or write the cache again into a new folder."
        )
    check_manifest(body, file)
    values: dict[str, Any] = {**body}
    del values["format_version"]
    settings, shards = Settings(**values.pop("settings")), tuple(Shard(**shard) for shard in values.pop("shards"))
    check_kind(settings.kind)
    return Manifest(settings, shards, **values)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write cache.json in one step: a reader sees the old one or the new one, never a part.

    Args:
        folder: of the cache.
        manifest: what to write.
    """
    body = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    write_atomically(folder / MANIFEST, (json.dumps(body, indent=1) + "\n").encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it.

    Args:
        path: of the file.
        data: all of it.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    # A link that lies there is not followed.
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_settings(folder: Path, found: Settings, wanted: Settings) -> None:
    """Refuse to add rows to a cache that was made in another way.

    Args:
        folder: of the cache, for the message.
        found: of the cache.
        wanted: of the rows.

    Raises:
        ValueError: naming each setting that differs.
    """
    # The same weights may go by the name of their folder and by their Hub id.
    differing = [
        f"{field.name} is {old!r}, asked for {new!r}"
        for field in dataclasses.fields(Settings)
        if field.name != "teacher" and (old := getattr(found, field.name)) != (new := getattr(wanted, field.name))
    ]
    if differing:
        raise ValueError(
            f"{folder} already holds a cache that was made in another way: {'; '.join(differing)}. All rows of a "
            f"cache are made alike (this one by {found.teacher or 'a model made in memory'}). Use another "
            "--output_dir, or the settings it was made with."
        )
