"""A stand-in of the Hugging Face hub's API on loopback, for what huggingface_hub calls here: the hub itself cannot be
had in a test. It keeps repositories in memory, holds uploads to their hashes, and answers with the hub's status codes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_stand_in"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        names = sorted((n, hashlib.sha256(d).hexdigest()) for n, d in self.files.items())
        return hashlib.sha1(json.dumps([len(self.commits), names]).encode()).hexdigest()


@dataclass
class Hub:
    endpoint: str
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, value: Any = None, body: bytes | None = None, **headers: str) -> None:
            data = body if body is not None else json.dumps(value if value is not None else {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if body is None else "application/octet-stream")
            self.send_header("Content-Length", headers.pop("length", str(len(data))))
            for name, text in headers.items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refuse(self, status: int, message: str, code: str = "") -> None:
            more = {"X_Error_Code": code} if code else {}
            self.answer(status, {"error": message}, X_Error_Message=message, **more)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        @property
        def known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def route(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            data = self.body() if self.command in ("POST", "PUT") else b""
            if path == "/api/whoami-v2":
                return self.answer(200, {"name": "me", "orgs": []}) if self.known else self.refuse(401, "Invalid token")
            if path.startswith("/lfs/"):
                oid = path.removeprefix("/lfs/")
                if hashlib.sha256(data).hexdigest() != oid:
                    return self.refuse(400, "the content is not what was announced")
                hub.blobs[oid] = data
                return self.answer(200)
            if path == "/api/repos/create":
                return self.create(json.loads(data))
            if path == "/api/validate-yaml":
                return self.validate(json.loads(data)["content"])
            parts = path.strip("/").removeprefix("api/models/").split("/")
            name, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
            repo = hub.repos.get(name)
            if repo is None or (repo.private and not self.known):
                return self.refuse(404 if self.known else 401, "Repository not found", "RepoNotFound")
            if self.command == "POST" and not self.known:
                return self.refuse(403, "Forbidden")
            if not rest or rest[0] == "revision":
                files = [{"rfilename": n, "size": len(d)} for n, d in sorted(repo.files.items())]
                facts = {"id": name, "sha": repo.sha, "private": repo.private, "siblings": files, "tags": []}
                return self.answer(200, facts)
            if rest[0] == "tree":
                return self.answer(200, [self.entry(n, d) for n, d in sorted(repo.files.items())])
            if rest[0] == "resolve":
                return self.resolve(repo, "/".join(rest[2:]))
            if rest[0] == "preupload":
                large = (".safetensors", ".onnx", ".data")
                files = [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                    }
                    for f in json.loads(data)["files"]
                ]
                return self.answer(200, {"files": files})
            if rest[:3] == ["info", "lfs", "objects"]:
                objects = [
                    {**o, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{o['oid']}"}}}
                    for o in json.loads(data)["objects"]
                ]
                return self.answer(200, {"transfer": "basic", "objects": objects})
            if rest[0] == "commit":
                return self.commit(name, repo, [json.loads(line) for line in data.splitlines()])
            return self.refuse(404, f"the stand-in knows no {path}")

        def create(self, given: dict[str, Any]) -> None:
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            if not self.known:
                return self.refuse(401, "Invalid token")
            if name.startswith("others/"):
                return self.refuse(403, "You don't have the rights to create a model under the namespace others")
            if name in hub.repos:
                return self.refuse(409, "You already created this model repo")
            hub.repos[name] = Repo(given.get("visibility") == "private")
            return self.answer(200, {"url": f"{hub.endpoint}/{name}", "name": name, "id": name})

        def validate(self, content: str) -> None:
            head = yaml.safe_load(content.split("---")[1])
            faults = [{"message": '"model-index" must be a list'}] if "broken" in head.get("tags", []) else []
            return self.answer(400 if faults else 200, {"errors": faults, "warnings": []})

        def entry(self, name: str, data: bytes) -> dict[str, Any]:
            return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

        def resolve(self, repo: Repo, name: str) -> None:
            if name not in repo.files:
                return self.refuse(404, "Entry not found", "EntryNotFound")
            data = repo.files[name]
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(200, body=data, ETag=tag, X_Repo_Commit=repo.sha, length=str(len(data)))

        def commit(self, name: str, repo: Repo, rows: list[dict[str, Any]]) -> None:
            head = next(r["value"] for r in rows if r["key"] == "header")
            if head.get("parentCommit") not in (None, repo.sha):
                return self.refuse(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.files)
            for row in rows:
                value = row["value"]
                if row["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if row["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                if row["key"] == "deletedFile":
                    del files[value["path"]]
            repo.files = files
            repo.commits.append(head)
            return self.answer(200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

        do_GET = do_POST = do_PUT = do_HEAD = route

    return Handler


@contextmanager
def stand_in() -> Iterator[Hub]:
    """The stand-in, while it runs."""
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
