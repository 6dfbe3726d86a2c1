"""A server on loopback that speaks chat completions and misbehaves on demand: stalls, drops, overloads, lies, refuses.

`FaultServer(behave)` asks `behave(body, number)` what to do with each request (number counts from 1), and records what
it was sent. Without a fault it answers like a model that repeats the last words of the prompt.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Act:
    """What to do with one request: wait `delay` seconds, then send `body` (bytes as they are, else JSON).

    `cut` closes the connection after that many bytes of the body; `pieces` are sent one by one, `gap` seconds apart;
    `endless` sends the body again and again.
    """

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    pieces: Sequence[bytes] | None = None
    gap: float = 0.0
    endless: bool = False


@dataclass(frozen=True)
class Seen:
    """One request as received."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    at: float


Behave = Callable[[dict[str, Any], int], Act | None]


def completion(text: str | None, *, reason: Any = "stop", usage: Any = None, **more: Any) -> dict[str, Any]:
    """Return the JSON of a chat completion."""
    message = {"role": "assistant", "content": text}
    answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    answer |= {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}
    return answer | ({"usage": usage} if usage is not None else {}) | more


def repeated(body: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a request with the last words of its prompt, up to its token limit."""
    said = body["messages"][-1]["content"].split()
    kept = said[: body["max_tokens"]]
    usage = {"prompt_tokens": len(said) + 4, "completion_tokens": len(kept), "total_tokens": len(said) + 4 + len(kept)}
    return completion(" ".join(kept), reason="stop" if len(kept) == len(said) else "length", usage=usage)


def streamed(texts: Sequence[str], *, reason: str | None = "stop", usage: Any = None, done: bool = True) -> list[bytes]:
    """Return the events of a streamed answer."""
    events = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": text}}]} for text in texts]
    if reason:
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if usage:
        events.append({"choices": [], "usage": usage})
    lines = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    return lines + ([b"data: [DONE]\n\n"] if done else [])


class FaultServer:
    """A context: the server runs inside it. `url` is its base_url, `requests` what it was sent."""

    def __init__(self, behave: Behave = lambda body, number: None, tls: ssl.SSLContext | None = None) -> None:
        self.behave = behave
        self.requests: list[Seen] = []
        self.dropped = 0
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Quiet(("127.0.0.1", 0), _handler(self))
        self.port = int(self._server.server_address[1])
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/v1"
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def rows(self) -> list[Seen]:
        """The requests for rows, without the engine's test questions."""
        return [seen for seen in self.requests if seen.body.get("messages", [{}])[-1].get("content") != "Say OK."]

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2)

    def note(self, seen: Seen) -> int:
        with self._lock:
            self.requests.append(seen)
            return len(self.requests)

    def pause(self, seconds: float) -> None:
        """Sleep, but not past the end of the server."""
        self._closing.wait(seconds)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report nothing: tests disconnect clients on purpose."""


def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10
        disable_nagle_algorithm = True  # otherwise every answer waits 40 ms for an acknowledgement

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.loads(raw)
            headers = {name.lower(): value for name, value in self.headers.items()}
            number = server.note(Seen(self.path, headers, body, time.monotonic()))
            act = server.behave(body, number) or Act(body=repeated(body))
            if act.delay:
                server.pause(act.delay)
            try:
                self._perform(act)
            except OSError:
                server.dropped += 1
                self.close_connection = True

        def _perform(self, act: Act) -> None:
            data = act.body if isinstance(act.body, bytes) else json.dumps(act.body).encode()
            if act.cut == 0:
                self.close_connection = True
                return
            self.send_response(act.status)
            for name, value in act.headers.items():
                self.send_header(name, value)
            if act.pieces is None and not act.endless:
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: act.cut])
                self.close_connection = act.cut is not None
                return
            self.send_header("Connection", "close")
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.close_connection = True
            for piece in act.pieces or ():
                self.wfile.write(piece)
                server.pause(act.gap)
            while act.endless and not server._closing.is_set():
                self.wfile.write(data)

    return Handler
