"""Loopback server with the part of the Hugging Face Hub's HTTP API that loading a model needs.

`hub` is the fixture: local folders become Hub repositories, huggingface_hub (and what is built on
it: timm, transformers) downloads from them into a cache of the test's own.
"""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants, hf_api
from huggingface_hub.utils import _http

_REPO = r"(?P<repo>[^/]+?(?:/[^/]+?)??)"
_RESOLVE = re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    rf"/api/models/{_REPO}(?:/(?P<what>revision|tree|refs)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)


@dataclass(frozen=True)
class Request:
    """One request that reached the server: `path` is unquoted and has no query string."""

    method: str
    path: str
    status: int
    range: str | None
    token: str | None


@dataclass(frozen=True)
class _Commit:
    sha: str
    files: dict[str, bytes]


@dataclass
class _Repo:
    token: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, _Commit] = field(default_factory=dict)

    def commit(self, revision: str) -> _Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


class _Refusal(Exception):
    def __init__(self, status: HTTPStatus, code: str, commit: str | None = None):
        super().__init__(code)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": code}
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit


class HubServer:
    """Serves folders as Hub model repositories on 127.0.0.1.

    Attributes:
        cache_dir: huggingface_hub's cache while the `hub` fixture is active.
        requests: every request so far, oldest first; `requests.clear()` starts a new count.
    """

    def __init__(self, cache_dir: Path):
        self.cache_dir = cache_dir
        self.requests: list[Request] = []
        self._repos: dict[str, _Repo] = {}
        self._cut_after: int | None = None
        self._address = ("127.0.0.1", 0)
        self._server: ThreadingHTTPServer | None = None
        self._start()

    @property
    def endpoint(self) -> str:
        """The base URL, for `endpoint=` and HF_ENDPOINT."""
        return f"http://{self._address[0]}:{self._address[1]}"

    @property
    def env(self) -> dict[str, str]:
        """Environment of subprocesses that use this server; the fixture sets it in `os.environ`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.cache_dir.parent),
            "HF_HUB_CACHE": str(self.cache_dir),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            # transformers asks a bot on the internet to convert repositories without safetensors
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add_repo(
        self,
        repo_id: str,
        folder: str | os.PathLike[str],
        revision: str = "main",
        token: str | None = None,
    ) -> str:
        """Publishes what `folder` holds now as the newest commit of a repository's branch.

        Args:
            repo_id: "owner/name", or "name" alone.
            folder: directory whose files are read, recursively, at this call.
            revision: branch to create or to move; other branches and older commits stay.
            token: makes the repository gated: files need this bearer token.

        Returns:
            The commit hash, 40 hexadecimal digits.
        """
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
        listing = json.dumps([repo_id, {name: _blob_id(data) for name, data in files.items()}])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        repo = self._repos.setdefault(repo_id, _Repo())
        repo.token = token
        repo.commits[sha] = _Commit(sha, files)
        repo.refs[revision] = sha
        return sha

    def cut_next_download(self, n_bytes: int) -> None:
        """Closes the connection of the next file download after `n_bytes` bytes of its body."""
        self._cut_after = n_bytes

    def offline(self) -> ExitStack:
        """Refuses connections from now on; used in a `with`, only until its end."""
        self._stop()
        back_online = ExitStack()
        back_online.callback(self._start)
        return back_online

    def close(self) -> None:
        """Stops the server for good."""
        self._stop()

    def _start(self) -> None:
        self._server = ThreadingHTTPServer(self._address, partial(_Handler, self))
        self._address = ("127.0.0.1", self._server.server_port)
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer_api(self, match: re.Match[str], query: dict[str, list[str]]) -> Any:
        name, what = match["repo"], match["what"]
        repo = self._repo(name)
        if what == "refs":
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
                for ref, sha in repo.refs.items()
            ]
            return {"branches": branches, "converts": [], "tags": []}
        commit = self._commit(repo, match["revision"] or "main")
        if what == "tree":
            return _tree(commit, match["path"] or "", query.get("recursive") == ["true"])
        return {
            "id": name,
            "modelId": name,
            "sha": commit.sha,
            "private": False,
            "gated": "auto" if repo.token else False,
            "tags": [],
            "siblings": [{"rfilename": path} for path in commit.files],
        }

    def _answer_file(self, match: re.Match[str], token: str | None) -> tuple[_Commit, bytes]:
        repo = self._repo(match["repo"])
        if repo.token is not None and token != repo.token:
            status = HTTPStatus.FORBIDDEN if token else HTTPStatus.UNAUTHORIZED
            raise _Refusal(status, "GatedRepo")
        commit = self._commit(repo, match["revision"])
        data = commit.files.get(unquote(match["path"]))
        if data is None:
            raise _Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound", commit.sha)
        return commit, data

    def _repo(self, name: str) -> _Repo:
        if name not in self._repos:
            raise _Refusal(HTTPStatus.NOT_FOUND, "RepoNotFound")
        return self._repos[name]

    def _commit(self, repo: _Repo, revision: str) -> _Commit:
        commit = repo.commit(unquote(revision))
        if commit is None:
            raise _Refusal(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return commit

    def _take_cut(self) -> int | None:
        cut, self._cut_after = self._cut_after, None
        return cut


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0, one connection per request: no idle connection outlives `HubServer.offline()`
    def __init__(self, hub: HubServer, *args: Any):
        self.hub = hub
        super().__init__(*args)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        scheme, _, credential = (self.headers["Authorization"] or "").partition(" ")
        token = credential if scheme == "Bearer" else None
        status, headers, body = self._answer(url.path, parse_qs(url.query), token)
        self.hub.requests.append(
            Request(self.command, unquote(url.path), status, self.headers["Range"], token)
        )
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            is_file = "ETag" in headers
            self.wfile.write(body[: self.hub._take_cut()] if is_file else body)

    do_HEAD = do_GET

    def _answer(
        self, path: str, query: dict[str, list[str]], token: str | None
    ) -> tuple[HTTPStatus, dict[str, str], bytes]:
        try:
            if match := _API.fullmatch(path):
                body = json.dumps(self.hub._answer_api(match, query)).encode()
                return HTTPStatus.OK, {"Content-Type": "application/json"}, body
            if match := _RESOLVE.fullmatch(path):
                commit, data = self.hub._answer_file(match, token)
                return self._file_part(commit, data)
            return HTTPStatus.NOT_FOUND, {}, b""
        except _Refusal as refusal:
            return refusal.status, refusal.headers, b""

    def _file_part(self, commit: _Commit, data: bytes) -> tuple[HTTPStatus, dict[str, str], bytes]:
        headers = {
            "ETag": f'"{_blob_id(data)}"',
            "X-Repo-Commit": commit.sha,
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if wanted is None:
            return HTTPStatus.OK, headers, data
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1) + 1, len(data))
        if start >= stop:
            headers["Content-Range"] = f"bytes */{len(data)}"
            return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers, b""
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return HTTPStatus.PARTIAL_CONTENT, headers, data[start:stop]

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _blob_id(data: bytes) -> str:
    """Returns git's object id of a file, which is the Hub's ETag outside LFS."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree(commit: _Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{unquote(folder)}/" if folder else ""
    inside = {path: data for path, data in commit.files.items() if path.startswith(prefix)}
    if prefix and not inside:
        raise _Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound", commit.sha)
    entries: dict[str, dict[str, Any]] = {}
    for path, data in inside.items():
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            parent = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(f"{commit.sha} {parent}".encode()).hexdigest()
            entries[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", "path": path, "oid": _blob_id(data), "size": len(data)}
    return list(entries.values())


def _forget_transformers_client() -> None:
    # built on first use and kept for the process, with the endpoint of that moment
    module = sys.modules.get("transformers.utils.hub")
    if module is not None:
        vars(module)["_hf_api"] = None


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HubServer]:
    """`HubServer` in the place of the Hub, for this process and subprocesses, with an empty cache.

    No token is visible, offline switches are off, and failed requests are retried without waiting.
    """
    home = tmp_path_factory.mktemp("hf-home")
    server = HubServer(cache_dir=home / "hub")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)

    # huggingface_hub reads its environment at import only
    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(server.cache_dir),
        "HUGGINGFACE_HUB_CACHE": str(server.cache_dir),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
    retry_defaults = _http.http_backoff.__kwdefaults__
    assert retry_defaults is not None
    monkeypatch.setitem(retry_defaults, "base_wait_time", 0)
    _forget_transformers_client()
    close_session()  # the next one reads NO_PROXY
    yield server
    close_session()
    _forget_transformers_client()
    server.close()
