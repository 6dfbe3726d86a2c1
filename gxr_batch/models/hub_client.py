"""The HTTP client with which the hub's library downloads: the environment's proxies, and no answer taken on trust.

The library makes paths of what a hub answers: commits, ETags and file names. A hub, or whatever answers in its place,
could have it write outside of its cache.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2
import socksio
from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import _http

from gxr_batch.cells import quoted
from gxr_batch.models.network import connection

_SECONDS = 60.0  # without a byte; the library waits forever for its answers in JSON
_MOST_BYTES = 64 * 2**20
_MOST_PAGES = 1000
_NAME = re.compile(r"[A-Za-z0-9_][\w.+=:-]{0,199}", re.ASCII)  # of one file or folder, whatever it is joined to


class WrongAnswer(Exception):
    """The hub's answer cannot be used; the text continues a sentence that begins with "the hub"."""


class Watched:
    """What the hub answered last: `answer` is empty until it answers."""

    answer = ""
    pages = 0


@contextmanager
def watched_client() -> Iterator[Watched]:
    """Have the hub's library use this client inside the block. A bad answer raises WrongAnswer."""
    watched = Watched()
    before = _http._GLOBAL_CLIENT_FACTORY  # a program that uses gxr-batch may have set another
    set_client_factory(lambda: _client(watched))
    try:
        yield watched
    finally:
        set_client_factory(before)


def _client(watched: Watched) -> httpx2.Client:
    def look(response: httpx2.Response) -> None:
        _look_at(response, watched)

    return httpx2.Client(
        transport=_ByHost(),
        follow_redirects=True,
        trust_env=False,
        headers={"accept-encoding": "identity"},  # a small answer could expand to a huge one
        event_hooks={"request": [_before_request], "response": [look]},
    )


class _ByHost(httpx2.BaseTransport):
    """One transport for each host, since the hub sends downloads on to its storage, and NO_PROXY may name either."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transports: dict[str, httpx2.HTTPTransport] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        host = f"{url.scheme}://{url.netloc.decode('ascii')}"
        with self._lock:
            if host not in self._transports:
                self._transports[host] = httpx2.HTTPTransport(**connection(host))
        try:
            return self._transports[host].handle_request(request)
        except socksio.ProtocolError as error:  # not converted by httpx2
            raise httpx2.ProxyError(str(error), request=request) from error

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


class _Limited(httpx2.SyncByteStream):
    """A response's bytes, up to a limit."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._stream:
            size += len(chunk)
            if size > _MOST_BYTES:
                raise WrongAnswer(f"sent more than {_MOST_BYTES // 2**20} MiB where a list of files was asked for")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _before_request(request: httpx2.Request) -> None:
    if constants.is_offline_mode():
        raise OfflineModeIsEnabled("offline mode")
    timeout = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        kind: _SECONDS if timeout.get(kind) is None else timeout[kind] for kind in ("connect", "read", "write", "pool")
    }


def _look_at(response: httpx2.Response, watched: Watched) -> None:
    """Raise WrongAnswer before the library makes a path of anything that is none."""
    kind = response.headers.get("content-type", "")
    watched.answer = f"HTTP {response.status_code}" + (f", {quoted(kind)}" if kind else "")
    _check_headers(response)
    path = response.request.url.path
    if response.status_code != httpx2.codes.OK or "/api/models/" not in path:
        return
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise WrongAnswer("compressed what was asked for plain")
    response.stream = _Limited(response.stream)
    response.read()
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        raise WrongAnswer(f"sent no JSON where JSON was asked for ({watched.answer})") from None
    if "/tree/" in path:
        _check_tree(answer)
        _check_next(response, watched)
    else:
        _check_repository(answer)


def _check_headers(response: httpx2.Response) -> None:
    commit = response.headers.get("x-repo-commit")
    if commit is not None and not _NAME.fullmatch(commit):
        raise WrongAnswer(f"named a commit that is none: {quoted(commit)}")
    tags = [response.headers.get("x-linked-etag")]
    if response.request.method == "HEAD":  # the storage's ETag on the download itself is not used
        tags.append(response.headers.get("etag"))
    for tag in filter(None, tags):
        if not _NAME.fullmatch(tag.lstrip("W/").strip('"')):  # as the library makes a file name of it
            raise WrongAnswer(f"sent an ETag that cannot be used: {quoted(tag)}")


def _check_repository(answer: Any) -> None:
    if not isinstance(answer, dict) or not isinstance(answer.get("id"), str):
        raise WrongAnswer("did not describe a repository (an object with id and sha)")
    commit = answer.get("sha")
    if not isinstance(commit, str) or not _NAME.fullmatch(commit):
        raise WrongAnswer(f"did not name a commit: sha = {quoted(commit)}")


def _check_tree(answer: Any) -> None:
    if not isinstance(answer, list) or not all(map(_is_entry, answer)):
        raise WrongAnswer("did not send a list of files (each with type, path, size and oid)")
    for entry in answer:
        path = entry["path"]
        if not path.isprintable() or "\\" in path or {"", ".", ".."} & set(path.split("/")):
            raise WrongAnswer(f"named a file that would be outside of its repository: {quoted(path)}")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return False
    if entry.get("type") != "file":
        return isinstance(entry.get("type"), str)
    size = entry.get("size")
    return type(size) is int and 0 <= size < 2**63 and isinstance(entry.get("oid"), str)


def _check_next(response: httpx2.Response, watched: Watched) -> None:
    """The library asks for the next page with the token, wherever it is."""
    following = response.links.get("next", {}).get("url")
    if following is None:
        return
    watched.pages += 1
    try:
        same = urlsplit(following)[:2] == urlsplit(str(response.request.url))[:2]
    except ValueError:
        same = False
    if not same or watched.pages > _MOST_PAGES:
        raise WrongAnswer(
            "continues its list of files on another host" if not same else "sent an endless list of files"
        )
