"""A chain to the Hub: its weights file by file, then everything in one commit."""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from cbd_trl.cards.card import CARD_FILES, README, current_card
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.cards import AnyChain, anchor_card, chain_card
from cbd_trl.chain.hub import explained, hub_reason
from cbd_trl.chain.manifest import (
    MANIFEST,
    STATISTICS_FILE,
    AnchorRecord,
    Manifest,
    RepoPin,
    manifest_text,
    read_manifest,
)
from cbd_trl.chain.measurements import MEASURED

# Name in the repository -> a file here, or what it is to hold.
Content = Mapping[str, Path | bytes]
_WEIGHTS = ".safetensors"
# Of a model that somebody else's library wrote, too.
_ANY_WEIGHTS = (_WEIGHTS, ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
# What a push leaves of an anchor that another number of shards takes the place of.
_SHARDS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclasses.dataclass(frozen=True)
class Push:
    """How a chain is pushed.

    The Hub's client does the transfer: `preupload_lfs_files`, weights one file at a time, and `create_commit`. Its
    `upload_folder` may commit in several steps, and chain.json with any of them; here chain.json comes in the one
    commit that everything else is in, so nobody ever opens a part. A file that arrived stays with the Hub, under its
    hash, before it is in a commit, and the same push after an interruption does not send it again.

    Args:
        private: whether a repository that is made is private; None for what the owner's default is. With True one
            that is there and public is refused.
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

    def send(self, chain: AnyChain, repo_id: str) -> CommitInfo:
        """Push a chain, which takes the place of the one that the repository held.

        Args:
            chain: the chain.
            repo_id: the repository, made if there is none.

        Returns:
            The commit that holds chain.json.

        Raises:
            ValueError: a bad id, a token that may not write there, a repository of something else or one that all
                can read where private=True, or a file here that is damaged.
            ConnectionError: the upload was cut off.
        """
        for anchor in chain.anchors:
            anchor.need(*anchor.files)
        repo_id = self._make(repo_id)
        before = self._there(repo_id)
        own_repos = self._make_own(repo_id, chain, before) if self.own_repos else {}
        # As its cards call it.
        named = copy.copy(chain)
        named.name_or_path, named.revision = repo_id, self.revision or "main"
        content: dict[str, Path | bytes] = {}
        anchors: list[AnchorRecord] = []
        for anchor in chain.anchors:
            if anchor.name in own_repos:
                own, earlier = own_repos[anchor.name]
                there = _anchor_content(named, anchor, own)
                commit = self._commit(own, there, [name for name in earlier if name not in there])
                pin = RepoPin(repo_id=own, revision=commit.oid)
                anchors.append(anchor.model_copy(update={"repo": pin}))
            else:
                there = _anchor_content(named, anchor)
                content.update({f"{anchor.name}/{name}": part for name, part in there.items()})
                anchors.append(anchor.model_copy(update={"repo": None}))
        manifest = Manifest(model_type=chain.model_type, versions=chain.versions, anchors=anchors)
        content[MANIFEST] = manifest_text(manifest).encode()
        for name in (*CARD_FILES, MEASURED):
            if (chain.path / name).is_file():
                content[name] = chain.path / name
        content[README] = current_card(chain.path, chain_card(named, repo_id)).encode()
        return self._commit(repo_id, content, _left_over(before, content))

    def _make(self, repo_id: str) -> str:
        """The repository's whole id, once it is there with the branch."""
        api = HfApi(token=self.token)
        try:
            repo_id = api.create_repo(repo_id, private=self.private, exist_ok=True).repo_id
            # One that was there is as it was.
            seen = bool(self.private) and not api.model_info(repo_id).private
            if self.revision is not None and not seen:
                api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        # The client lets errors of its HTTP library through, and which one that is depends on its version.
        except Exception as error:
            raise _failed(repo_id, error) from error
        if seen:
            raise ValueError(
                f"{repo_id!r} is there and public, and private=True (--private) requires a private repository: "
                "everybody could read what is uploaded, and nothing was. Make it private in its settings on the Hub, "
                "choose another id, or leave private out."
            )
        return repo_id

    def _make_own(self, repo_id: str, chain: AnyChain, before: list[str]) -> dict[str, tuple[str, list[str]]]:
        """Anchor -> its own repository, and what an earlier push left there. All are made and looked at before the
        first gets anything."""
        pinned = self._pinned(repo_id) if MANIFEST in before else {}
        made = {}
        for anchor in chain.anchors:
            own = self._make(f"{repo_id}-{anchor.name}")
            there = self._files(own)
            if own not in pinned and _is_model(there) and not _is_pushed(there, anchor):
                raise ValueError(
                    f"{own!r} holds a model that is not an anchor of this chain: the {MANIFEST} of {repo_id!r} "
                    "does not name it, and it is not what an interrupted push of the same anchor leaves. Nothing "
                    f"there is overwritten. Choose another id, or rename or delete {own!r} on the Hub."
                )
            sent = {*pinned.get(own, ()), *CARD_FILES, STATISTICS_FILE}
            made[anchor.name] = own, [name for name in there if name in sent or _SHARDS.fullmatch(name)]
        return made

    def _pinned(self, repo_id: str) -> dict[str, set[str]]:
        """Repository -> files of the anchor that the chain.json there pins in it; empty where it cannot be read, as a
        damaged one is pushed over."""
        try:
            file = HfApi(token=self.token).hf_hub_download(repo_id, MANIFEST, revision=self.revision)
        except Exception as error:
            raise _failed(repo_id, error) from error
        anchors: list[AnchorRecord] = []
        with suppress(ValueError):
            anchors = read_manifest(Path(file).parent).anchors
        return {anchor.repo.repo_id: set(anchor.files) for anchor in anchors if anchor.repo is not None}

    def _files(self, repo_id: str) -> dict[str, RepoFile]:
        api = HfApi(token=self.token)
        try:
            entries = list(api.list_repo_tree(repo_id, recursive=True, revision=self.revision))
        except Exception as error:
            raise _failed(repo_id, error) from error
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _there(self, repo_id: str) -> list[str]:
        """The files of a repository that holds a chain, or no model at all."""
        files = list(self._files(repo_id))
        if MANIFEST not in files and _is_model(files):
            raise ValueError(
                f"{repo_id!r} holds weights and no {MANIFEST}: it is not a chain, and nothing there is overwritten. "
                "Choose another id."
            )
        return files

    def _commit(self, repo_id: str, content: Content, left_over: list[str] | None = None) -> CommitInfo:
        api = HfApi(token=self.token)
        additions = [CommitOperationAdd(name, part) for name, part in content.items()]
        deletions = [CommitOperationDelete(name) for name in left_over or []]
        try:
            for addition in additions:
                if addition.path_in_repo.endswith(_WEIGHTS):
                    # By itself: of several sent together none may count before all are there.
                    api.preupload_lfs_files(repo_id, [addition], revision=self.revision, free_memory=False)
            return api.create_commit(
                repo_id, [*additions, *deletions], commit_message=self.commit_message, revision=self.revision
            )
        except Exception as error:
            raise _failed(repo_id, error) from error


def _is_model(files: Iterable[str]) -> bool:
    """Whether a repository with these files holds a model, or a chain of some whose weights may lie elsewhere."""
    return any(name.endswith(_ANY_WEIGHTS) or name == MANIFEST for name in files)


def _is_pushed(there: Mapping[str, RepoFile], anchor: Anchor) -> bool:
    """Whether a repository holds this very anchor, and nothing that a push does not send."""
    return there.keys() <= {*anchor.files, *CARD_FILES, ".gitattributes"} and all(
        name in there and _is_same(there[name], anchor.path / name, sha256) for name, sha256 in anchor.files.items()
    )


def _is_same(there: RepoFile, file: Path, sha256: str) -> bool:
    # The Hub knows a large file by its sha256, and any other by git's hash.
    return there.blob_id == git_hash(file.read_bytes()) if there.lfs is None else there.lfs.sha256 == sha256


def _anchor_content(chain: AnyChain, anchor: Anchor, own: str | None = None) -> Content:
    """An anchor's files and its card, as they lie in the chain's repository or in their own."""
    card = current_card(anchor.path, anchor_card(chain, anchor, own)).encode()
    beside = [name for name in CARD_FILES if (anchor.path / name).is_file()]
    return {**{name: anchor.path / name for name in (*beside, *anchor.files)}, README: card}


def _left_over(before: list[str], content: Content) -> list[str]:
    """What a repository held of an earlier chain and this one does not have: weights, files beside them in a folder,
    and what was measured."""
    folders = {PurePosixPath(name).parent for name in before if name.endswith(_WEIGHTS)} - {PurePosixPath()}
    return [
        name
        for name in before
        if name not in content
        and (name.endswith(_WEIGHTS) or PurePosixPath(name).parent in folders or name in (*CARD_FILES, MEASURED))
    ]


def _failed(repo_id: str, error: Exception) -> Exception:
    """What to raise instead of what the client raised."""
    # It wraps what went wrong with a file once more.
    inner = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    if hub_reason(inner) is not None or isinstance(inner, ValueError):
        return ValueError(f"The chain cannot be pushed to {repo_id!r}. {explained(inner)}")
    return ConnectionError(
        f"The upload to {repo_id!r} was cut off before its commit, so nobody can open a part of it. Run the same "
        f"again: files that arrived are not sent again. {explained(inner)}"
    )
