"""What went wrong between here and the Hub, in one sentence with a way out."""

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The first that fits: errors of the Hub's client are each other's subclasses.
_REASONS: list[tuple[type[Exception], str]] = [
    (
        LocalEntryNotFoundError,
        "The Hub cannot be reached, and offline only what was fetched before can be opened: check the connection and "
        "HF_HUB_OFFLINE.",
    ),
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set: unset it."),
    (RevisionNotFoundError, "The repository has no such branch, tag or commit: check the revision."),
    (
        RepositoryNotFoundError,
        "There is no such repository, or it is private and may not be seen without a token that allows it: check the "
        "path or id, log in (hf auth login) or give token=.",
    ),
    (
        EntryNotFoundError,
        "The repository does not hold it: it is no chain, or its upload was cut off before the end. Push it again.",
    ),
    (HFValidationError, "This is no id of a repository: wanted 'owner/name'."),
]
_STATUS_REASONS = {
    401: "The Hub does not accept the token: log in again (hf auth login) or give another token=.",
    403: "The token may not do that: give one that may write there (token=), or the id of a repository of your own.",
}


def hub_reason(error: BaseException | None) -> str | None:
    """Why the Hub's client failed; None where it is not known, or the connection broke.

    Args:
        error: what it raised.
    """
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _STATUS_REASONS.get(error.response.status_code)
    return None


def told(error: BaseException) -> str:
    """The reason and, in brackets, the client's own words."""
    reason = hub_reason(error)
    return f"{reason or ''} ({type(error).__name__}: {' '.join(str(error).split())})".strip()
