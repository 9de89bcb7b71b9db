"""Code that a model's repository brings along: run only where it was asked for, and named before it runs."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)


def name_remote_code(place: str, revision: str | None = None, token: str | bool | None = None) -> None:
    """Warn of the code that `trust_remote_code=True` will run: its classes, their repository, the commit. A model
    without code of its own gives no warning. Nothing is run here.

    Args:
        place: path or Hub id of a model.
        revision, token: of a Hub id.
    """
    found: dict[str, Any] = {}
    # What cannot be read cannot be loaded either, and loading says so.
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
