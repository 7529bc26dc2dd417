"""A Hub on loopback: what huggingface_hub's client asks of a model repository, served from memory by http.server.

Only what a push and a load need. Accounts are bearer tokens; a private repository is invisible without one. A fault
that a test plants is answered to every request whose method and path it matches.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from base64 import b64decode
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ACCOUNTS = {"hf_writer": ("me", "write"), "hf_reader": ("me", "read")}


@dataclass
class Repository:
    """A model: its commits by name, each a whole tree of path -> content, and where its branches point."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(tree.items()))).encode()).hexdigest()
        self.commits[name] = tree
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


class Hub:
    """The state of the server.

    Attributes:
        repositories: by name.
        blobs: contents of large files by repository and SHA-256, committed or not.
        requests: "METHOD path" of every request, in order.
        faults: (regular expression of "METHOD path", status) to answer with; status 0 cuts the connection.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[tuple[str, str], bytes] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, int]] = []
        self.url = ""


@contextmanager
def serve():
    """A running Hub; its `url` is what HF_ENDPOINT must be."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        for pattern, status in self.hub.faults:
            if re.search(pattern, request):
                self.fail(status)
                return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in ACCOUNTS:
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
            return
        self.account, self.role = ACCOUNTS.get(token, (None, None))
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                method(self, *match.groups())
                return
        self.answer(404, {"error": f"no such request: {request}"})

    def fail(self, status: int) -> None:
        if status:
            self.answer(status, {"error": "planted by the test"})
        else:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content: object = None, headers: dict | None = None, data: bytes | None = None):
        body = json.dumps(content).encode() if data is None else data
        self.send_response(status)
        if data is None:
            self.send_header("Content-Type", "application/json")
            if isinstance(content, dict) and "error" in content:
                self.send_header("X-Error-Message", str(content["error"]))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repository(self, name: str, write: bool = False) -> Repository | None:
        """A repository that this account may see; otherwise answers."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.account is None):
            status = 404 if self.account else 401
            self.answer(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if write and self.role != "write":
            self.answer(403, {"error": "this token may not write"})
            return None
        return found

    def found(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """A repository that this account may see, and the commit of a revision; otherwise answers."""
        repository = self.repository(name)
        if repository is None:
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    # Accounts and repositories

    def whoami(self) -> None:
        if self.account is None:
            self.answer(401, {"error": "no token"})
        else:
            self.answer(200, {"name": self.account, "auth": {"accessToken": {"role": self.role}}})

    def create(self) -> None:
        if self.role != "write":
            self.answer(403 if self.account else 401, {"error": "this token may not write"})
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.account}/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))  # the client before 2.0
            self.hub.repositories[name] = Repository(private)
        self.answer(409 if known else 200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def create_branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if repository is not None:
            known = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self.answer(409 if known else 200, {"error": "exists"} if known else {})

    def info(self, name: str, revision: str | None = None) -> None:
        found = self.found(name, revision or "main")
        if found is None:
            return
        repository, commit = found
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        content = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings}
        self.answer(200, {**content, "tags": [], "disabled": False, "gated": False, "downloads": 0, "likes": 0})

    def tree(self, name: str, revision: str) -> None:
        found = self.found(name, revision)
        if found is None:
            return
        repository, commit = found
        self.answer(200, [describe(path, content) for path, content in sorted(repository.commits[commit].items())])

    # Uploads

    def preupload(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self.answer(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        if self.repository(name, write=True) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if (name, asked["oid"]) not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/{name}.git/blobs/{asked['oid']}", "header": {}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, name: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.answer(400, {"error": "content does not match its SHA-256"})
            return
        self.hub.blobs[name, oid] = self.body
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        tree = dict(repository.files(revision))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                tree[value["path"]] = b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                tree[value["path"]] = self.hub.blobs[name, value["oid"]]
            elif entry["key"] == "deletedFile":
                del tree[value["path"]]
        oid = repository.commit(revision, tree)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    # Downloads

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.found(name, revision)
        if found is None:
            return
        repository, commit = found
        headers = {"X-Repo-Commit": commit}
        content = repository.commits[commit].get(path)
        if content is None:
            self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        entry = describe(path, content)
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" in entry:
            headers["X-Linked-Etag"] = f'"{entry["lfs"]["oid"]}"'
            headers["X-Linked-Size"] = str(len(content))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, headers=headers, data=content[first : last + 1])
        else:
            self.answer(200, headers=headers, data=content)


def describe(path: str, content: bytes) -> dict:
    """A file as the tree of a repository lists it; its oid is git's."""
    oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if is_large(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 128}
    return entry


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{NAME}/branch/(.+)", Handler.create_branch),
    (rf"POST /api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"GET /api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (rf"PUT /{NAME}\.git/blobs/([0-9a-f]{{64}})", Handler.put_blob),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
