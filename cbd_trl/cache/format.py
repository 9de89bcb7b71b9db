"""cache.json: what a teacher cache holds and how it was made; read, checked, and written in one step."""

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbd_trl.utils.untrusted import check_fields, check_inside, read_json, shown

# Of the 65,536 codes the last stands for -inf, which no step of a finite length reaches.
_STEPS = 65534
_MINUS_INFINITY = 65535


def row_key(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """What a row is found by: 16 bytes of blake2b of its token ids as little-endian int32.

    Args:
        token_ids: of one row of the data set.

    Returns:
        16 bytes.
    """
    return hashlib.blake2b(token_bytes(token_ids), digest_size=16).digest()


def token_bytes(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """Token ids as little-endian int32, four bytes each."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def high_bits(vocabulary_rows: int) -> int:
    """Bits of a token id beyond the first 16: ceil(log2 V) - 16, and 0 for V <= 65,536."""
    return max(0, (vocabulary_rows - 1).bit_length() - 16)


def high_bytes(k: int, vocabulary_rows: int) -> int:
    """Bytes that the high bits of the k ids of a position take."""
    return (k * high_bits(vocabulary_rows) + 7) // 8


def pack_ids(ids_PK: np.ndarray, vocabulary_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Split token ids into their low 16 bits and the packed rest.

    Args:
        ids_PK: token ids below `vocabulary_rows`, (P, K).
        vocabulary_rows: V, which sets the width of the rest.

    Returns:
        low (P, K) uint16, and high (P, ceil(K h / 8)) uint8 for the h = `high_bits(V)` further bits of each id.
    """
    positions, k = ids_PK.shape
    width = high_bits(vocabulary_rows)
    high_PK = ids_PK.astype(np.uint32) >> 16
    bits_PKh = (high_PK[..., None] >> np.arange(width, dtype=np.uint32)) & 1
    packed = np.packbits(bits_PKh.reshape(positions, k * width).astype(np.uint8), axis=1)
    return ids_PK.astype(np.uint16), packed


def unpack_ids(low_PK: np.ndarray, high: np.ndarray, vocabulary_rows: int) -> np.ndarray:
    """The inverse of `pack_ids`.

    Args:
        low_PK: (P, K) uint16.
        high: (P, ceil(K h / 8)) uint8.
        vocabulary_rows: V.

    Returns:
        token ids, (P, K) int32.
    """
    width = high_bits(vocabulary_rows)
    ids_PK = low_PK.astype(np.int32)
    if width == 0:
        return ids_PK
    positions, k = low_PK.shape
    bits_PKh = np.unpackbits(high, axis=1, count=k * width).reshape(positions, k, width)
    return ids_PK | (bits_PKh.astype(np.int32) << np.arange(16, 16 + width, dtype=np.int32)).sum(-1, dtype=np.int32)


def quantise(log_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities as steps of a 65,534th of their lowest: off by half a step at most, and 0 stays 0.

    Args:
        log_PK: (P, K) float32, nats, at most 0; -inf keeps a code of its own.

    Returns:
        codes (P, K) uint16, and the lowest finite value of each position (P,) float32.
    """
    finite_PK = np.isfinite(log_PK)
    lowest_P = np.where(finite_PK, log_PK, 0.0).min(axis=1, initial=0.0).astype(np.float32)
    scale_P1 = np.where(lowest_P < 0, lowest_P, -1.0).astype(np.float64)[:, None]
    codes_PK = np.rint(np.where(finite_PK, log_PK, 0.0) / scale_P1 * _STEPS)
    return np.where(finite_PK, codes_PK, _MINUS_INFINITY).astype(np.uint16), lowest_P


def dequantise(codes_PK: np.ndarray, lowest_P: np.ndarray) -> np.ndarray:
    """The inverse of `quantise`.

    Args:
        codes_PK: (P, K) uint16.
        lowest_P: (P,) float32.

    Returns:
        (P, K) float32, nats.
    """
    log_PK = codes_PK.astype(np.float32) * (lowest_P / np.float32(_STEPS))[:, None]
    log_PK[codes_PK == _MINUS_INFINITY] = -np.inf
    return log_PK


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


KINDS = ("top_k", "sampled", "hidden")
HIDDEN_DTYPES = ("float32", "bfloat16", "float16")
AGAIN = "Write the cache again into a new folder."
_NONE = type(None)
_SHARD_NAME = re.compile(r"rows-[0-9]{5,9}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Ids are kept as int32; far above any model, and any row.
_LARGEST_ID = 2**31 - 1
_LARGEST_SIZE = 2**20
_LARGEST_COUNT = 2**63 - 1

_SETTINGS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "vocabulary_rows": (int,),
    "teacher": (str, _NONE),
    "teacher_fingerprint": (str,),
    "tokenizer_fingerprint": (str, _NONE),
    "k": (int, _NONE),
    "temperature": (float, _NONE),
    "value_bits": (int, _NONE),
    "seed": (int, _NONE),
    "width": (int, _NONE),
    "dtype": (str, _NONE),
    "scale": (float,),
    "softcap": (float, _NONE),
}
_SHARD: dict[str, tuple[type, ...]] = {
    "file": (str,),
    "rows": (int,),
    "tokens": (int,),
    "size": (int,),
    "sha256": (str,),
}
_MANIFEST: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "settings": (dict,),
    "shards": (list,),
    "highest_id": (int,),
    "rows_wanted": (int, _NONE),
    "complete": (bool,),
    "head_sha256": (str, _NONE),
}


def check_manifest(body: Mapping[str, Any], file: Path) -> None:
    """Refuse a cache.json of this format version with a field, a type or a value that none of ours has.

    Args:
        body: what it holds.
        file: for the message.

    Raises:
        ValueError: naming the field.
    """
    changed = f"{file} was changed or damaged"
    check_fields(body, _MANIFEST, changed, AGAIN)
    check_fields(body["settings"], _SETTINGS, f"{changed}, settings", AGAIN)
    for i, shard in enumerate(body["shards"]):
        check_fields(shard, _SHARD, f"{changed}, shards[{i}]", AGAIN)
        if not _SHARD_NAME.fullmatch(shard["file"]):
            raise ValueError(
                f"{changed}: {shown(shard['file'])} is no name of a shard (rows-00000.safetensors): a shard lies "
                f"outside the folder. {AGAIN}"
            )
    names = [shard["file"] for shard in body["shards"]]
    if len(set(names)) < len(names):
        raise ValueError(f"{changed}: a shard is listed twice. {AGAIN}")
    for key, value, is_fine in _values(body):
        if not is_fine:
            raise ValueError(f"{changed}: it has a bad value in {key}: {shown(value)}. {AGAIN}")


def _values(body: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Each field, its value, and whether it may have it."""
    settings = body["settings"]
    rows, kind = settings["vocabulary_rows"], settings["kind"]
    yield "vocabulary_rows", rows, 0 < rows <= _LARGEST_ID
    yield "highest_id", body["highest_id"], -1 <= body["highest_id"] < rows
    yield "rows_wanted", body["rows_wanted"], _within(body["rows_wanted"] or 0, 0, _LARGEST_COUNT)
    yield (
        "head_sha256",
        body["head_sha256"],
        body["head_sha256"] is None or bool(_SHA256.fullmatch(body["head_sha256"])),
    )
    yield "softcap", settings["softcap"], settings["softcap"] is None or settings["softcap"] > 0
    if kind == "hidden":
        yield "width", settings["width"], _within(settings["width"], 1, _LARGEST_SIZE)
        yield "dtype", settings["dtype"], settings["dtype"] in HIDDEN_DTYPES
    elif kind in KINDS:
        yield "k", settings["k"], _within(settings["k"], 1, _LARGEST_SIZE)
        yield (
            "temperature",
            settings["temperature"],
            settings["temperature"] is not None and settings["temperature"] > 0,
        )
        yield "value_bits", settings["value_bits"], settings["value_bits"] in (16, 32)
    for i, shard in enumerate(body["shards"]):
        yield f"shards[{i}].rows", shard["rows"], _within(shard["rows"], 0, shard["tokens"])
        yield f"shards[{i}].tokens", shard["tokens"], _within(shard["tokens"], 0, _LARGEST_COUNT)
        yield f"shards[{i}].size", shard["size"], _within(shard["size"], 0, _LARGEST_COUNT)
        yield f"shards[{i}].sha256", shard["sha256"], bool(_SHA256.fullmatch(shard["sha256"]))


def _within(value: Any, least: int, most: int) -> bool:
    return value is not None and least <= value <= most
