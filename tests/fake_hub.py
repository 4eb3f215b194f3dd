"""A Hub on the loopback: repositories in folders, with just the routes that the Hub library asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories by name; `sent` tells which files went out whole, in order, `asked` of which any part did."""

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    sent: list[tuple[str, str]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    @contextmanager
    def open(self) -> Iterator[FakeHub]:
        """Serve until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/([^/]+)|/tree/([^/]+))?", path):
            repo, revision = found[1], found[3] or found[4] or "main"
            if self.refused(repo, revision):
                return
            files = sorted(file for file in self.hub.repos[repo].iterdir() if file.is_file())
            if found[4]:
                rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _oid(f)} for f in files]
                self.send(json.dumps(rows).encode(), {"Content-Type": "application/json"}, body)
                return
            content: dict[str, object] = {
                "id": repo,
                "sha": COMMIT,
                "private": False,
                "gated": repo in self.hub.gated,
                "tags": [],
            }
            content |= {"downloads": 0, "likes": 0, "siblings": [{"rfilename": f.name} for f in files]}
            self.send(json.dumps(content).encode(), {"Content-Type": "application/json"}, body)
            return
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", path):
            repo, revision, name = found.groups()
            if self.refused(repo, revision):
                return
            file = self.hub.repos[repo] / name
            if not file.is_file():
                self.fail(404, "EntryNotFound")
                return
            self.hub.asked.append((repo, name))
            if body and "Range" not in self.headers:
                self.hub.sent.append((repo, name))
            headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            self.send(file.read_bytes(), headers, body)
            return
        self.fail(404, "RepoNotFound")

    def refused(self, repo: str, revision: str) -> bool:
        if repo not in self.hub.repos:
            self.fail(404, "RepoNotFound")
        elif repo in self.hub.gated:
            self.fail(403, "GatedRepo")
        elif revision not in ("main", COMMIT):
            self.fail(404, "RevisionNotFound")
        else:
            return False
        return True

    def fail(self, status: int, code: str) -> None:
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, self.command == "GET", status)

    def send(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers |= {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            content, status = content[start : end + 1], 206
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
