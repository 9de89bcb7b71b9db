"""A chain on the Hub: chain.json first, then, at that same commit, the files that are really used; anchors in
repositories of their own at the commits that chain.json pins."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.folders import verify_config, verify_files
from cbd_trl.chain.manifest import MANIFEST, Manifest


class HubFolder:
    """The files of a Hub repository at one commit, fetched into the Hub's cache when they are used.

    Args:
        repo_id: the repository.
        commit: the whole of its 40 digits.
        token: Hub token.
    """

    def __init__(self, repo_id: str, commit: str, token: str | bool | None = None) -> None:
        self.repo_id, self.commit, self._token = repo_id, commit, token
        # Where the cache keeps this commit.
        name = repo_folder_name(repo_id=repo_id, repo_type="model")
        self.path = Path(constants.HF_HUB_CACHE) / name / "snapshots" / commit

    def fetch(self, files: Sequence[str]) -> None:
        """Fetch the files that are not in the cache.

        Raises:
            ValueError: one is not in the cache and cannot be fetched.
        """
        missing = [file for file in files if not (self.path / file).exists()]
        if not missing:
            return
        try:
            # Names of files in a chain hold no wildcards, so each pattern is one file.
            snapshot_download(self.repo_id, revision=self.commit, token=self._token, allow_patterns=missing)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.repo_id!r} at commit {self.commit}: {', '.join(missing)} could not be fetched from the Hub "
                f"and {'is' if len(missing) == 1 else 'are'} not in its cache here. {explained(error)} "
                "Open it once with a connection (and without HF_HUB_OFFLINE); after that it works offline."
            ) from error


def open_on_hub(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> HubFolder:
    """Open a chain's repository and fetch its chain.json.

    Args:
        repo_id: the repository.
        revision: branch, tag or commit; None for the main branch. It is resolved once, to the commit of chain.json.
        token: Hub token.

    Raises:
        ValueError: there is no such chain, or it is not in the cache and the Hub cannot be reached.
    """
    try:
        manifest = Path(hf_hub_download(repo_id, MANIFEST, revision=revision, token=token))
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" (revision {revision!r})"
        raise ValueError(
            f"{repo_id!r}{at} is not a folder here, and its {MANIFEST} could not be fetched from the Hub. "
            f"{explained(error)}"
        ) from error
    # The cache keeps every commit in a folder named after it.
    return HubFolder(repo_id, manifest.parent.name, token)


def place_anchors(
    manifest: Manifest, folder: Path, hub: HubFolder | None, token: str | bool | None = None, verify: bool = True
) -> list[Anchor]:
    """Give each anchor of a manifest its folder; what is not here is fetched, and checked, when it is used.

    Args:
        manifest: read from chain.json.
        folder: where chain.json lies.
        hub: the repository it came from; None for a folder of this machine.
        token: Hub token.
        verify: compare the sha256 of what is used with chain.json.
    """
    anchors = []
    for record in manifest.anchors:
        if record.repo is not None:
            own = HubFolder(record.repo.repo_id, record.repo.revision, token)
            anchors.append(Anchor.of(record, own.path, _Fetch(own, "", folder, manifest.model_type, verify)))
        elif hub is not None:
            fetch = _Fetch(hub, f"{record.name}/", folder, manifest.model_type, verify)
            anchors.append(Anchor.of(record, folder / record.name, fetch))
        else:
            anchors.append(Anchor.of(record, folder / record.name))
    return anchors


class _Fetch:
    """Fetches and checks the files of one anchor, each once.

    Args:
        hub: the repository they are in.
        prefix: what their names begin with there.
        chain: the folder of chain.json.
        model_type: of all anchors, by chain.json.
        verify: whether their sha256 are compared.
    """

    def __init__(self, hub: HubFolder, prefix: str, chain: Path, model_type: str, verify: bool) -> None:
        self._hub, self._prefix, self._chain = hub, prefix, chain
        self._model_type, self._verify = model_type, verify
        self._ready: set[str] = set()

    def __call__(self, anchor: Anchor, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._ready]
        if not new:
            return
        self._hub.fetch([f"{self._prefix}{name}" for name in new])
        verify_files(self._chain, anchor, new, hashes=self._verify)
        # Before the config is read, which needs its file again.
        self._ready.update(new)
        anchor.check_no_code()
        if "config.json" in new:
            verify_config(self._chain, anchor, self._model_type)


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
        "The repository does not hold it: it is not a chain, or its upload was cut off before the end. Push it again.",
    ),
    (HFValidationError, "This is not the id of a repository: it must be 'owner/name'."),
]
_STATUS_REASONS = {
    401: "The Hub does not accept the token: log in again (hf auth login) or give another token=.",
    403: "The token may not do that: give one that may write there (token=), or the id of a repository of your own.",
}


def hub_reason(error: BaseException | None) -> str | None:
    """Explain why the Hub's client failed; None where it is not known, or the connection broke.

    Args:
        error: what it raised.
    """
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _STATUS_REASONS.get(error.response.status_code)
    return None


def explained(error: BaseException) -> str:
    """Give the reason and, in brackets, the client's own words."""
    reason = hub_reason(error)
    return f"{reason or ''} ({type(error).__name__}: {' '.join(str(error).split())})".strip()
