"""A Hub on this machine: the part of its HTTP interface that a download uses, for repositories that are folders."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by commit, and every request that was made.

    Args:
        repositories: id -> commit -> folder.
        references: id -> branch or tag -> commit.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.references: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.address = ""

    def commit(self, repo_id: str, folder: Path, *names: str) -> str:
        """Serve a folder as a new commit, under these branches and tags too."""
        commit = hashlib.sha1(f"{repo_id} {folder}".encode()).hexdigest()
        self.repositories.setdefault(repo_id, {})[commit] = folder
        self.references.setdefault(repo_id, {}).update(dict.fromkeys(names, commit))
        return commit

    def fetched(self) -> list[str]:
        """The files whose content was sent, in order."""
        return [path.split("/", 5)[5] for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def revisions(self) -> set[str]:
        """The revisions that files and listings were asked for at."""
        return {path.split("/resolve/")[1].split("/")[0] for _, path in self.requests if "/resolve/" in path} | {
            path.split("/tree/")[1] for _, path in self.requests if "/tree/" in path
        }


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub answers on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo, what, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
                found = self._folder(repo, revision)
                if found:
                    listing = _tree(found[1]) if what == "tree" else {"id": repo, "sha": found[0], "siblings": []}
                    self._send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode(), body)
                return
            found = self._folder("/".join(parts[:2]), parts[3])
            if not found:
                return
            commit, folder = found
            file = folder / "/".join(parts[4:])
            if not file.is_file():
                self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"", body)
                return
            content = file.read_bytes()
            self._send(200, {"X-Repo-Commit": commit, "ETag": f'"{_digest(content)}"'}, content, body)

        def _folder(self, repo: str, revision: str) -> tuple[str, Path] | None:
            commits = hub.repositories.get(repo)
            if commits is None:
                self._send(404, {"X-Error-Code": "RepoNotFound"}, b"", False)
                return None
            commit = hub.references[repo].get(revision, revision)
            if commit not in commits:
                self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", False)
                return None
            return commit, commits[commit]

        def _send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _tree(folder: Path) -> list[dict[str, object]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": _digest(path.read_bytes()),
        }
        for path in files
    ]
