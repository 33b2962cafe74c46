"""A registry of containers and a hub of models that keep what they are given in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""Of whatever is on the hub."""


class Server(BaseHTTPRequestHandler):
    """What a registry and the hub have in common: one dictionary of contents, and a log."""

    protocol_version = "HTTP/1.1"
    requests: ClassVar[list[str]]
    contents: ClassVar[dict[str, Any]]

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        self.requests.append(f"{self.command} {self.path} {self.headers.get('Range') or ''}".strip())
        return parsed

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, content: bytes | None, **headers: str) -> None:
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        if start := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            return self.answer(206, content[int(start[1]) :], **headers)
        return self.answer(200, content, **headers)


class Registry(Server):
    """Of the distribution specification, what pushing and pulling blobs and manifests needs."""

    def do_GET(self) -> None:
        self.send_file(self.contents.get(self.path), Content_Type="application/json")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.body()
        self.contents[f"upload {self.path}"] = b""
        self.answer(202, Location=f"{self.path}session")

    def do_PATCH(self) -> None:
        upload = f"upload {self.path.removesuffix('session')}"
        self.contents[upload] += self.body()
        self.answer(202, Location=self.path)

    def do_PUT(self) -> None:
        content, (path, _, query) = self.body(), self.path.partition("?digest=")
        if not query:
            self.contents[self.path] = content
            return self.answer(201)
        content = self.contents.pop(f"upload {path.removesuffix('session')}") + content
        digest = query.replace("%3A", ":")
        if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
            return self.answer(400)
        self.contents[path.removesuffix("uploads/session") + digest] = content
        return self.answer(201)


class Hub(Server):
    """Of the hub's interface, what committing small files and fetching them needs."""

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/owner/name"):
            facts: Any = {"id": "owner/name", "sha": COMMIT, "tags": [], "private": False}
            if "/tree/" in self.path:
                facts = [
                    {"type": "file", "path": name, "size": len(content or b""), "oid": name}
                    for name, content in self.contents.items()
                ]
            return self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")
        name = self.path.partition(f"/resolve/{COMMIT}/")[2]
        etag = hashlib.sha256(self.contents.get(name) or b"").hexdigest()
        return self.send_file(self.contents.get(name), ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.body()
        answers: dict[str, Any] = {"url": "https://huggingface.co/owner/name", "success": True}
        if "/preupload/" in self.path:
            paths = [item["path"] for item in json.loads(body)["files"]]
            answers["files"] = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths
            ]
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            written = [line["value"] for line in lines if line["key"] == "file"]
            self.contents.update({item["path"]: base64.b64decode(item["content"]) for item in written})
            answers |= {
                "commitUrl": f"https://huggingface.co/owner/name/commit/{COMMIT}",
                "commitOid": COMMIT,
            }
        return self.answer(200, json.dumps(answers).encode(), Content_Type="application/json")


@contextmanager
def serving(kind: type[Server]) -> Iterator[tuple[str, type[Server]]]:
    """Its host and port, and its class, which holds what it knows."""
    handler = type(kind.__name__, (kind,), {"requests": [], "contents": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
