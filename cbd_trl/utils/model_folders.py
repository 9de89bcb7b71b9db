"""What transformers reads of an anchor's folder besides tensors: looked at first, and never with code of its own."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from cbd_trl.utils.untrusted import read_json, reading, shown

logger = logging.get_logger(__name__)

# Fields that name code to be run: classes of the repository, or kernels of another one.
_CODE_FIELDS = frozenset(
    prefix + field
    for prefix in ("", "_")
    for field in ("auto_map", "attn_implementation", "experts_implementation", "custom_generate")
)
# Fields that name a file to be read instead of one of the folder: `tokenizer_file`, `fast_tokenizer_files`, ...
_FILE_FIELDS = ("_file", "_files")
_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
# transformers makes lists of as many entries as these fields hold, before a tensor proves that they are there.
_COUNTED = ("layer", "label")
_MOST_COUNTED = 10_000


def load_config(folder: Path, way_out: str) -> PretrainedConfig:
    """Load the config of a model of transformers' own.

    Raises:
        ValueError: it cannot be read, names code, or claims what no model has; the message names file and field.
    """
    file = folder / "config.json"
    for field, value in _fields(_read_without_code(file, way_out)):
        whole = type(value) is int
        if whole and (abs(value) >= 2**63 or (abs(value) > _MOST_COUNTED and any(name in field for name in _COUNTED))):
            raise ValueError(f"{file}: {field} is {shown(value)}, more than any model has. {way_out}")
    with reading(file, "a model config", way_out):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def check_no_code(folder: Path, way_out: str) -> None:
    """Check that the files of a model's folder name no code of its own, and no other files to be read.

    Raises:
        ValueError: naming file and field; or one cannot be read.
    """
    for name in _FILES:
        if (folder / name).is_file():
            _read_without_code(folder / name, way_out)


def drop_code(folder: Path) -> None:
    """Take out of a model's folder what names code or other files: its model is transformers' own, whatever the
    source was."""
    for file in (folder / name for name in _FILES if (folder / name).is_file()):
        found = read_object(file, "It was just written.")
        if named := {field for field in found if field in _CODE_FIELDS or field.endswith(_FILE_FIELDS)}:
            without = {field: value for field, value in found.items() if field not in named}
            file.write_text(json.dumps(without, indent=2) + "\n", encoding="utf-8")


def load_generation_config(folder: Path, way_out: str) -> GenerationConfig:
    """Load the stored generation config.

    Raises:
        ValueError: it cannot be read, or names code.
    """
    file = folder / "generation_config.json"
    _read_without_code(file, way_out)
    with reading(file, "a generation config", way_out):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def load_tokenizer(folder: Path, way_out: str) -> PreTrainedTokenizerBase:
    """Load the stored tokenizer; its chat template is not rendered.

    Raises:
        ValueError: it cannot be read, or names code.
    """
    check_no_code(folder, way_out)
    with reading(folder / "tokenizer_config.json", "a tokenizer", way_out):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def read_object(file: Path, way_out: str, limit: int | None = None) -> dict[str, Any]:
    """Read the object that a JSON file holds (see `read_json`).

    Raises:
        ValueError: there is none.
    """
    try:
        found = read_json(file, way_out) if limit is None else read_json(file, way_out, limit)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing. {way_out}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(found).__name__}. {way_out}")
    return found


def _read_without_code(file: Path, way_out: str) -> dict[str, Any]:
    found = read_object(file, way_out)
    for field, value in _fields(found):
        if field in _CODE_FIELDS and value is not None:
            raise ValueError(
                f"{file}: {field} names code ({shown(value)}). Nothing of a chain is run, its models are "
                f"transformers' own: take the field out. {way_out}"
            )
        if field.endswith(_FILE_FIELDS) and value is not None:
            raise ValueError(
                f"{file}: {field} names another file ({shown(value)}), which chain.json does not list and which may "
                f"lie anywhere: take the field out. {way_out}"
            )
    return found


def _fields(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every field, also those of configs inside."""
    for field, value in found.items():
        yield field, value
        for inside in value if isinstance(value, list) else [value]:
            if isinstance(inside, dict):
                yield from _fields(inside)


def name_remote_code(place: str, revision: str | None = None, token: str | bool | None = None) -> None:
    """Warn of the code that `trust_remote_code=True` will run: its classes, their repository, the commit. A model
    without code of its own gives no warning. Nothing is run here.

    Args:
        place: path or Hub id of a model.
        revision, token: of a Hub id.
    """
    found: dict[str, Any] = {}
    # What cannot be read cannot be loaded either, and loading raises.
    with suppress(OSError, ValueError):
        found, _ = PretrainedConfig.get_config_dict(place, revision=revision, token=token)
    # "owner/name--module.Class" is a class of another repository.
    classes = sorted(set(_texts(found.get("auto_map"))))
    if classes:
        commit = found.get("_commit_hash") or revision
        logger.warning(
            f"trust_remote_code=True: {', '.join(classes)} of {place} "
            f"({f'at {commit}' if commit else 'as it is now'}) will run on this machine with all your rights. Read it "
            "first, and pin the commit that you have read as the revision."
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _texts(inside)
