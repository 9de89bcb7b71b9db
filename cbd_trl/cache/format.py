"""cache.json: the format of a teacher cache's manifest, read, validated and written.

Described for people in `docs/reference/formats.md`. A cache of another format version is refused, and every
later version of cbd-trl reads this one: see `tests/cache/stored`.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from cbd_trl.utils.files import write_text
from cbd_trl.utils.formatting import did_you_mean
from cbd_trl.utils.untrusted import Untrusted, check_inside, read_json, shown, validated

MANIFEST = "cache.json"
HEAD_FILE = "head.safetensors"
FORMAT_VERSION = 2
Kind = Literal["top_k", "sampled", "hidden"]
HiddenDtype = Literal["float32", "bfloat16", "float16"]
KINDS: tuple[str, ...] = get_args(Kind)
HIDDEN_DTYPES: tuple[str, ...] = get_args(HiddenDtype)
AGAIN = "Write the cache again into a new folder."

# A line or two a shard, of which the largest caches have some hundred thousand.
_LARGEST_BYTES = 2**28
# Ids are kept as int32; far above any model, and any row.
_LARGEST_ID = 2**31 - 1
_Size = Annotated[int, Field(ge=1, le=2**20)]
_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Fields that caches of a kind must have.
_FIELDS_OF = {
    "top_k": ("k", "temperature", "value_bits"),
    "sampled": ("k", "temperature", "value_bits"),
    "hidden": ("hidden_size", "hidden_dtype"),
}


def _shard_name(name: str) -> str:
    if not re.fullmatch(r"rows-[0-9]{5,9}\.safetensors", name):
        raise ValueError("must be the name of a shard (rows-00000.safetensors): a shard lies outside the folder")
    return name


class Settings(Untrusted):
    """How a cache was made. Every row of it was made like this.

    Attributes:
        kind: top_k, sampled or hidden.
        vocabulary_rows: rows V of the teacher's head.
        teacher: Hub id or folder name, for people; None for a model made in memory.
        teacher_fingerprint: sha256 of its config and a sample of its weights (`utils.tokenizers.teacher_fingerprint`),
            or "imported:NAME" where another engine predicted.
        tokenizer_sha256: of what the tokenizer does (`utils.tokenizers.tokenizer_hash`); None where none was given.
        k: kept tokens or draws of a position; None for hidden states.
        temperature: the log-probabilities were taken at; None for hidden states, which serve any.
        value_bits: 16 for quantized log-probabilities, 32 for exact ones; None for hidden states.
        seed: of the draws; None where nothing is drawn.
        hidden_size: D of the hidden states, else None.
        hidden_dtype: of the hidden states, else None.
        scale, softcap: of the head of the hidden states.
    """

    kind: Kind
    vocabulary_rows: Annotated[int, Field(ge=1, le=_LARGEST_ID)]
    teacher: str | None
    teacher_fingerprint: str
    tokenizer_sha256: _Sha256 | None
    k: _Size | None = None
    temperature: _Positive | None = None
    value_bits: Literal[16, 32] | None = None
    seed: int | None = None
    hidden_size: _Size | None = None
    hidden_dtype: HiddenDtype | None = None
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    softcap: _Positive | None = None

    @model_validator(mode="after")
    def _has_the_fields_of_its_kind(self) -> "Settings":
        if missing := [name for name in _FIELDS_OF[self.kind] if getattr(self, name) is None]:
            raise ValueError(f"{', '.join(missing)} must be given for a cache of kind {self.kind!r}")
        return self


class Shard(Untrusted):
    """One file of rows.

    Attributes:
        file: its name.
        rows, tokens: how many are in it.
        num_bytes: of the file.
        sha256: of the file.
    """

    file: Annotated[str, AfterValidator(_shard_name)]
    rows: _Count
    tokens: _Count
    num_bytes: _Count
    sha256: _Sha256

    @model_validator(mode="after")
    def _rows_have_tokens(self) -> "Shard":
        if self.rows > self.tokens:
            raise ValueError(f"rows must be at most tokens, got {self.rows} and {self.tokens}")
        return self


class Manifest(Untrusted):
    """All of cache.json.

    Attributes:
        settings: of every row.
        shards: in the order they were written.
        highest_token_id: the highest token id that is kept, -1 for none.
        expected_rows: rows the cache has once the last command is through; None where a stream does not tell.
        complete: whether it is through.
        head_sha256: of head.safetensors, else None.
    """

    settings: Settings
    shards: list[Shard] = []
    highest_token_id: Annotated[int, Field(ge=-1, le=_LARGEST_ID)] = -1
    expected_rows: _Count | None = None
    complete: bool = False
    head_sha256: _Sha256 | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        rows = self.settings.vocabulary_rows
        if self.highest_token_id >= rows:
            raise ValueError(f"highest_token_id must be below vocabulary_rows={rows}, got {self.highest_token_id}")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("shards must be different files: a shard is listed twice")
        return self

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)


def read_manifest(folder: Path) -> Manifest:
    """Read and validate cache.json; the shards are not looked at.

    Args:
        folder: of the cache.

    Returns:
        the manifest.

    Raises:
        ValueError: missing, unreadable, of another format version, or changed; the message names file and field.
    """
    file = folder / MANIFEST
    check_inside(folder, file, AGAIN)
    try:
        body = read_json(file, AGAIN, _LARGEST_BYTES)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is not a teacher cache: there is no {MANIFEST} in it. Give the --output_dir of `cbd-trl cache`."
        ) from None
    version = body.get("format_version") if isinstance(body, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {shown(version)}; this version of cbd-trl reads {FORMAT_VERSION}, whose "
            "fields have other names than before and stay as they are. Use the cbd-trl that wrote it, or write the "
            "cache again into a new folder."
        )
    del body["format_version"]
    return validated(Manifest, body, file, AGAIN)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write cache.json in one step: a reader sees the old one or the new one, never a part.

    Args:
        folder: of the cache.
        manifest: what to write.
    """
    body = {"format_version": FORMAT_VERSION, **manifest.model_dump()}
    write_text(folder / MANIFEST, json.dumps(body, indent=1) + "\n")


def check_kind(kind: str) -> None:
    """Check that a kind of cache exists.

    Args:
        kind: to be one of `KINDS`.

    Raises:
        ValueError: with the ones there are.
    """
    if kind not in KINDS:
        raise ValueError(
            f"kind={kind!r}: there is no such teacher cache.{did_you_mean(kind, KINDS)} There are: {', '.join(KINDS)}."
        )


def check_settings(folder: Path, found: Settings, requested: Settings) -> None:
    """Check that rows may be added to a cache: all of them are made in one way.

    Args:
        folder: of the cache, for the message.
        found: of the cache.
        requested: of the rows.

    Raises:
        ValueError: naming each setting that differs.
    """
    # The same weights may go by the name of their folder and by their Hub id.
    differing = [
        f"{name} is {old!r}, requested {new!r}"
        for name in Settings.model_fields
        if name != "teacher" and (old := getattr(found, name)) != (new := getattr(requested, name))
    ]
    if differing:
        raise ValueError(
            f"{folder} already holds a cache that was made in another way: {'; '.join(differing)}. All rows of a "
            f"cache are made in one way (this one by {found.teacher or 'a model made in memory'}). Use another "
            "--output_dir, or the settings it was made with."
        )
