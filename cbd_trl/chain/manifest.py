"""What is known of an anchor and of a chain, and loading an anchor's files."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import Architecture, describe
from cbd_trl.architectures.axes import axis_length
from cbd_trl.chain.model import DTYPES, StoredWeights, stock_model
from cbd_trl.surgery.statistics_file import StoredStatistics
from cbd_trl.surgery.weights import Weights, to_weights
from cbd_trl.utils.model_folders import check_no_code, load_config, load_generation_config, load_tokenizer
from cbd_trl.utils.tokenizers import stored_tokenizer_hash
from cbd_trl.utils.untrusted import check_fields, check_inside, read_json, reading, shown

MANIFEST = "chain.json"
STATISTICS_FILE = "statistics.safetensors"
RESTORE = "Download or copy the chain again, or rebuild it with build_chain."


@dataclass(frozen=True)
class Anchor:
    """One model of a chain, as chain.json records it.

    Args:
        name: name of its folder in the chain.
        parent: name of the anchor it was cut and distilled from, None for the source.
        shape: config fields of the family with their values.
        num_parameters: a tied table counted once.
        dtype: dtype of the weights, such as "float32".
        tokenizer: hash of the tokenizer stored with it (see `chain.tokenizer_hash`), None where there is none.
        block_map: for each layer the layers of the parent it stands for, None for the source.
        kept_layers: for each layer the one of them that it was cut from, None for the source.
        block_costs: for each layer what letting it stand for its block cost before training, nats per token (`Block`);
            None where that was not measured.
        block_start: token ids in front of each block of text that its layers were chosen, its weights refitted and its
            statistics collected on; empty where the tokenizer begins a text with nothing.
        tokens_seen: tokens it was distilled on.
        losses: name -> value in nats per token, at the end of its training.
        training: the training arguments that matter.
        finished: whether its training reached the end.
        files: file name -> sha256 of every file of the folder.
        repo: `repo_id` and `revision` (a full commit) of the Hub repository that holds the files, None where the
            chain's own folder does (see `chain.pins`).
        path: the folder.
        prepare: brings files of the folder that are not here yet; None where all are (see `chain.hub`).
    """

    name: str
    parent: str | None = None
    shape: dict[str, int] = field(default_factory=dict)
    num_parameters: int = 0
    dtype: str = "float32"
    tokenizer: str | None = None
    block_map: list[list[int]] | None = None
    kept_layers: list[int] | None = None
    block_costs: list[float] | None = None
    block_start: list[int] = field(default_factory=list)
    tokens_seen: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    finished: bool = True
    files: dict[str, str] = field(default_factory=dict, repr=False)
    repo: dict[str, str] | None = None
    path: Path = field(default=Path(), repr=False)
    prepare: "Callable[[Anchor, Sequence[str]], None] | None" = field(default=None, repr=False, compare=False)

    def need(self, *names: str) -> None:
        """Have these files in its folder: whatever reads one calls this first.

        Raises:
            ValueError: a file of a chain on the Hub cannot be fetched or is not what chain.json says.
        """
        if self.prepare is not None:
            self.prepare(self, [name for name in names if name in self.files])

    @property
    def small_files(self) -> list[str]:
        """All but the tensors: config, tokenizer, chat template, generation config."""
        return [name for name in self.files if not name.endswith(".safetensors")]

    def config(self) -> PretrainedConfig:
        """The model's config, read once; not to be changed.

        Raises:
            ValueError: config.json cannot be read.
        """
        return self._config

    def architecture(self) -> Architecture:
        """What the model's tensors mean."""
        return self._architecture

    @cached_property
    def _architecture(self) -> Architecture:
        with reading(self.path / "config.json", "a model that a chain may hold", RESTORE):
            return describe(self._config)

    @cached_property
    def _config(self) -> PretrainedConfig:
        self.need("config.json")
        return load_config(self.path, RESTORE)

    @property
    def statistics_file(self) -> Path:
        """The moments of its calibration text.

        Raises:
            ValueError: none were stored.
        """
        if STATISTICS_FILE not in self.files:
            raise ValueError(
                f"{self.path / STATISTICS_FILE} was not stored with the anchor, and cutting its width needs it. "
                f"{RESTORE}"
            )
        self.need(STATISTICS_FILE)
        return self.path / STATISTICS_FILE

    def load_statistics(self) -> StoredStatistics:
        """The same, checked against the model's shape and read when asked for.

        Raises:
            ValueError: none were stored, or of another model.
        """
        architecture = self.architecture()
        stored = StoredStatistics(self.statistics_file)
        sizes = {site.name: axis_length(site.axis, architecture.sizes) for site in architecture.sites}
        norms = {norm.name: axis_length(norm.axis, architecture.sizes) for norm in architecture.cut_output_norms}
        stored.check(sizes, norms)
        return stored

    def load_state_dict(self) -> StoredWeights:
        """The tensors as they are stored, under the model's own keys, each read when it is asked for; a tied head is
        left out.

        Raises:
            ValueError: the files do not hold the tensors that the config says the model has.
        """
        self.need(*weight_files(self.files))
        architecture = self.architecture()
        files = [self.path / name for name in weight_files(self.files)]
        try:
            return StoredWeights(files, architecture.state_shapes, architecture.family.file_names)
        except ValueError as error:
            raise ValueError(f"{error} {RESTORE}") from error

    def load_weights(self) -> Weights:
        """The tensors as surgery sees them (see `surgery.weights`), in the stored dtype or a more precise one, each
        read when it is asked for.

        Raises:
            ValueError: as `load_state_dict`.
        """
        return to_weights(self.load_state_dict(), self.architecture())

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model in eval mode.

        Args:
            dtype: None for the stored one.
        """
        dtype = dtype or getattr(torch, self.dtype)
        model = stock_model(self.architecture().config, self.load_state_dict(), dtype, name_or_path=str(self.path))
        model.generation_config = self.load_generation_config()
        return model

    def load_generation_config(self) -> GenerationConfig:
        """The stored generation config, or what the model config says where none was stored."""
        if "generation_config.json" in self.files:
            self.need("generation_config.json")
            return load_generation_config(self.path, RESTORE)
        return GenerationConfig.from_model_config(self.config())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer stored with it.

        Raises:
            ValueError: none was stored, or it is not the one that chain.json records.
        """
        if "tokenizer_config.json" not in self.files:
            raise ValueError(
                f"{self.path} holds no tokenizer_config.json: the chain was stored without a tokenizer. Build it with "
                "processing_class=tokenizer."
            )
        self.need(*self.small_files)
        self.check_tokenizer()
        return load_tokenizer(self.path, RESTORE)

    def check_no_code(self) -> None:
        """Refuse files that name code (ValueError naming file and field); those that are not here yet pass."""
        check_no_code(self.path, RESTORE)

    def check_tokenizer(self) -> None:
        """Compare the tokenizer's files with the hash of what they mean.

        Raises:
            ValueError: they cannot be read, or mean another tokenizer.
        """
        if stored_tokenizer_hash(self.path, RESTORE) != self.tokenizer:
            raise ValueError(
                f"{self.path} holds another tokenizer than the one whose hash is under `tokenizer` of the anchor "
                f"{self.name!r} in {MANIFEST}. {RESTORE}"
            )


@dataclass(frozen=True)
class Manifest:
    """The whole of chain.json.

    Args:
        model_type: the family's `config.model_type`.
        versions: library -> version that wrote it.
        anchors: largest first.
        checksum: of chain.json, and so of every file of the chain; empty before it is written.
    """

    model_type: str
    versions: dict[str, str]
    anchors: tuple[Anchor, ...]
    checksum: str = ""


def weight_files(files: Mapping[str, str]) -> list[str]:
    """The weight files among an anchor's files, one or several shards."""
    return sorted(name for name in files if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name))


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


# A letter, a digit or an underscore first: neither part is "..", nor anything else that leads elsewhere.
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"


def check_pin(repo: Mapping[str, Any], where: str) -> None:
    """Refuse what is no repository at one commit. A branch or a tag would not do: what it means can change.

    Args:
        repo: `repo_id`, "owner/name", and `revision`, the 40 hexadecimal digits of a commit.
        where: what says so, for the message.

    Raises:
        ValueError: other keys, no whole id, or a revision that can move.
    """
    if repo.keys() != {"repo_id", "revision"} or not _is_whole_id(repo["repo_id"]) or not _is_commit(repo["revision"]):
        raise ValueError(
            f"{where} is said to lie in {dict(repo)!r}: wanted repo_id, the 'owner/name' of a repository, and "
            "revision, the 40 hexadecimal digits of a commit (a branch or tag can move). Push the chain again with "
            "own_repos=True, which writes both."
        )


def _is_whole_id(repo_id: Any) -> bool:
    if not isinstance(repo_id, str) or not re.fullmatch(rf"{_PART}/{_PART}", repo_id):
        return False
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    return True


def _is_commit(revision: Any) -> bool:
    return isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
