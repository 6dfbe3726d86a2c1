"""The api engine's stream: prompts go to an event loop in a thread, completions and pieces of text return by a queue.

This keeps the stream a plain generator; on_text is called in the caller's thread. Failed requests are handled in
retries.py.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from gxr_batch.engines.api.openai_client import Client
from gxr_batch.engines.api.outage import Outage
from gxr_batch.engines.api.retries import Calls
from gxr_batch.engines.api.server_faults import Unusable
from gxr_batch.engines.base import EngineInfo, Pulse, Say, StopRequest
from gxr_batch.errors import EngineUnavailable
from gxr_batch.records import Completion, Key, Prompt

_PULSE_SECONDS = 0.5
_TICK_SECONDS = 0.05
_CLOSE_SECONDS = 2.0


class _Ended(NamedTuple):
    """A prompt whose request has ended, with or without an answer."""

    key: Key
    future: Future[Completion]


# What the loop passes on: rows that have ended, and calls that show a piece of text.
_Events = queue.SimpleQueue[_Ended | Callable[[], None]]


@contextmanager
def loop_in_thread(client: Client) -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop alongside the caller. At the end close the client and cancel all running requests."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def wait_for_the_end() -> None:
        end = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), end))
        await end.wait()
        await client.close()

    # A daemon: a DNS lookup that hangs must not keep the process from ending.
    thread = threading.Thread(target=lambda: asyncio.run(wait_for_the_end()), name="gxr-batch-api", daemon=True)
    thread.start()
    loop, end = started.result()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(_CLOSE_SECONDS)


class ApiSession:
    """A server that answered a test question. One stream at a time."""

    def __init__(
        self, info: EngineInfo, loop: asyncio.AbstractEventLoop, calls: Calls, outage: Outage, say: Say
    ) -> None:
        self.info = info
        self._loop, self._calls, self._outage, self._say = loop, calls, outage, say
        self._tokens = 0
        self._reported_no_streams = False

    def stream(self, prompts: Iterator[Prompt], stop: StopRequest) -> Iterator[Completion | Pulse]:
        """Ask for every prompt. Raises EngineUnavailable if none can be answered, ApiOutage if the server is down."""
        events: _Events = queue.SimpleQueue()
        flight: dict[Key, Future[Completion]] = {}
        pulsed, exhausted = time.monotonic(), False
        try:
            while True:
                while not exhausted and len(flight) < self.info.slots and stop.admitting:
                    prompt = next(prompts, None)
                    exhausted = prompt is None
                    if prompt is not None:
                        flight[prompt.key] = self._start(prompt, events)
                if stop.must_return(time.monotonic()) or not flight:
                    return
                self._outage.look()
                if (ended := self._next(events)) is not None:
                    del flight[ended.key]
                    yield self._completed(ended)
                if time.monotonic() - pulsed >= _PULSE_SECONDS:
                    pulsed = time.monotonic()
                    yield Pulse(self._tokens, len(flight), retries=self._calls.retries)
        finally:
            for future in flight.values():
                future.cancel()

    def _start(self, prompt: Prompt, events: _Events) -> Future[Completion]:
        if (show := prompt.on_text) is not None:
            prompt = prompt._replace(on_text=lambda text: events.put(partial(show, text)))
        future = asyncio.run_coroutine_threadsafe(self._calls.row(prompt, time.monotonic()), self._loop)
        future.add_done_callback(lambda done: events.put(_Ended(prompt.key, done)))
        return future

    def _next(self, events: _Events) -> _Ended | None:
        """Return the next prompt that has ended, if one does within a tick; pieces of text are shown meanwhile."""
        try:
            event = events.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            return None
        if isinstance(event, _Ended):
            return event
        event()
        return None

    def _completed(self, ended: _Ended) -> Completion:
        try:
            completion = ended.future.result()
        except Unusable as fault:
            raise EngineUnavailable(
                f"The server {fault.what}.", where=self._outage.place, next_step=fault.next_step
            ) from None
        self._tokens += completion.new_tokens or 0
        if not self._calls.streams and not self._reported_no_streams:
            self._reported_no_streams = True
            self._say("The server does not stream: texts are shown once they are complete.")
        return completion
