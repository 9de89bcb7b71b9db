"""An anchor in a Hub repository of its own: chain.json names the repository and one commit of it."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

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
