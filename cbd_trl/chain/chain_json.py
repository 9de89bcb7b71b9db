"""chain.json: read, checked, and written in one step."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cbd_trl.chain.pins import check_pin
from cbd_trl.chain.records import MANIFEST, RESTORE, Anchor, Manifest, weight_files
from cbd_trl.chain.stored_weights import DTYPES

SCHEMA_VERSION = 3
# A name starts with a letter, digit or underscore: no hidden folders, no "..".
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


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
    # Through JSON and back, so that the checksum is that of what a reader gets (string keys, lists).
    body = json.loads(json.dumps(body, default=str))
    return json.dumps({**body, "checksum": _checksum(body)}, indent=2) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write chain.json in one step: a reader sees the old one or the new one, never a part."""
    text = manifest_text(manifest)
    temporary = folder / f".tmp-{MANIFEST}"
    with temporary.open("w", encoding="utf-8") as file:
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
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not exist: {folder} is not a chain. Give the folder that build_chain wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {RESTORE}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(body).__name__}. {RESTORE}")
    if body.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema_version {body.get('schema_version')!r}; this version of cbd-trl reads "
            f"{SCHEMA_VERSION}. Install the "
            f"cbd-trl that wrote it (versions: {body.get('versions')}) or build the chain again."
        )
    _check_types(body, _MANIFEST_KEYS, str(file))
    anchors = []
    for i, entry in enumerate(body["anchors"]):
        pinned = _PINNED_KEYS if isinstance(entry, dict) and "repo" in entry else {}
        _check_types(entry, {**_ANCHOR_KEYS, **pinned}, f"{file}, anchors[{i}]")
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
    "tokens_seen": (int,),
    "losses": (dict,),
    "training": (dict,),
    "finished": (bool,),
    "files": (dict,),
}
# Of an anchor in a repository of its own.
_PINNED_KEYS: dict[str, tuple[type, ...]] = {"repo": (dict,)}


def _check_types(entry: Any, keys: Mapping[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {type(entry).__name__}. {RESTORE}")
    missing, unknown = sorted(keys.keys() - entry.keys()), sorted(entry.keys() - keys.keys())
    if missing or unknown:
        raise ValueError(f"{where}: missing keys {missing}, unknown keys {unknown}. {RESTORE}")
    for key, types in keys.items():
        value = entry[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"{where}: {key} must be of type {wanted}, got {value!r}. {RESTORE}")


def check_record(anchor: Anchor, file: Path) -> None:
    """Names that stay in the chain's folder, and the values inside a record's containers.

    Args:
        file: chain.json, for the message.

    Raises:
        ValueError: a bad name or value.
    """
    if not _NAME.fullmatch(anchor.name):
        raise ValueError(
            f"{file}: {anchor.name!r} is no name for an anchor: letters, digits, '.', '_' and '-' only, no path. "
            f"{RESTORE}"
        )
    if anchor.repo is not None:
        check_pin(anchor.repo, f"{file}: anchor {anchor.name!r}")
    for name in anchor.files:
        if not all(_NAME.fullmatch(part) for part in name.split("/")):
            raise ValueError(
                f"{file}: anchor {anchor.name!r} lists the file {name!r}, which may lie outside its folder. {RESTORE}"
            )
    fine = {
        "files": all(isinstance(digest, str) for digest in anchor.files.values()),
        "shape": all(type(value) is int for value in anchor.shape.values()),
        "losses": all(type(value) in (int, float) for value in anchor.losses.values()),
        "block_map": all(
            isinstance(block, list) and all(type(i) is int for i in block) for block in anchor.block_map or []
        ),
        "kept_layers": _fits(
            anchor.kept_layers, anchor.block_map, lambda kept, block: isinstance(block, list) and kept in block
        ),
        "block_costs": anchor.block_costs is None
        or _fits(anchor.block_costs, anchor.block_map, lambda cost, _: type(cost) in (int, float)),
        "dtype": anchor.dtype in DTYPES.values(),
    }
    for key, is_fine in fine.items():
        if not is_fine:
            raise ValueError(
                f"{file}: anchor {anchor.name!r} has a bad value in {key}: {getattr(anchor, key)!r}. {RESTORE}"
            )
    if "config.json" not in anchor.files or not weight_files(anchor.files):
        raise ValueError(
            f"{file}: anchor {anchor.name!r} has no config.json or no model.safetensors among its files. {RESTORE}"
        )


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
    if not anchors or len(set(names)) != len(names):
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
