"""A chain to the Hub: its weights file by file, then everything in one commit."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from cbd_trl.chain.chain_json import manifest_text
from cbd_trl.chain.hub_errors import hub_reason, told
from cbd_trl.chain.records import MANIFEST, Anchor, Manifest

# What save_pretrained of a model and a tokenizer writes, and statistics: nothing that runs when it is read.
_SUFFIXES = {".safetensors", ".json", ".txt", ".jinja", ".model", ".md"}
_WEIGHTS = ".safetensors"


@dataclasses.dataclass(frozen=True)
class Push:
    """How a chain is pushed.

    The Hub's client does the transfer: `create_commit` after `preupload_lfs_files`, weights one file at a time. Its
    `upload_folder` may commit in several steps, and chain.json with any of them; here chain.json comes in the one
    commit that everything else is in, so nobody ever opens a part. A file that arrived stays with the Hub before it
    is in a commit, under its hash, and is not sent again by the same push after an interruption.

    Args:
        private: whether a repository that is made is private; None for what the owner's default is.
        token: Hub token.
        revision: branch, made if there is none; None for the main branch.
        commit_message: of every commit.
        own_repos: whether each anchor goes to a repository of its own, which chain.json pins by commit.
    """

    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    commit_message: str = "Upload chain"
    own_repos: bool = False

    def chain(self, repo_id: str, manifest: Manifest, card: bytes | None) -> CommitInfo:
        """Push a chain.

        Args:
            repo_id: the repository, made if there is none.
            manifest: the chain.
            card: its README.md, None for none.

        Returns:
            The commit that holds chain.json.

        Raises:
            ValueError: a file that is no data, a bad id, a token that may not write there.
            ConnectionError: the upload was cut off.
        """
        for anchor in manifest.anchors:
            _check_files(anchor)
            anchor.need(*anchor.files)
        repo_id = self._make(repo_id)
        anchors, files = [], {}
        for anchor in manifest.anchors:
            content = {name: anchor.path / name for name in anchor.files}
            if self.own_repos:
                own = self._make(f"{repo_id}-{anchor.name}")
                repo = {"repo_id": own, "revision": self._send(own, content).oid}
            else:
                repo = None
                files.update({f"{anchor.name}/{name}": path for name, path in content.items()})
            anchors.append(dataclasses.replace(anchor, repo=repo))
        text = manifest_text(dataclasses.replace(manifest, anchors=tuple(anchors)))
        extra = {MANIFEST: text.encode()} | ({} if card is None else {"README.md": card})
        return self._send(repo_id, {**files, **extra})

    def _make(self, repo_id: str) -> str:
        """The repository's whole id, once it is there with the branch."""
        api = HfApi(token=self.token)
        try:
            repo_id = api.create_repo(repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision is not None:
                api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        # The client lets errors of its HTTP library through, which one depends on its version.
        except Exception as error:
            raise _explained(repo_id, error) from error
        return repo_id

    def _send(self, repo_id: str, content: Mapping[str, Path | bytes]) -> CommitInfo:
        api = HfApi(token=self.token)
        additions = [CommitOperationAdd(name, part) for name, part in content.items()]
        try:
            for addition in additions:
                if addition.path_in_repo.endswith(_WEIGHTS):
                    # By itself: several sent as one batch may count only when all of them are there.
                    api.preupload_lfs_files(repo_id, [addition], revision=self.revision, free_memory=False)
            return api.create_commit(repo_id, additions, commit_message=self.commit_message, revision=self.revision)
        except Exception as error:
            raise _explained(repo_id, error) from error


def _check_files(anchor: Anchor) -> None:
    odd = [name for name in anchor.files if PurePosixPath(name).suffix not in _SUFFIXES]
    if odd:
        raise ValueError(
            f"The anchor {anchor.name!r} has {', '.join(odd)}, which is not pushed: weights go as safetensors, and "
            f"beside them {', '.join(sorted(_SUFFIXES - {_WEIGHTS}))} files; anything else may run when it is "
            "read. Build the chain from a model without it."
        )


def _explained(repo_id: str, error: Exception) -> Exception:
    """What to raise instead of what the client raised."""
    # It wraps what went wrong with a file once more.
    inner = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    if hub_reason(inner) is not None or isinstance(inner, ValueError):
        return ValueError(f"The chain cannot be pushed to {repo_id!r}. {told(inner)}")
    return ConnectionError(
        f"The upload to {repo_id!r} was cut off before its commit, so nobody can open a part of it. Run the same "
        f"again: files that arrived are not sent again. {told(inner)}"
    )
