"""A Hub on this machine: the part of its HTTP interface that downloads and uploads use."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http
from transformers.utils import hub as transformers_hub

from tests.chain.hub_repositories import Hub, Refused, apply_commit, is_large, object_id, tree

_REPO = r"([^/]+/[^/]+)"
Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub answers on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def go_online(patch: pytest.MonkeyPatch, hub: Hub, cache: Path) -> None:
    """Have the Hub's client talk to this hub, with a cache of its own, logged in as "me"."""
    url = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Xet's own protocol is not HTTP requests that one could answer here; without it the client sends files by LFS.
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", "token-of-me")
    # transformers keeps a client, with the address of the first time.
    patch.setattr(transformers_hub, "_hf_api", None)
    # Between its tries the client waits for half a minute in all.
    patch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    body: bytes

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path)))
        size = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT" and len(self.hub.uploads) == self.hub.uploads_until_hold:
            self.hub.holding.set()
            self.close_connection = True
            # Until the other side is gone.
            while self.connection.recv(2**16):
                pass
            return
        if self.command == "PUT" and self.hub.cuts_now():
            # In the middle of the file.
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        # Before anything is answered: the connection would break with bytes that nobody read.
        self.body = self.rfile.read(size)
        try:
            for method, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    status, headers, content = answer(self, *map(unquote, found.groups()))
                    break
            else:
                raise Refused(404, message=f"this Hub does not know {self.command} {path}")
        except Refused as refused:
            status, content = refused.status, json.dumps(refused.content).encode()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self) -> str | None:
        return self.hub.user(self.headers.get("Authorization"))

    def asked(self) -> Any:
        return json.loads(self.body)


def _json(value: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _who(request: _Handler) -> Answer:
    user = request.user()
    if user is None:
        raise Refused(401, message="Invalid username or password.")
    return _json({"name": user, "type": "user"})


def _create(request: _Handler) -> Answer:
    repo_id = request.hub.create(request.asked(), request.user())
    return _json({"url": f"{request.hub.address}/{repo_id}", "name": repo_id})


def _branch(request: _Handler, repo_id: str, branch: str) -> Answer:
    repository = request.hub.writable(repo_id, request.user())
    if branch in repository.references:
        raise Refused(409, message="Reference already exists")
    repository.references[branch] = repository.references["main"]
    return _json({})


def _info(request: _Handler, repo_id: str, revision: str = "main") -> Answer:
    repository = request.hub.readable(repo_id, request.user())
    commit, files = repository.at(revision)
    siblings = [{"rfilename": name} for name in sorted(files)]
    return _json({"id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings})


def _tree(request: _Handler, repo_id: str, revision: str) -> Answer:
    return _json(tree(request.hub.readable(repo_id, request.user()).at(revision)[1]))


def _resolve(request: _Handler, repo_id: str, revision: str, path: str) -> Answer:
    commit, files = request.hub.readable(repo_id, request.user()).at(revision)
    if path not in files:
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
    content = files[path]
    headers = {"X-Repo-Commit": commit, "ETag": f'"{object_id(path, content)}"', "Accept-Ranges": "bytes"}
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if span is None:
        return 200, headers, content
    start, end = int(span[1]), int(span[2] or len(content) - 1)
    return 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1]


def _preupload(request: _Handler, repo_id: str, revision: str) -> Answer:
    there = request.hub.writable(repo_id, request.user()).at(revision)[1]
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
            "shouldIgnore": False,
            "oid": object_id(file["path"], there[file["path"]]) if file["path"] in there else None,
        }
        for file in request.asked()["files"]
    ]
    return _json({"files": files})


def _batch(request: _Handler, repo_id: str) -> Answer:
    request.hub.writable(repo_id, request.user())
    answers = []
    for wanted in request.asked()["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in request.hub.large:
            answer["actions"] = {"upload": {"href": f"{request.hub.address}/large/{wanted['oid']}"}}
        answers.append(answer)
    return _json({"transfer": "basic", "objects": answers})


def _upload(request: _Handler, oid: str) -> Answer:
    hub, content = request.hub, request.body
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refused(400, message="the content does not have the sha256 that was announced")
    hub.large[oid] = content
    hub.uploads.append(oid)
    return 200, {}, b""


def _validate_card(request: _Handler) -> Answer:
    found = re.match(r"---\n(.*?)\n---\n", request.asked()["content"], re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise Refused(400, message=str(error)) from error
    if not isinstance(metadata, dict):
        raise Refused(400, message="the metadata must be a mapping")
    return _json({"errors": [], "warnings": []})


def _commit(request: _Handler, repo_id: str, branch: str) -> Answer:
    repository = request.hub.writable(repo_id, request.user())
    commit = apply_commit(request.hub, repository, branch, request.body.splitlines())
    url = f"{request.hub.address}/{repo_id}/commit/{commit}"
    return _json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


_ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", _who),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate_card),
    ("POST", f"/api/models/{_REPO}/branch/([^/]+)", _branch),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", _preupload),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", _commit),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)", _tree),
    ("GET", f"/api/models/{_REPO}/revision/([^/]+)", _info),
    ("GET", f"/api/models/{_REPO}", _info),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _batch),
    ("PUT", "/large/([0-9a-f]{64})", _upload),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", _resolve),
]
