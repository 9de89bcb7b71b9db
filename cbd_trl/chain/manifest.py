"""chain.json: the format of a chain's manifest, read, validated and written without loading torch.

Described for people in `docs/reference/formats.md`. A chain of another schema version is refused, and every
later version of cbd-trl reads this one: see `tests/chain/stored`.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import AfterValidator, Field, model_validator

from cbd_trl.utils.files import write_text
from cbd_trl.utils.untrusted import Untrusted, check_inside, read_json, shown, validated

MANIFEST = "chain.json"
SCHEMA_VERSION = 5
STATISTICS_FILE = "statistics.safetensors"
# Dtypes of weights, as safetensors and as chain.json name them.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
RESTORE = "Download or copy the chain again, or rebuild it with build_chain."

# A name starts with a letter, digit or underscore: no hidden folders, no "..". It does not end with a dot, which
# Windows leaves out. No file system takes longer ones.
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
# What a folder of a model holds that no reader runs: no pickle (.bin, .pt, .pkl), no code (.py, .so).
_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model", ".md", ".png", ".svg")
# A letter, a digit or an underscore first: neither part is "..", nor anything else that leads elsewhere.
_REPO_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
# Far above any model. What a shape says is enumerated before the tensors that prove it are there.
_LARGEST_SIZE = 2**20
_LARGEST_COUNT = 2**63 - 1
_LARGEST_VOCABULARY = 2**31
_MOST_ENTRIES = 2**16


def _anchor_name(name: str) -> str:
    if not _NAME.fullmatch(name) or name.casefold() == MANIFEST:
        raise ValueError("must be letters, digits, '.', '_' and '-' only, and no path: it names the anchor's folder")
    return name


def _file_name(name: str) -> str:
    if not all(_NAME.fullmatch(part) for part in name.split("/")):
        raise ValueError("must be a path below the anchor's folder: this one may lie outside")
    if not name.endswith(_SUFFIXES):
        raise ValueError(
            f"must end with one of {', '.join(_SUFFIXES)}: a chain holds tensors and text, nothing that a program "
            "could run"
        )
    return name


def _repo_id(repo_id: str) -> str:
    try:
        if re.fullmatch(rf"{_REPO_PART}/{_REPO_PART}", repo_id):
            validate_repo_id(repo_id)
            return repo_id
    except HFValidationError:
        pass
    raise ValueError("must be the 'owner/name' of a Hub repository")


def _commit(revision: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            "must be a commit, 40 hexadecimal digits (a branch or tag can move): push the chain again with "
            "own_repos=True, which writes it"
        )
    return revision


_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
_Layer = Annotated[int, Field(ge=0, le=_LARGEST_SIZE)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class RepoPin(Untrusted):
    """The Hub repository that holds an anchor's files, at one commit."""

    repo_id: Annotated[str, AfterValidator(_repo_id)]
    revision: Annotated[str, AfterValidator(_commit)]


class BlockRecord(Untrusted):
    """The layers of the parent that one layer stands for.

    Attributes:
        layers: consecutive layers of the parent, from 0.
        kept: the one of them that the layer was cut from.
        cost: what letting it stand for the block cost before training, in nats per token; None if not measured.
    """

    layers: Annotated[list[_Layer], Field(max_length=_MOST_ENTRIES)]
    kept: _Layer
    cost: _Finite | None = None

    @model_validator(mode="after")
    def _kept_is_one_of_them(self) -> "BlockRecord":
        if self.kept not in self.layers:
            raise ValueError(f"kept must be one of the layers {shown(self.layers)}, got {self.kept}")
        return self


# Keys of `training`: whether existing models were matched, the model that became the anchor or taught it, in what is
# recorded of that one why its weights were not matched, and how much one that was counts in a target.
ALIGNED, PUBLIC_MODEL, OBSTACLE, ALPHA_POWER = "aligned", "public_model", "obstacle", "alpha_power"
# And what was measured to find the shape of one that was requested by its size.
SHAPE_SEARCH = "shape_search"
# What all anchors were trained for together once the chain was there, a record a run.
CONSOLIDATION = "consolidation"


class AnchorRecord(Untrusted):
    """One model of a chain, as chain.json records it.

    Attributes:
        name: of its folder in the chain.
        parent: name of the anchor above, which it was cut and distilled from; None for the source.
        repo: Hub repository that holds the files; None where the chain's own folder does.
        shape: config fields of the family that hold sizes, with their values.
        num_parameters: a tied table counted once.
        dtype: of the weights, such as "float32".
        tokenizer_sha256: of what the tokenizer does (`utils.tokenizers.tokenizer_hash`); None where none is stored.
        blocks: for each layer the layers of the parent that it stands for; None for the source.
        text_start: token ids in front of each block of calibration text; empty where the tokenizer begins a text with
            nothing.
        tokens_seen: tokens it was distilled on.
        losses: name -> value at the end of its training, in nats per token.
        training: what it was made from and how (docs/reference/formats.md); any JSON.
        finished: whether its training reached the end.
        files: file name -> sha256 of every file of the folder.
    """

    name: Annotated[str, AfterValidator(_anchor_name)]
    parent: str | None = None
    repo: RepoPin | None = None
    shape: Annotated[
        dict[str, Annotated[int, Field(gt=0, le=_LARGEST_SIZE)]],
        Field(max_length=_MOST_ENTRIES),
    ]
    num_parameters: _Count
    dtype: Literal["float32", "bfloat16", "float16"]
    tokenizer_sha256: _Sha256 | None
    blocks: Annotated[list[BlockRecord], Field(max_length=_MOST_ENTRIES)] | None = None
    text_start: Annotated[
        list[Annotated[int, Field(ge=0, lt=_LARGEST_VOCABULARY)]],
        Field(max_length=_MOST_ENTRIES),
    ] = []
    tokens_seen: _Count = 0
    losses: Annotated[dict[str, _Finite], Field(max_length=_MOST_ENTRIES)] = {}
    training: dict[str, Any] = {}
    finished: bool = True
    files: Annotated[
        dict[Annotated[str, AfterValidator(_file_name)], _Sha256], Field(max_length=_MOST_ENTRIES, repr=False)
    ]

    @property
    def apart(self) -> bool:
        """Whether it was not cut from its parent but trained apart, and matched with it."""
        public = self.training.get(PUBLIC_MODEL)
        return self.training.get(ALIGNED) is True or (isinstance(public, dict) and public.get(OBSTACLE) is None)

    @property
    def alpha_power(self) -> float | None:
        """Power of the way down from the parent that its weight in a target is; None for that of every anchor that was
        cut from its parent. Of one that was trained apart it is measured; where it was not, it counts in full."""
        power = self.training.get(ALPHA_POWER)
        return 0.0 if power is None and self.apart else power

    @model_validator(mode="after")
    def _is_whole(self) -> "AnchorRecord":
        if "config.json" not in self.files or not weight_files(self.files):
            raise ValueError("files must list config.json and model.safetensors, or shards of it")
        costs = [block.cost is None for block in self.blocks or []]
        if any(costs) and not all(costs):
            raise ValueError("blocks must have a cost each, or none")
        power = self.training.get(ALPHA_POWER, 0.0)
        if isinstance(power, bool) or not isinstance(power, int | float) or not 0 <= power < math.inf:
            raise ValueError(f"training.{ALPHA_POWER} must be a number of 0 or more, got {shown(power)}")
        runs = self.training.get(CONSOLIDATION, [])
        if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            raise ValueError(f"training.{CONSOLIDATION} must be a list of objects, got {shown(runs)}")
        for name in ("bridge", "arguments"):
            if not isinstance(record := self.training.get(name, {}), dict):
                raise ValueError(f"training.{name} must be an object, got {shown(record)}")
        if not isinstance(values := self.training.get("arguments", {}).get("values", {}), dict):
            raise ValueError(f"training.arguments.values must be an object, got {shown(values)}")
        return self

    @property
    def block_map(self) -> list[list[int]] | None:
        """The layers of each block."""
        return None if self.blocks is None else [list(block.layers) for block in self.blocks]

    @property
    def kept_layers(self) -> list[int] | None:
        """The kept layer of each block."""
        return None if self.blocks is None else [block.kept for block in self.blocks]

    @property
    def block_costs(self) -> list[float] | None:
        """The cost of each block, in nats per token; None where they were not measured."""
        costs = [block.cost for block in self.blocks or [] if block.cost is not None]
        return costs or None

    @property
    def arguments(self) -> dict[str, Any]:
        """The training arguments that decide the anchor, by name; empty where it was not trained here."""
        values: dict[str, Any] = self.training.get("arguments", {}).get("values", {})
        return values


class Manifest(Untrusted):
    """The whole of chain.json.

    Attributes:
        model_type: the family's `config.model_type`.
        versions: library -> version that wrote it.
        anchors: largest first.
        checksum: sha256 of all the rest, and so of every file of the chain; empty before it is written.
    """

    model_type: str
    versions: dict[str, str]
    anchors: list[AnchorRecord]
    checksum: str = ""


def weight_files(files: Mapping[str, str]) -> list[str]:
    """List the weight files among an anchor's files, one or several shards."""
    return sorted(name for name in files if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name))


def library_versions() -> dict[str, str]:
    """Look up the installed versions of the libraries that decide what a chain becomes."""
    versions = {}
    for name in ("cbd-trl", "torch", "transformers", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def read_manifest(folder: Path) -> Manifest:
    """Read and validate chain.json; the anchors' folders are not looked at (see `folders.verify_anchor`).

    Raises:
        ValueError: missing, damaged, edited or of another schema version; the message names file and field.
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
    found = body.get("schema_version")
    if type(found) is not int or found != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema_version {shown(found)}; this version of cbd-trl reads {SCHEMA_VERSION}, whose fields "
            f"have other names than before and stay as they are. Install the cbd-trl that wrote the chain (versions: "
            f"{shown(body.get('versions'))}) or build it again."
        )
    if "checksum" not in body:
        raise ValueError(f"{file}, checksum: the field is missing. {RESTORE}")
    content = {name: value for name, value in body.items() if name != "schema_version"}
    manifest = validated(Manifest, content, file, RESTORE)
    check_order(manifest.anchors, file)
    del body["checksum"]
    if manifest.checksum != _checksum(body):
        raise ValueError(f"{file} was edited or damaged: its content does not give its own checksum. {RESTORE}")
    return manifest


def manifest_text(manifest: Manifest) -> str:
    """Format chain.json, its checksum computed anew."""
    body = {"schema_version": SCHEMA_VERSION, **manifest.model_dump(exclude={"checksum"})}
    # Through JSON and back, so that the checksum is that of what a reader gets (string keys, lists, "Infinity").
    body = json.loads(json.dumps(body, default=str), parse_constant=str)
    return json.dumps({**body, "checksum": _checksum(body)}, indent=2) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write chain.json in one step: a reader sees the old one or the new one, never a part."""
    write_text(folder / MANIFEST, manifest_text(manifest))


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check_order(anchors: Sequence[AnchorRecord], file: Path) -> None:
    """Check that anchors have different names, and that each is smaller than the one above and cut from it.

    Raises:
        ValueError: naming chain.json and the anchor.
    """
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
                f"parameters and {above.name!r} above it {above.num_parameters:,}. {RESTORE}"
            )
        if above and anchor.blocks is None:
            raise ValueError(f"{file}: anchor {anchor.name!r} has a parent but no blocks. {RESTORE}")
