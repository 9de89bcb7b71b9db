"""cache.json as somebody else may have written it: fields, types and values, before anything is believed."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cbd_trl.utils.untrusted import check_fields, shown

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
