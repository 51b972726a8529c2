"""A stand-in for the Hugging Face Hub on 127.0.0.1: what huggingface_hub asks for when it downloads and uploads."""

import base64
import ctypes
import hashlib
import json
import os
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants

_Files = dict[str, bytes]


def commit_of(files: _Files) -> str:
    """The commit of a tree: 40 hexadecimal digits, which its content decides."""
    names = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items())
    return hashlib.sha1(json.dumps(names).encode()).hexdigest()


class Hub:
    """Repositories with branches and commits. Who writes, or reads what is private, needs a token; large files go the
    way of LFS, and a commit that names a file which never arrived whole is refused.

    Attributes:
        files: {repository: {file name: bytes}}, the branch main; a test may write here what was always there.
        tokens: {token: the user who has it}. A user writes to the repositories after that user's name.
        cut_off: How many of the next uploads are cut off half-way.
    """

    def __init__(self) -> None:
        self.files: dict[str, _Files] = {}
        self.branches: dict[tuple[str, str], _Files] = {}
        self.history: dict[tuple[str, str], _Files] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.tokens = {"hf_someone": "someone"}
        self.large: _Files = {}  # by sha256, as LFS keeps them
        self.cut_off = 0
        self.requests: Counter = Counter()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def downloads(self) -> set[str]:
        return {path.rsplit("/", 1)[-1] for (command, path) in self.requests if command == "GET"}

    def tree(self, repo: str, revision: str) -> _Files | None:
        """The files of a branch or a commit."""
        main = self.files.get(repo, {})
        if revision in ("main", commit_of(main)):
            return main
        return self.branches.get((repo, revision), self.history.get((repo, revision)))

    def commit(self, repo: str, branch: str, files: _Files) -> str:
        """Makes `files` the content of a branch; what stood there before stays as a commit."""
        before = self.tree(repo, branch) or {}
        self.history[repo, commit_of(before)] = before
        if branch == "main":
            self.files[repo] = files
        else:
            self.branches[repo, branch] = files
        self.history[repo, commit_of(files)] = files
        return commit_of(files)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Refused(Exception):
    """An answer that is an error: status, what the Hub's header X-Error-Code says, and more headers or content."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests[self.command, self.path] += 1
        headers = {}
        body = self._body()
        try:
            if body is None:  # cut off
                self.close_connection = True
                return
            for command, pattern, method in _ROUTES:
                if command == self.command and (match := re.fullmatch(pattern, path)):
                    status, content = 200, getattr(self, method)(*match.groups(), body)
                    break
            else:
                raise _Refused(404, "RepoNotFound")
        except _Refused as e:
            status, code, *more = e.args
            content = {"error": code, **dict(more)}
            headers = {"X-Error-Code": code, "X-Error-Message": code, **dict(more)}
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        elif isinstance(content, tuple):
            content, headers = content
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, *args) -> None:
        pass

    def _body(self) -> bytes | None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.hub.cut_off:
            self.hub.cut_off -= 1
            self.rfile.read(length // 2)
            return None
        return self.rfile.read(length)

    def _user(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _check_writer(self, owner: str) -> None:
        if self._user() is None:
            raise _Refused(401, "Invalid username or password.")
        if self._user() != owner:
            raise _Refused(403, "You don't have the rights to do this")

    def _check_reader(self, repo: str) -> None:
        if repo not in self.hub.files or (repo in self.hub.private and self._user() != repo.split("/")[0]):
            raise _Refused(404 if self._user() else 401, "RepoNotFound")

    def create(self, body: bytes) -> dict:
        asked = json.loads(body)
        owner = asked["organization"] or self._user()
        self._check_writer(owner)
        repo = f"{owner}/{asked['name']}"
        if repo in self.hub.files:
            raise _Refused(409, "You already created this model repo", ("url", f"{self.hub.endpoint}/{repo}"))
        if asked.get("private") or asked.get("visibility") == "private":  # before huggingface_hub 1.0, and since
            self.hub.private.add(repo)
        self.hub.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.hub.endpoint}/{repo}"}

    def branch(self, repo: str, name: str, body: bytes) -> dict:
        self._check_writer(repo.split("/")[0])
        if self.hub.tree(repo, name) is not None:
            raise _Refused(409, "Reference already exists")
        start = self.hub.tree(repo, json.loads(body).get("startingPoint", "main"))
        self.hub.commit(repo, name, dict(start))
        return {}

    def validate_yaml(self, body: bytes) -> dict:
        if not json.loads(body)["content"].startswith("---\n"):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return {"errors": [], "warnings": []}

    def info(self, repo: str, revision: str | None, body: bytes) -> dict:
        self._check_reader(repo)
        files = self.hub.tree(repo, revision or "main")
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo, "sha": commit_of(files), "siblings": siblings, "private": repo in self.hub.private}

    def preupload(self, repo: str, revision: str, body: bytes) -> dict:
        self._check_writer(repo.split("/")[0])
        if self.hub.tree(repo, revision) is None:
            raise _Refused(404, "RevisionNotFound")
        there = self.hub.tree(repo, revision)
        files = []
        for file in json.loads(body)["files"]:
            content = there.get(file["path"])
            large = file["path"].endswith((".safetensors", ".bin"))
            oid = None if content is None else _oid(content, large)
            mode = "lfs" if large else "regular"
            files.append(dict(path=file["path"], uploadMode=mode, shouldIgnore=False, oid=oid))
        return {"files": files}

    def batch(self, repo: str, body: bytes) -> dict:
        self._check_writer(repo.split("/")[0])
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                at = self.hub.endpoint
                actions = {"upload": f"{at}/lfs/{wanted['oid']}", "verify": f"{at}/lfs/verify"}
                entry["actions"] = {name: {"href": href} for name, href in actions.items()}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str, body: bytes) -> dict:
        if _oid(body, True) != oid:
            raise _Refused(400, "BadDigest")
        self.hub.large[oid] = body
        return {}

    def verify(self, body: bytes) -> dict:
        asked = json.loads(body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(404, "Object does not exist")
        return {}

    def make_commit(self, repo: str, branch: str, body: bytes) -> dict:
        self._check_writer(repo.split("/")[0])
        if (there := self.hub.tree(repo, branch)) is None:
            raise _Refused(404, "RevisionNotFound")
        files = dict(there)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.large:
                        raise _Refused(400, "LFS pointer pointed to a file that does not exist")
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = self.hub.commit(repo, branch, files)
        self.hub.messages.append(message)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"}

    def resolve(self, repo: str, revision: str, name: str, body: bytes) -> tuple[bytes, dict]:
        self._check_reader(repo)
        if (files := self.hub.tree(repo, revision)) is None:
            raise _Refused(404, "RevisionNotFound")
        if (content := files.get(name)) is None:
            raise _Refused(404, "EntryNotFound", ("X-Repo-Commit", commit_of(files)))
        return content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit_of(files)}


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{_REPO}(?:/revision/(.+))?", "info"),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", "branch"),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", "preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", "make_commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(\w+)", "upload"),
    ("POST", r"/lfs/verify", "verify"),
    *((command, rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve") for command in ("HEAD", "GET")),
]


def _oid(content: bytes, large: bool) -> str:
    """The name that LFS, or git, has for a file."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def client_environment(endpoint: str, cache: Path) -> dict[str, str]:
    """What points huggingface_hub at a hub; it reads these once, at import."""
    return {
        "HF_HOME": str(cache),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "no_proxy": "127.0.0.1",
    }


def connect(monkeypatch, endpoint: str, token: str | None) -> None:
    """Points the uploads of this process at a hub. Downloads read more at import: they need a process of their own."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # younger than huggingface_hub 0.30
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


def obey_permissions() -> None:
    """Makes this process subject to the permissions of files, though it is the superuser's: without it, chmod makes
    nothing read-only in a container, where all run as root."""
    libc, override = ctypes.CDLL(None, use_errno=True), 1 << 1  # CAP_DAC_OVERRIDE
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this process
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    sets[0] &= ~override  # of the effective ones
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
