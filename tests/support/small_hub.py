"""A hub on loopback that serves repositories from memory, and answers wrongly on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEXT_COMMIT = COMMIT[::-1]


class Answer(NamedTuple):
    """One response; a body that is not bytes is sent as JSON."""

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = {}


# By a part of the path.
REFUSALS = {
    "/gated": Answer(403, b"", {"X-Error-Code": "GatedRepo"}),
    "/teapot": Answer(418),
    "/stale-token": Answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "/no-such": Answer(404, b"", {"X-Error-Code": "RevisionNotFound"}),
}
Change = Callable[[str, Answer], Answer]


class SmallHub:
    """A context: the hub runs inside it. `url` is its address, `requests` the paths that were asked for.

    `change` gets the path and the right answer of each request, and returns what is sent. With `busy`, somebody pushes
    to a repository right after its newest commit was asked for.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], change: Change = lambda path, right: right) -> None:
        self.repositories, self.change = repositories, change
        self.requests: list[str] = []
        self.busy = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> SmallHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> Answer:
        """The part of the hub's HTTP that a snapshot uses: a revision's commit, its files, and the three refusals."""
        name = next((name for name in self.repositories if f"/{name}" in path), "")
        files = self.repositories.get(name, {})
        pushed = NEXT_COMMIT in path or (self.busy and self.requests.count(path) > 1 and "main" in path)
        commit = NEXT_COMMIT if pushed else COMMIT
        refusal = next((refused for part, refused in REFUSALS.items() if part in path), None)
        if refusal or not name:
            return refusal or Answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            return Answer(200, [entry(name, body) for name, body in files.items()])
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in files]
            return Answer(200, {"id": name, "sha": commit, "siblings": siblings})
        body = files[path.rpartition("/")[2]]
        return Answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit})


def entry(name: str, body: bytes) -> dict[str, Any]:
    """Return a file as the list of a repository's files has it."""
    return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}


def _handler(hub: SmallHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(path)
            status, body, headers = hub.change(path, hub.answer(path))
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    return Handler
