"""As much of the Hub's HTTP API as an upload, a download and a card need, in memory, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


class FakeHub:
    """Repositories by name: files by path. `log` has every request."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.log: list[tuple[str, str]] = []
        self.url = ""

    def sha(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        self.log.append((method, path))
        if (method, path) == ("POST", "/api/repos/create"):
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            exists = name in self.repositories
            self.repositories.setdefault(name, {})
            return (409 if exists else 200), {}, json.dumps({"url": f"{self.url}/{name}"}).encode()
        if path == "/api/validate-yaml":
            return 200, {}, json.dumps({"errors": [], "warnings": []}).encode()
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|revision|tree)/[^/]+", path)
        if match:
            return self._api(match[1], match[2], body)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if match and match[2] in self.repositories.get(match[1], {}):
            content = self.repositories[match[1]][match[2]]
            etag = hashlib.sha1(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.sha(match[1])}
            return 200, headers, content
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    def _api(self, name: str, verb: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        files = self.repositories.get(name)
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        reply: Any
        if verb == "preupload":
            requested = json.loads(body)["files"]
            reply = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in requested]}
        elif verb == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            reply = {"success": True, "commitOid": self.sha(name), "commitUrl": f"{self.url}/{name}/commit/main"}
        elif verb == "tree":
            reply = [
                {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
                for path, content in files.items()
            ]
        else:
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            reply = {"id": name, "sha": self.sha(name), "siblings": siblings, "private": False, "tags": []}
            reply |= {"downloads": 0, "likes": 0}
        return 200, {}, json.dumps(reply).encode()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub on a free port of this machine, until the block ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, headers, content = hub.answer(self.command, unquote(urlparse(self.path).path), body)
            self.send_response(code)
            for key, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _serve

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
