"""A Hugging Face Hub on this machine that knows what an upload calls, and keeps what it is sent.

Large files come by the protocol of Git LFS (``basic``), small ones inside the commit, as on the
real one without Xet.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

WRITER, READER = "hf_writer", "hf_reader"
LFS = (".safetensors", ".pth", ".tar")


class FakeHub(ThreadingHTTPServer):
    """Repositories by their path (``datasets/OWNER/NAME`` for data sets), and what was called."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []

    def handle_request_of(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        self.calls.append(f"{method} {path}")
        if token not in (WRITER, READER):
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "someone"}
        if method == "PUT" and (stored := re.fullmatch(r"/lfs/(\w{64})", path)):
            if hashlib.sha256(body).hexdigest() != stored[1]:
                return 400, {"error": "other bytes than were announced"}
            self.objects[stored[1]] = body
            return 200, {}
        if path == "/api/validate-yaml":
            document = json.loads(body)
            front = yaml.safe_load(document["content"].split("---\n")[1])
            errors = [] if front.get("license") else [{"message": "no license"}]
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            prefix = "datasets/" if asked.get("type") == "dataset" else ""
            repo = f"{prefix}{asked['organization']}/{asked['name']}"
            if repo in self.files:
                return 409, {"error": "exists", "url": f"{self.url}/{repo}"}
            if token == READER:
                return 403, {"error": "forbidden"}
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.add(repo, private=private)
            return 200, {"url": f"{self.url}/{repo}"}
        return self._of_repository(method, path, token, body)

    def add(self, repo: str, *, private: bool) -> None:
        self.private[repo], self.files[repo] = private, {}

    def _of_repository(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        api = re.fullmatch(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/(\w+)/main)?", path)
        lfs = re.fullmatch(r"/((?:datasets/)?[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path)
        if lfs:
            repo = lfs[1]
        elif api:
            repo = ("datasets/" if api[1] == "dataset" else "") + api[2]
        else:
            return 404, {"error": f"{method} {path} is not known here"}
        if repo not in self.files:
            return 404, {"error": "no such repository"}
        if api and api[3] is None:
            return 200, {
                "id": repo.removeprefix("datasets/"),
                "private": self.private[repo],
                "siblings": [{"rfilename": name} for name in self.files[repo]],
            }
        if token == READER:
            return 403, {"error": "forbidden"}
        if lfs:
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if api and api[3] == "preupload":
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        method, path = self.command, self.path.partition("?")[0]
        if path.startswith("/lfs/"):  # a storage of its own, which gets no token
            token = WRITER
        status, content = self.server.handle_request_of(method, path, token, body)
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *_: object) -> None:
        pass
