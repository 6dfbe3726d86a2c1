"""Asks until there is an answer: waits longer each time, listens to Retry-After, and finds out who is to blame.

A row that fails again and again is given up only where the server answers others, or a harmless question, before and
after its last try: then it is the row. Else it is the server, and rows wait for it (outage.py says how long). Fewer
requests are sent at a time while the server says that it has too much to do, and more again later.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, cast

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from gxr_batch.engines.api.answers import Answer
from gxr_batch.engines.api.openai_client import OPTIONAL, Client, Question
from gxr_batch.engines.api.outage import Outage
from gxr_batch.engines.api.server_faults import Refusal, Trouble, Unusable
from gxr_batch.job import ApiSection
from gxr_batch.settings import parse_duration

OnText = Callable[[str], None]
_Spent = Callable[[Trouble, int], Awaitable[bool]]
_LOOK_SECONDS = 0.02
_HARMLESS = Question([{"role": "user", "content": "Say OK."}], seed=1, max_tokens=1)


class Call(NamedTuple):
    """An answer and the request that brought it: seconds, their share, mean requests in flight, when it began.

    `first` are the seconds to the first piece of a text, None where it came whole.
    """

    answer: Answer
    seconds: float
    share: float
    in_flight: float
    first: float | None
    started_at: float
    started_at_ms: int
    finished_at_ms: int


class Calls:
    """All requests of a session. Lives on one event loop; `retries` may be read from anywhere."""

    def __init__(self, client: Client, settings: ApiSection, outage: Outage) -> None:
        self._client, self._outage = client, outage
        self._max_retries = settings.max_retries
        first, longest = parse_duration(settings.first_wait), parse_duration(settings.longest_wait)
        self._backoff = wait_random_exponential(multiplier=first or 0.0, max=longest or 0.0)
        self._throttle, self._meter = Throttle(settings.concurrency), Meter()
        self._asking_harmless = asyncio.Lock()
        self._last_answered = 0.0  # when the latest request that was answered began
        self.retries = 0
        self.streams = True

    async def row(self, question: Question, on_text: OnText | None) -> Call:
        """Return a row's answer. Raises Refusal or Trouble where the row has to fail, Unusable where all rows would."""
        alive = self._max_retries == 0  # whether the server answered others before this try

        async def spent(_: Trouble, tries: int) -> bool:
            nonlocal alive
            if tries < self._max_retries:
                return False
            before, alive = alive, await self._answers_others()
            return tries > self._max_retries and before and alive

        try:
            return await self._persist(question, on_text, spent)
        except Refusal as refusal:
            if refusal.suspicious:
                await self._answers_others()
            raise

    async def greet(self) -> list[str]:
        """Ask a harmless question, and return the keys of [sampling] that the server refuses to know.

        Waits for a server that is not there yet. Raises Unusable where no question of ours can be answered.
        """
        try:
            await self._persist(_HARMLESS, None, self._is_no_server)
        except Refusal:
            pass
        else:
            return []
        # One or more of them, or the request as such: start with none, and keep what does no harm.
        self._client.taken = ()
        try:
            await self._persist(_HARMLESS, None, self._is_no_server)
        except Refusal as refusal:
            if self._client.routed:  # the router knows no such model or provider
                what = refusal.what.replace("refused this row", "cannot be asked for this model")
                raise Unusable(what, "check api.provider, api.model and the token") from None
            what = refusal.what.replace("this row", "even a harmless question")
            raise Unusable(what, "check api.model, and that the server answers chat completions") from None
        for name in OPTIONAL:
            taken, self._client.taken = self._client.taken, (*self._client.taken, name)
            try:
                await self._persist(_HARMLESS, None, self._is_no_server)
            except Refusal:
                self._client.taken = taken
        known = {OPTIONAL[name] for name in self._client.taken}
        return [key for key in dict.fromkeys(OPTIONAL.values()) if key not in known]

    async def _is_no_server(self, trouble: Trouble, tries: int) -> bool:
        if tries > self._max_retries and trouble.nonsense and not self._client.answered:
            raise Unusable(trouble.what, "check api.base_url: it has to be an OpenAI-compatible server's") from None
        return False

    async def _answers_others(self) -> bool:
        """Return whether the server answers anything asked from now on. Raises Unusable where it refuses all."""
        now = time.monotonic()
        async with self._asking_harmless:
            if self._last_answered > now:
                return True
            try:
                await self._attempt(_HARMLESS, None)
            except Trouble:
                return False
            except Refusal as refusal:
                if refusal.suspicious:
                    what = refusal.what.replace("this row", "even a harmless question")
                    raise Unusable(what, "check api.model and what the token may do") from None
            return True

    async def _persist(self, question: Question, on_text: OnText | None, spent: _Spent) -> Call:
        async def stop(state: RetryCallState) -> bool:
            return await spent(_trouble(state), state.attempt_number)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Trouble),
            stop=cast(Any, stop),  # it may be a coroutine, which the types do not say
            wait=self._wait,
            before_sleep=self._count,
            reraise=True,
        )
        return await retrying(self._attempt, question, on_text)

    def _wait(self, state: RetryCallState) -> float:
        return max(self._backoff(state), _trouble(state).retry_after or 0.0)

    def _count(self, _: RetryCallState) -> None:
        self.retries += 1

    async def _attempt(self, question: Question, on_text: OnText | None) -> Call:
        async with self._throttle.entered():
            started_at, started_at_ms = time.monotonic(), int(time.time() * 1000)
            pieces_at: list[float] = []
            mark = self._meter.enter()
            try:
                answer = await self._answer(question, on_text, pieces_at)
            except Trouble as trouble:
                self._outage.trouble(trouble)
                if trouble.flooded:
                    self._throttle.flooded(started_at, trouble.retry_after)
                raise
            except Refusal:
                self._outage.alive()
                raise
            finally:
                seconds, share, in_flight = self._meter.leave(mark)
        self._outage.alive()
        self._last_answered = max(self._last_answered, started_at)
        self._throttle.answered()
        first = pieces_at[0] - started_at if pieces_at else None
        finished_at_ms = int(time.time() * 1000)
        return Call(answer, seconds, share, in_flight, first, started_at, started_at_ms, finished_at_ms)

    async def _answer(self, question: Question, on_text: OnText | None, pieces_at: list[float]) -> Answer:
        if on_text is None:
            return await self._client.ask(question)

        def show(text: str) -> None:
            pieces_at.append(time.monotonic())
            on_text(text)

        answer = None
        if self.streams:
            try:
                answer = await self._client.stream(question, show)
            except (Trouble, Refusal) as fault:
                if pieces_at:  # a second try would show another beginning
                    raise Refusal(f"{fault.what}, in the middle of a text that was being shown") from None
                if isinstance(fault, Trouble):
                    raise
        if answer is None:  # it does not stream, or will not: the whole text at the end
            answer = await self._client.ask(question)
            self.streams = False
            if answer.text:
                on_text(answer.text)
        return answer


def _trouble(state: RetryCallState) -> Trouble:
    trouble = state.outcome.exception() if state.outcome else None
    assert isinstance(trouble, Trouble)  # nothing else is tried again
    return trouble


class Throttle:
    """A gate for requests, used on one event loop. A flooded server halves the room; each round of answers adds one."""

    def __init__(self, most: int) -> None:
        self._most = self.room = most
        self._inside = self._answered = 0
        self._closed_until = self._halved_at = 0.0

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """Wait for room, and hold it inside the block."""
        # Looking is simpler than waking, and a look costs nothing beside a request.
        while self._inside >= self.room or time.monotonic() < self._closed_until:
            await asyncio.sleep(_LOOK_SECONDS)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def flooded(self, started_at: float, retry_after: float | None) -> None:
        """Take in that the server had too much to do for a request of this start (time.monotonic seconds).

        Requests of one flood halve the room once. `retry_after` seconds hold for every request, not for this one alone.
        """
        self._answered = 0
        if started_at >= self._halved_at:
            self._halved_at = time.monotonic()
            self.room = max(1, self.room // 2)
        self._closed_until = max(self._closed_until, time.monotonic() + (retry_after or 0.0))

    def answered(self) -> None:
        """Take in an answer."""
        self._answered += 1
        if self._answered >= self.room:
            self._answered = 0
            self.room = min(self._most, self.room + 1)


class Meter:
    """Divides time among the requests in flight: two integrals over time, of 1/n and of n."""

    def __init__(self) -> None:
        self._inside, self._at = 0, time.monotonic()
        self._shares = self._rows = 0.0

    def enter(self) -> tuple[float, float, float]:
        """Count a request in and return a mark of this moment."""
        mark = self._mark()
        self._inside += 1
        return mark

    def leave(self, mark: tuple[float, float, float]) -> tuple[float, float, float]:
        """Count a request out; return its seconds, its share of them, and the mean of requests in flight."""
        now = self._mark()
        self._inside -= 1
        seconds, share, rows = (end - begin for end, begin in zip(now, mark, strict=True))
        return seconds, share, rows / seconds if seconds > 0 else float(self._inside + 1)

    def _mark(self) -> tuple[float, float, float]:
        now = time.monotonic()
        if self._inside:
            self._shares += (now - self._at) / self._inside
            self._rows += (now - self._at) * self._inside
        self._at = now
        return now, self._shares, self._rows
