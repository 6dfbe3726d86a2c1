"""One question to one server, through the `openai` client on our own connection.

The library implements the protocol and reads streams. The limits are set here: no request goes to a host that the job
does not name, no header comes from the environment, no more is read than an answer can need, and no error text is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx2
import openai

from gxr_batch.engines.api.answers import Answer, StreamedAnswer, whole_answer
from gxr_batch.engines.api.server_faults import EXPECTED, Trouble, fault_of_error, fault_of_status
from gxr_batch.job import ApiSection
from gxr_batch.job.sampling import Sampling
from gxr_batch.job.units import parse_duration
from gxr_batch.models.network import connection
from gxr_batch.records import Prompt

ROUTER = "https://router.huggingface.co"
# What a server may refuse, the most expensive first, and the [sampling] key behind it. The repetition penalty has two
# names: vLLM and SGLang use the first, llama.cpp the second.
OPTIONAL = {
    "seed": "seed",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
}
_ROLES = {"system": "system", "user": "user", "model": "assistant"}
_CONNECT_SECONDS = 10.0
# An answer's JSON, and its pieces when streamed, take a few hundred bytes per token.
_BYTES_AT_LEAST, _BYTES_A_TOKEN = 2**20, 4096


class Client:
    """One server to ask. Belongs to one event loop; close it there.

    `taken` are the optional parameters that are sent, `answered` is True once there was a valid answer. Raises
    Unusable if the address is invalid, ModelUnavailable if the environment's proxy or certificates are.
    """

    def __init__(self, settings: ApiSection, token: str | None, sampling: Sampling) -> None:
        self._token, self._sampling = token, sampling
        self._seconds = parse_duration(settings.timeout) or 0.0
        self._most_bytes = _BYTES_AT_LEAST + _BYTES_A_TOKEN * sampling.max_new_tokens
        self.routed = not settings.base_url
        pinned = self.routed and settings.provider != "auto"
        self._model = f"{settings.model}:{settings.provider}" if pinned else settings.model
        self.taken = tuple(OPTIONAL)
        self.answered = False
        address = _api_root(settings.base_url or ROUTER)
        self._connection = self._connect(address, settings.concurrency)
        try:
            self._library = openai.AsyncOpenAI(
                api_key=token or "none",  # the library requires one; _only_our_headers removes it
                base_url=address,
                timeout=httpx2.Timeout(self._seconds, connect=min(_CONNECT_SECONDS, self._seconds)),
                max_retries=0,
                http_client=self._connection,
            )
        except httpx2.InvalidURL as error:
            raise fault_of_error(error, answered=False) from None
        # Undo what OPENAI_LOG sets at import.
        logging.getLogger("openai").setLevel(logging.WARNING)

    async def ask(self, prompt: Prompt) -> Answer:
        """Return the answer. Raises Fault."""
        async with self._asking():
            whole = await self._library.chat.completions.create(**self._request(prompt), stream=False)
            answer = whole_answer(whole, prompt.max_new_tokens)
        self.answered = True
        return answer

    async def stream(self, prompt: Prompt, on_text: Callable[[str], None]) -> Answer | None:
        """Return the answer after passing on its pieces; None if the server does not stream. Raises Fault."""
        streamed = StreamedAnswer()
        async with self._asking():
            request = self._request(prompt) | {"stream_options": {"include_usage": True}}
            async with await self._library.chat.completions.create(**request, stream=True) as pieces:
                async for piece in pieces:
                    if text := streamed.take(piece):
                        on_text(text)
            answer = streamed.answer(prompt.max_new_tokens)
        self.answered = self.answered or answer is not None
        return answer

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.aclose()

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Apply the time limit to a request. Raises every failure as Fault."""
        try:
            async with asyncio.timeout(self._seconds):
                yield
        except EXPECTED as error:
            raise fault_of_error(error, answered=self.answered) from None

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        sampling = self._sampling
        request: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": _ROLES[turn.role], "content": turn.text} for turn in prompt.messages.turns],
            "temperature": sampling.temperature,
            "max_tokens": prompt.max_new_tokens,
        }
        optional = dict.fromkeys(("repetition_penalty", "repeat_penalty"), sampling.repetition_penalty)
        if not sampling.greedy:
            request["top_p"] = sampling.top_p
            # top_k also when it is off: the server may have its own default
            optional |= {"top_k": sampling.top_k, "seed": prompt.row_seed}
        return request | {"extra_body": {name: value for name, value in optional.items() if name in self.taken}}

    def _connect(self, address: str, concurrency: int) -> httpx2.AsyncClient:
        """Return a connection that follows no redirect."""
        # No compression: a small response could expand to a huge text.
        headers = {"accept": "application/json", "accept-encoding": "identity", "content-type": "application/json"}
        return httpx2.AsyncClient(
            **connection(address),
            follow_redirects=False,
            headers=headers | ({"authorization": f"Bearer {self._token}"} if self._token else {}),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency),
            event_hooks={"request": [self._only_our_headers], "response": [self._look_at]},
        )

    async def _only_our_headers(self, request: httpx2.Request) -> None:
        # The library adds details of this machine, and OPENAI_CUSTOM_HEADERS, OPENAI_ORG_ID and similar variables.
        ours = self._connection.build_request(request.method, request.url, content=request.content)
        request.headers = ours.headers

    async def _look_at(self, response: httpx2.Response) -> None:
        if response.status_code != httpx2.codes.OK:
            raise fault_of_status(
                response.status_code, response.headers, answered=self.answered, with_token=self._token is not None
            )
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
                raise Trouble("sent far more than an answer", nonsense=True)
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _api_root(address: str) -> str:
    """Return the URL before /chat/completions; a job may name the server, its /v1, or the full URL."""
    root = address.removesuffix("/chat/completions")
    return root if root != address or root.endswith("/v1") else f"{root}/v1"
