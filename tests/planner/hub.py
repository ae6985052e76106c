"""A stand-in for the Hub on this machine: what its real client asks for when it loads, and nothing more."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_stand_in"
READ_ONLY = "hf_read_only"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = 4096
"""Larger files go to large file storage, as weights do."""


def problems_of(card: str) -> list[dict[str, str]]:
    """Return what the Hub would say against a model card's front matter."""
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    fields = yaml.safe_load(front[1]) if front else {}
    base = fields.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        return [{"message": f'"base_model" with value "{base}" is not valid'}]
    return []


@dataclass
class Hub:
    """What arrived.

    Attributes:
        url: address.
        repositories: name → whether it is private.
        branches: (repository, branch) → file → bytes.
        stored: digests of what large file storage was given.
        asked: paths of all requests.
        shared: repository → file → bytes, to download.
    """

    url: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    shared: dict[str, dict[str, bytes]] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    """Routes of the API."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, status: int, value: Any = None) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.hub.asked.append(self.path)
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/main", path):
            if found[1] in self.hub.shared:
                self.answer(200, {"id": found[1], "sha": COMMIT, "siblings": []})
                return
        elif found := re.fullmatch(rf"/api/models/([^/]+/[^/]+)/tree/{COMMIT}", path):
            files = self.hub.shared.get(found[1], {}).items()
            sizes = {name: (len(content), hashlib.sha1(content).hexdigest()) for name, content in files}
            self.answer(
                200, [{"type": "file", "path": name, "size": size, "oid": oid} for name, (size, oid) in sizes.items()]
            )
            return
        elif found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            content = self.hub.shared.get(found[1], {}).get(found[2])
            if content is not None:
                self.file(content)
                return
        self.answer(404, {"error": "not found"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def file(self, content: bytes) -> None:
        """Answer with a file, or with its headers alone."""
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_PUT(self) -> None:
        """Large file storage."""
        self.hub.asked.append(self.path)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(data).hexdigest()
        if self.path != f"/storage/{digest}":
            self.answer(400, {"error": "another digest than announced"})
            return
        self.hub.stored[digest] = data
        self.answer(200)

    def do_POST(self) -> None:
        self.hub.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_ONLY):
            self.answer(401, {"error": "Invalid username or password."})
        elif token == READ_ONLY:
            self.answer(403, {"error": "You don't have the rights to create a model"})
        else:
            self.route(self.path.split("?")[0], body)

    def route(self, path: str, body: bytes) -> None:
        """Answer one request of somebody who may write."""
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            known = name in self.hub.repositories
            if not known:
                self.hub.repositories[name] = private
            self.answer(409 if known else 200, {"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": problems_of(json.loads(body)["content"])})
        elif found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.hub.branches.setdefault((found[1], found[2]), {})
            self.answer(200, {})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            if found[2].startswith("refs"):
                self.answer(404, {"error": "Invalid rev id"})
                return
            modes = [(it["path"], "lfs" if it["size"] > SMALL else "regular") for it in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None} for name, mode in modes]
            self.answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**it, "actions": {"upload": {"href": f"{self.hub.url}/storage/{it['oid']}"}}}
                for it in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            self.commit(found[1], self.hub.branches.setdefault((found[1], found[2]), {}), body)
        else:
            self.answer(501, {"error": f"the stand-in has no {path}"})

    def commit(self, name: str, files: dict[str, bytes], body: bytes) -> None:
        """Put what a commit says into a branch."""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})


@contextmanager
def open_hub() -> Iterator[Hub]:
    """Start the stand-in on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
