"""Find out where a model comes from, as far as its card needs it: a Hub id, and the license that its card states."""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants, hf_hub_download, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from cbd_trl.utils.formatting import readable_name

_README = "README.md"
# A folder in the cache of the Hub's client, whose path names the repository and the commit.
_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]{40})(?=/|$)")
# A dataset from the Hub remembers its files by addresses like hf://datasets/org/name@commit/file.
_DATASET = re.compile(r"hf://datasets/([^@]+)@")
_LINK = re.compile(r"https?://[^\s<>`|\"']+")


@dataclass(frozen=True)
class Origin:
    """A model that others are made from.

    Args:
        name: for a reader, never a path; None for a model made in memory.
        base_models: itself where it is on the Hub; of a folder the models on the Hub that its card names as its base.
        revision: its commit on the Hub.
        license: the identifier that its card states, not necessarily one that the Hub knows.
        license_name: of a license that is called "other".
        license_link: its address; never a file beside the model, since nobody copies it.
    """

    name: str | None = None
    base_models: tuple[str, ...] = ()
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    @property
    def label(self) -> str:
        """Its name, or a description where it has none."""
        return self.name or "a model made in memory"

    def record(self) -> dict[str, Any]:
        """Return the fields as chain.json holds them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def origin_of(
    name: str | os.PathLike[str] | None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Origin:
    """Find the origin of a model that has been loaded; nothing is guessed, and no failure raises an error.

    Args:
        name: the folder or Hub id it was loaded from; `name_or_path` of a model in memory.
        revision, token: of a Hub id.
    """
    place = str(name or "")
    if os.path.isdir(place):
        folder = Path(place).resolve()
        if found := _SNAPSHOT.search(folder.as_posix()):
            return _on_hub(found[1].replace("--", "/"), found[2], token)
        stated = _stated(folder / _README)
        named = (base for base in _texts(stated.get("base_model")) if not os.path.exists(base))
        return Origin(readable_name(str(folder)), hub_ids(named), **_license(stated))
    if not is_hub_id(place):
        return Origin()
    commit = cached_commit(place, revision)
    # Without a copy in the cache it was not loaded from the Hub: "runs/model" may be a folder that moved.
    return Origin() if commit is None else _on_hub(place, commit, token)


def cached_commit(repo_id: str, revision: str | None) -> str | None:
    """Find the commit in the Hub's cache that a model, or its config, was loaded from; None where there is none.

    Args:
        repo_id: of the model.
        revision: branch, tag or commit; None for the main branch, or not known.
    """
    config = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if isinstance(config, str):
        return Path(config).parent.name
    # A model in memory does not remember its branch; where one commit is cached, that is it.
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots"
    cached = [file.parent.name for file in folder.glob("*/config.json")] if revision is None else []
    return cached[0] if len(cached) == 1 else None


def read_origins(records: Any) -> tuple[Origin, ...]:
    """Read origins from chain.json; values of a wrong type count as not known."""
    return tuple(_read(record) for record in records) if isinstance(records, list) else ()


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id, "name" or "owner/name"."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_ids(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that have the form of a Hub id, each once."""
    return tuple(dict.fromkeys(name for name in names if is_hub_id(name)))


def hub_datasets(dataset: Any) -> tuple[str, ...]:
    """Return the ids of the datasets on the Hub that a dataset was read from, as far as it remembers them."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    return hub_ids(found[1] for file in files if (found := _DATASET.match(str(file))))


def _on_hub(repo_id: str, commit: str, token: str | bool | None) -> Origin:
    card = None
    # Whatever the client and its HTTP library raise: days of training must not end for want of a card.
    with suppress(Exception):
        card = hf_hub_download(repo_id, _README, revision=commit, token=token)
    stated = _stated(card)
    link = next(iter(_texts(stated.get("license_link"))), "")
    if link and not _LINK.fullmatch(link):
        # A file of its repository, which others reach by its address.
        stated["license_link"] = f"https://huggingface.co/{repo_id}/blob/{commit}/{link.lstrip('./')}"
    return Origin(repo_id, (repo_id,), commit, **_license(stated))


def _stated(card: Path | str | None) -> dict[str, Any]:
    """The metadata of a card; empty where there is none that can be read."""
    # RecursionError too: nobody has looked at what is written there.
    with suppress(OSError, ValueError, RuntimeError, yaml.YAMLError):
        return (None if card is None else metadata_load(card)) or {}
    return {}


def _license(stated: Mapping[str, Any]) -> dict[str, str | None]:
    """The license fields of a card; several names, which may all hold or be a choice, are joined."""
    names = _texts(stated.get("license"))
    name, link = (next(iter(_texts(stated.get(key))), None) for key in ("license_name", "license_link"))
    return {"license": ", ".join(names).lower() or None, "license_name": name, "license_link": _address(link)}


def _address(link: str | None) -> str | None:
    return link if link is not None and _LINK.fullmatch(link) else None


def _texts(value: Any) -> list[str]:
    """The texts among a value or a list of them, each in one line."""
    values = value if isinstance(value, list) else [value]
    lines = (" ".join(value.split()) for value in values if isinstance(value, str))
    return [line for line in lines if line]


def _read(record: Any) -> Origin:
    known = record if isinstance(record, dict) else {}
    keys = ("name", "revision", "license", "license_name", "license_link")
    fields = {key: next(iter(_texts(known.get(key))), None) for key in keys}
    fields["license_link"] = _address(fields["license_link"])
    return Origin(base_models=hub_ids(_texts(known.get("base_models"))), **fields)
