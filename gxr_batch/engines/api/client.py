"""Asks a server one question: huggingface_hub's client for what to send where, a connection of our own for how.

The library's own connection follows redirects and reads whatever comes; ours sends nothing to a host that the job does
not name, reads no more than an answer can need, and never looks into the text of an error.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
from huggingface_hub import AsyncInferenceClient, set_async_client_factory
from huggingface_hub import errors as hub
from huggingface_hub.utils._http import default_async_client_factory

from gxr_batch.engines.api.answers import Answer, Pieces, whole_answer
from gxr_batch.engines.api.faults import Fault, HttpStatus, TooLarge, Trouble, fault_of
from gxr_batch.job import ApiSection
from gxr_batch.job.sampling import Sampling
from gxr_batch.job.units import parse_duration

ROUTER = "https://router.huggingface.co"
# What a server may refuse to know, the dearest first, and the key of [sampling] behind it. Those that know a repetition
# penalty know it by one of two names: vLLM and SGLang by the first, llama.cpp by the second.
OPTIONAL = {
    "seed": "seed",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
}
_CONNECT_SECONDS = 10.0
# An answer's JSON, and its pieces when streamed, are a few hundred bytes a token.
_BYTES_AT_LEAST, _BYTES_A_TOKEN = 2**20, 4096
# What a request can end in, the library's own reading of a wrong answer included.
_EXPECTED = (
    Fault,
    HttpStatus,
    TooLarge,
    hub.HfHubHTTPError,
    hub.OfflineModeIsEnabled,
    hub.TextGenerationError,
    httpx2.HTTPError,
    httpx2.InvalidURL,
    httpx2.StreamError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RecursionError,
)


class Question(NamedTuple):
    """What one request asks: chat messages, and the numbers that are its own."""

    messages: list[dict[str, str]]
    seed: int
    max_tokens: int


class Client:
    """A server, as far as questions and answers go. Belongs to one event loop; close it there."""

    def __init__(self, settings: ApiSection, token: str | None, sampling: Sampling) -> None:
        self._settings, self._token, self._sampling = settings, token, sampling
        self._seconds = parse_duration(settings.timeout) or 0.0
        self._most_bytes = _BYTES_AT_LEAST + _BYTES_A_TOKEN * sampling.max_new_tokens
        self._library = self._library_client()
        self.taken = tuple(OPTIONAL)
        self.heard = False

    async def ask(self, question: Question, *, answered: bool) -> Answer:
        """Return the answer. Raises Fault; `answered` says whether the server gave a sound answer before."""
        try:
            async with asyncio.timeout(self._seconds):
                data = await self._library.chat_completion(**self._request(question))
            return whole_answer(data, question.max_tokens)
        except _EXPECTED as error:
            raise self._fault(error, answered=answered) from None

    async def stream(self, question: Question, on_text: Callable[[str], None], *, answered: bool) -> Answer | None:
        """Return the answer after handing on its pieces; None where the server does not stream. Raises Fault."""
        pieces = Pieces()
        # One library client for each: it keeps every streamed response open until it is closed itself.
        client = self._library_client()
        try:
            async with asyncio.timeout(self._seconds), client:
                parts = await client.chat_completion(
                    **self._request(question), stream=True, stream_options=cast(Any, {"include_usage": True})
                )
                async for part in cast(AsyncIterator[Any], parts):
                    if text := pieces.take(part):
                        on_text(text)
            return pieces.answer(question.max_tokens)
        except _EXPECTED as error:
            raise self._fault(error, answered=answered) from None

    async def close(self) -> None:
        """Close the connections."""
        await cast(Any, self._library).close()  # the library gives it no types

    def _fault(self, error: Exception, *, answered: bool) -> Fault:
        return fault_of(error, answered=answered, heard=self.heard, with_token=self._token is not None)

    def _request(self, question: Question) -> dict[str, Any]:
        sampling = self._sampling
        extra: dict[str, Any] = {}
        wanted: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": question.max_tokens}
        if not sampling.greedy:
            wanted["top_p"] = sampling.top_p
            extra["top_k"] = sampling.top_k  # also where it is off: a server's own default may not be
            wanted["seed"] = question.seed
        extra["repetition_penalty"] = extra["repeat_penalty"] = sampling.repetition_penalty
        own = {name: value for name, value in wanted.items() if name not in OPTIONAL or name in self.taken}
        extra = {name: value for name, value in extra.items() if name in self.taken}
        return {"messages": question.messages, "model": self._settings.model, **own, "extra_body": extra}

    def _library_client(self) -> AsyncInferenceClient:
        settings = self._settings
        # Without a token of its own the library sends the Hugging Face token to any server: None takes the header out.
        headers = {} if self._token else cast(dict[str, str], {"authorization": None})
        client = AsyncInferenceClient(
            base_url=settings.base_url or None,
            provider=None if settings.base_url else cast(Any, settings.provider),
            token=self._token,
            headers=headers,
        )
        client.timeout = cast(Any, httpx2.Timeout(self._seconds, connect=min(_CONNECT_SECONDS, self._seconds)))
        return client

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """Make the library use our connection inside the block. Its switch is one for the whole process."""
        set_async_client_factory(self._connection)
        try:
            yield
        finally:
            set_async_client_factory(default_async_client_factory)

    def _connection(self) -> httpx2.AsyncClient:
        """Return a connection that goes to the named host alone."""
        host = urlsplit(self._settings.base_url or ROUTER).hostname or ""
        return httpx2.AsyncClient(
            follow_redirects=False,
            # No compression: a small response may then be a huge text.
            headers={"accept-encoding": "identity"},
            mounts={f"all://[{host}]" if ":" in host else f"all://{host}": None} if is_loopback(host) else None,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self._settings.concurrency),
            event_hooks={"response": [self._look_at]},
        )

    async def _look_at(self, response: httpx2.Response) -> None:
        self.heard = True
        if response.status_code != httpx2.codes.OK:
            raise HttpStatus(response.status_code, response.headers)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise Trouble("compressed what was asked for plain", nonsense=True)
        response.stream = _Limited(cast(httpx2.AsyncByteStream, response.stream), self._most_bytes)


class _Limited(httpx2.AsyncByteStream):
    """A response's bytes, up to a limit."""

    def __init__(self, stream: httpx2.AsyncByteStream, most: int) -> None:
        self._stream, self._most = stream, most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > self._most:
                raise TooLarge
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, which no proxy can reach for us."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_of(url: str) -> bool:
    """Return whether the environment sends requests for this address through a proxy."""
    parts = urlsplit(url)
    proxies, host = getproxies(), parts.hostname or ""
    named = parts.scheme in proxies or "all" in proxies
    return named and not is_loopback(host) and not proxy_bypass(host)
