"""A small hub on the loopback address: repositories of model files, as huggingface_hub asks for them."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The one commit of every repository; "main" and "v1" name it."""


@dataclass
class Hub:
    """The hub.

    Args:
        repositories: directory of each repository, by its name.
        gated: names of repositories whose files need a token.
        cut: bytes that are missing from each file of this name, though its length is told in full.
        requests: method and path of all requests.
    """

    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def asked_for(self) -> set[str]:
        """The names of the files that were sent."""
        sent = [request for request in self.requests if request.startswith("GET ") and "/resolve/" in request]
        return {request.rpartition("/")[2] for request in sent}


@contextmanager
def serve_hub(hub: Hub) -> Iterator[Hub]:
    """Serve a hub during a block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *args: Any) -> None:
            pass

        def _answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
                name, kind, revision = found.groups()
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                name, revision, kind = found.groups()
            else:
                return self._send(404)
            if name not in hub.repositories:
                return self._send(404, {"X-Error-Code": "RepoNotFound"})
            if revision not in (None, "main", "v1", COMMIT):
                return self._send(404, {"X-Error-Code": "RevisionNotFound"})
            root = hub.repositories[name]
            files = {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
            if kind == "tree":
                entries = [
                    {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}
                    for file, content in files.items()
                ]
                return self._send(200, content=json.dumps(entries).encode())
            if kind in (None, "revision"):
                siblings = [{"rfilename": file} for file in files]
                about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
                return self._send(200, content=json.dumps(about).encode())
            if kind not in files:
                return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            if name in hub.gated and "authorization" not in self.headers:
                return self._send(403, {"X-Error-Code": "GatedRepo"})
            content = files[kind]
            headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
            if self.command == "GET":
                content = content[: len(content) - hub.cut.get(kind, 0)]
            self._send(200, headers, content)

        def _send(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
