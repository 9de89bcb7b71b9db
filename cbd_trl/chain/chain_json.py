"""chain.json: read, checked, and written in one step."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cbd_trl.chain.manifest import MANIFEST, RESTORE, Anchor, Manifest, weight_files
from cbd_trl.chain.pins import check_pin
from cbd_trl.chain.stored_weights import DTYPES
from cbd_trl.utils.untrusted import check_fields, check_inside, read_json, shown

SCHEMA_VERSION = 4
# A name starts with a letter, digit or underscore: no hidden folders, no "..". It does not end with a dot, which
# Windows leaves out. No file system takes longer ones.
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
# What a folder of a model holds that no reader runs: no pickle (.bin, .pt, .pkl), no code (.py, .so).
_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model", ".md", ".png", ".svg")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Far above any model. What a shape says is enumerated before the tensors that prove it are there.
_LARGEST_SIZE = 2**20
_LARGEST_COUNT = 2**63 - 1
_LARGEST_VOCABULARY = 2**31


def library_versions() -> dict[str, str]:
    versions = {}
    for name in ("cbd-trl", "torch", "transformers", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def manifest_text(manifest: Manifest) -> str:
    """The content of chain.json, its checksum worked out anew."""
    anchors = []
    for anchor in manifest.anchors:
        anchors.append({key: getattr(anchor, key) for key in _ANCHOR_KEYS})
        if anchor.repo is not None:
            anchors[-1]["repo"] = anchor.repo
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model_type": manifest.model_type,
        "versions": manifest.versions,
        "anchors": anchors,
    }
    # Through JSON and back, so that the checksum is that of what a reader gets (string keys, lists, "Infinity").
    body = json.loads(json.dumps(body, default=str), parse_constant=str)
    return json.dumps({**body, "checksum": _checksum(body)}, indent=2) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write chain.json in one step: a reader sees the old one or the new one, never a part."""
    text = manifest_text(manifest)
    temporary = folder / f".tmp-{MANIFEST}"
    # A link that lies there is not followed.
    temporary.unlink(missing_ok=True)
    with temporary.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check chain.json; the anchors' folders are not looked at (see `verify_anchor`).

    Raises:
        ValueError: missing, damaged, edited or of another schema version; the message names the file.
    """
    file = folder / MANIFEST
    check_inside(folder, file, RESTORE)
    try:
        body = read_json(file, RESTORE)
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not exist: {folder} is not a chain. Give the folder that build_chain wrote."
        ) from None
    if not isinstance(body, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(body).__name__}. {RESTORE}")
    if body.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema_version {shown(body.get('schema_version'))}; this version of cbd-trl reads "
            f"{SCHEMA_VERSION}, where a chain says how its blocks of text began. Install the "
            f"cbd-trl that wrote it (versions: {shown(body.get('versions'))}) or build the chain again."
        )
    check_fields(body, _MANIFEST_KEYS, str(file), RESTORE)
    anchors = []
    for i, entry in enumerate(body["anchors"]):
        pinned = _PINNED_KEYS if isinstance(entry, dict) and "repo" in entry else {}
        check_fields(entry, {**_ANCHOR_KEYS, **pinned}, f"{file}, anchors[{i}]", RESTORE)
        anchor = Anchor(**entry, path=folder / entry["name"])
        check_record(anchor, file)
        anchors.append(anchor)
    check_order(anchors, file)
    checksum = body.pop("checksum")
    if checksum != _checksum(body):
        raise ValueError(f"{file} was edited or damaged: its content does not give its own checksum. {RESTORE}")
    return Manifest(body["model_type"], body["versions"], tuple(anchors), checksum)


_MANIFEST_KEYS: dict[str, tuple[type, ...]] = {
    "schema_version": (int,),
    "model_type": (str,),
    "versions": (dict,),
    "anchors": (list,),
    "checksum": (str,),
}
_ANCHOR_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "parent": (str, type(None)),
    "shape": (dict,),
    "num_parameters": (int,),
    "dtype": (str,),
    "tokenizer": (str, type(None)),
    "block_map": (list, type(None)),
    "kept_layers": (list, type(None)),
    "block_costs": (list, type(None)),
    "block_start": (list,),
    "tokens_seen": (int,),
    "losses": (dict,),
    "training": (dict,),
    "finished": (bool,),
    "files": (dict,),
}
# Of an anchor in a repository of its own.
_PINNED_KEYS: dict[str, tuple[type, ...]] = {"repo": (dict,)}


def check_record(anchor: Anchor, file: Path) -> None:
    """Names that stay in the chain's folder, and the values inside a record's containers.

    Args:
        file: chain.json, for the message.

    Raises:
        ValueError: a bad name or value.
    """
    if not _NAME.fullmatch(anchor.name) or anchor.name.casefold() == MANIFEST:
        raise ValueError(
            f"{file}: {shown(anchor.name)} is no name for an anchor: letters, digits, '.', '_' and '-' only, no path. "
            f"{RESTORE}"
        )
    if anchor.repo is not None:
        check_pin(anchor.repo, f"{file}: anchor {anchor.name!r}")
    for name in anchor.files:
        if not all(_NAME.fullmatch(part) for part in name.split("/")):
            raise ValueError(
                f"{file}: anchor {anchor.name!r} lists the file {shown(name)}, which may lie outside its folder. "
                f"{RESTORE}"
            )
        if not name.endswith(_SUFFIXES):
            raise ValueError(
                f"{file}: anchor {anchor.name!r} lists the file {name!r}, which is none of {', '.join(_SUFFIXES)}: a "
                f"chain holds tensors and text, nothing that a program could run. {RESTORE}"
            )
    for key, is_fine in _fine_values(anchor):
        if not is_fine:
            raise ValueError(
                f"{file}: anchor {anchor.name!r} has a bad value in {key}: {shown(getattr(anchor, key))}. {RESTORE}"
            )
    if "config.json" not in anchor.files or not weight_files(anchor.files):
        raise ValueError(
            f"{file}: anchor {anchor.name!r} has no config.json or no model.safetensors among its files. {RESTORE}"
        )


def _fine_values(anchor: Anchor) -> Iterator[tuple[str, bool]]:
    """Each field, and whether the values in it are such as it may have."""
    blocks = anchor.block_map
    yield "files", all(isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in anchor.files.values())
    yield "tokenizer", anchor.tokenizer is None or bool(_SHA256.fullmatch(anchor.tokenizer))
    yield "shape", all(type(size) is int and 0 < size <= _LARGEST_SIZE for size in anchor.shape.values())
    yield "num_parameters", 0 <= anchor.num_parameters <= _LARGEST_COUNT
    yield "tokens_seen", 0 <= anchor.tokens_seen <= _LARGEST_COUNT
    yield "losses", all(map(_is_number, anchor.losses.values()))
    yield "block_map", all(isinstance(block, list) and all(type(i) is int for i in block) for block in blocks or [])
    yield "kept_layers", _fits(anchor.kept_layers, blocks, lambda kept, block: type(kept) is int and kept in block)
    yield (
        "block_costs",
        anchor.block_costs is None or _fits(anchor.block_costs, blocks, lambda cost, _: _is_number(cost)),
    )
    yield "block_start", all(type(token) is int and 0 <= token < _LARGEST_VOCABULARY for token in anchor.block_start)
    yield "dtype", anchor.dtype in DTYPES.values()
    yield "training", isinstance(anchor.training.get("bridge", {}), dict)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _fits(
    entries: list[Any] | None, block_map: list[list[int]] | None, fine: Callable[[Any, list[int]], bool]
) -> bool:
    """Whether there is one entry for each block, and a fine one; without blocks it is theirs that is wrong."""
    if block_map is None:
        return True
    return len(entries or []) == len(block_map) and all(map(fine, entries or [], block_map))


def check_order(anchors: Sequence[Anchor], file: Path) -> None:
    """A list of different names, each anchor smaller than the one above and cut from it."""
    names = [anchor.name for anchor in anchors]
    # Not every file system tells "Small" from "small".
    if not anchors or len({name.casefold() for name in names}) != len(names):
        raise ValueError(f"{file} must list at least one anchor and no name twice, got {names}. {RESTORE}")
    for above, anchor in zip([None, *anchors], anchors, strict=False):
        wanted = above.name if above else None
        if anchor.parent != wanted:
            raise ValueError(
                f"{file}: anchor {anchor.name!r} has parent {anchor.parent!r}, expected {wanted!r}, the anchor above. "
                f"{RESTORE}"
            )
        if above and anchor.num_parameters >= above.num_parameters:
            raise ValueError(
                f"{file}: anchors must be listed largest first, but {anchor.name!r} has {anchor.num_parameters:,} "
                "parameters and "
                f"{above.name!r} above it {above.num_parameters:,}. {RESTORE}"
            )
        if above and anchor.block_map is None:
            raise ValueError(f"{file}: anchor {anchor.name!r} has a parent but no block_map. {RESTORE}")
