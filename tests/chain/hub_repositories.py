"""What a Hub on this machine holds: repositories by commit, large files by sha256, who may do what."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
# The Hub keeps weights, and whatever is large, outside of git.
_LARGE_SUFFIXES, _LARGE_BYTES = (".safetensors", ".png"), 10 * 2**20


class Refused(Exception):
    """An answer other than success, as the Hub gives it."""

    def __init__(self, status: int, code: str = "", message: str = "", **content: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.content = {"error": message, **content}


@dataclass
class Repository:
    """One repository.

    Args:
        private: whether only its owner sees it.
        commits: commit -> its files.
        references: branch or tag -> commit.
        messages: commit -> what it was said to be.
    """

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def add(self, files: Mapping[str, bytes], names: Iterable[str], message: str = "") -> str:
        """A new commit, under these branches and tags."""
        content = {name: hashlib.sha1(data).hexdigest() for name, data in sorted(files.items())}
        commit = hashlib.sha1(json.dumps([content, len(self.commits)]).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.messages[commit] = message
        self.references.update(dict.fromkeys(names, commit))
        return commit

    def at(self, revision: str) -> tuple[str, Files]:
        """The commit that a branch, a tag or a commit means, and its files."""
        commit = self.references.get(revision, revision)
        if commit not in self.commits:
            raise Refused(404, "RevisionNotFound")
        return commit, self.commits[commit]


class Hub:
    """Repositories, and every request that was made.

    Args:
        tokens: token -> the user it belongs to.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = dict(tokens or {})
        self.repositories: dict[str, Repository] = {}
        # Large files by sha256, whether or not a commit has them yet.
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        # How many more large files arrive whole: after that every connection is cut in the middle of one, or as many
        # as there are cuts left.
        self.uploads_until_cut: int | None = None
        self.cuts: int | None = None
        # How many large files arrive before one is waited for that never does.
        self.uploads_until_hold: int | None = None
        self.holding = threading.Event()
        self.address = ""

    def commit(self, repo_id: str, folder: Path, *names: str) -> str:
        """Have a folder as a new commit, under these branches and tags."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        return self.repositories.setdefault(repo_id, Repository()).add(files, names)

    def head(self, repo_id: str, revision: str = "main") -> str:
        return self.repositories[repo_id].references[revision]

    def files(self, repo_id: str, revision: str = "main") -> Files:
        return self.repositories[repo_id].at(revision)[1]

    def fetched(self) -> list[str]:
        """The files whose content was sent, in order."""
        return [path.split("/", 5)[5] for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def revisions(self) -> set[str]:
        """The revisions that files and listings were asked for at."""
        return {path.split("/resolve/")[1].split("/")[0] for _, path in self.requests if "/resolve/" in path} | {
            path.split("/tree/")[1] for _, path in self.requests if "/tree/" in path
        }

    def cuts_now(self) -> bool:
        """Whether the file that comes is cut."""
        if self.uploads_until_cut is None or len(self.uploads) < self.uploads_until_cut or self.cuts == 0:
            return False
        self.cuts = None if self.cuts is None else self.cuts - 1
        return True

    def user(self, authorization: str | None) -> str | None:
        """Who is asking; None for anybody."""
        if not authorization:
            return None
        user = self.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return user

    def readable(self, repo_id: str, user: str | None) -> Repository:
        """A repository that this user may see; one that is hidden looks like one that is not there."""
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and repo_id.split("/")[0] != user):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        return repository

    def writable(self, repo_id: str, user: str | None) -> Repository:
        repository = self.readable(repo_id, user)
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if repo_id.split("/")[0] != user:
            raise Refused(403, message="You don't have the rights to commit here")
        return repository

    def create(self, body: Mapping[str, Any], user: str | None) -> str:
        """A new repository with one commit, as the Hub makes it."""
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        if not repo_id.startswith(f"{user}/"):
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        if repo_id in self.repositories:
            raise Refused(409, message="You already created this model repo", url=f"{self.address}/{repo_id}")
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.repositories[repo_id] = Repository(private)
        self.repositories[repo_id].add({".gitattributes": b"*.safetensors filter=lfs\n"}, ["main"], "initial commit")
        return repo_id


def apply_commit(hub: Hub, repository: Repository, branch: str, lines: Iterable[bytes]) -> str:
    """The commit that lines of JSON describe: a header, then one operation each."""
    if branch not in repository.references:
        raise Refused(404, "RevisionNotFound")
    files, message = dict(repository.at(branch)[1]), ""
    for line in lines:
        entry = json.loads(line)
        kind, value = entry["key"], entry["value"]
        if kind == "header":
            message = value["summary"]
        elif kind == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            if value["oid"] not in hub.large:
                raise Refused(400, message=f"{value['path']} points to a file that was not uploaded")
            files[value["path"]] = hub.large[value["oid"]]
        elif kind == "deletedFile":
            del files[value["path"]]
        else:
            raise Refused(400, message=f"unknown operation {kind}")
    return repository.add(files, [branch], message)


def is_large(path: str, size: int) -> bool:
    return path.endswith(_LARGE_SUFFIXES) or size > _LARGE_BYTES


def object_id(path: str, content: bytes) -> str:
    """What the Hub calls a file's content: the sha256 of a large one, git's own hash of any other."""
    if is_large(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The listing of a commit, all folders opened."""
    listing = []
    for path, content in sorted(files.items()):
        entry: dict[str, Any] = {
            "type": "file", "path": path, "size": len(content), "oid": object_id(path, content),
        }  # fmt: skip
        if is_large(path, len(content)):
            entry["lfs"] = {"oid": object_id(path, content), "size": len(content), "pointerSize": 134}
        listing.append(entry)
    return listing
