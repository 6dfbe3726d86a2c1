"""Retries requests until there is an answer, with growing waits and Retry-After, and decides what is at fault.

A row that keeps failing is given up only if the server answers other rows, or a test question, before and after its
last try: then the row is at fault. Otherwise the server is, and rows wait for it (outage.py decides how long). While
the server reports overload or is late, fewer requests are sent at a time; later the number grows again. A request
that is late because of others in flight is no try of its row, else growing again and again could fail it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from gxr_batch.engines.api.answers import Answer
from gxr_batch.engines.api.openai_client import OPTIONAL, Client
from gxr_batch.engines.api.outage import Outage
from gxr_batch.engines.api.server_faults import Refusal, Trouble, Unusable
from gxr_batch.forms import Form, in_layout
from gxr_batch.job import ApiSection
from gxr_batch.job.units import parse_duration
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt, Turn
from gxr_batch.text_checks.reasoning import without_reasoning

_Spent = Callable[[RetryCallState], Awaitable[bool]]
_LOOK_SECONDS = 0.02
_SEEDS = 2**31
_TEST_QUESTION = Prompt(Key("", 0), Messages((Turn("user", "Say OK."),), ""), Encoded(None, None), 1, 1)


class Calls:
    """All requests of a session. Lives on one event loop; `retries` may be read from any thread.

    With a form, an answer without its headings is asked for a second time, and then its row fails.
    """

    def __init__(self, client: Client, settings: ApiSection, outage: Outage, form: Form | None = None) -> None:
        self._client, self._outage, self._form = client, outage, form
        self._max_retries = settings.max_retries
        first, longest = parse_duration(settings.first_wait), parse_duration(settings.longest_wait)
        self._backoff = wait_random_exponential(multiplier=first or 0.0, max=longest or 0.0)
        self._throttle, self._meter = Throttle(settings.concurrency), Meter()
        self._asking_test_question = asyncio.Lock()
        self._last_answered = 0.0  # when the latest answered request began
        self._last_row = 0.0  # the same, of rows only
        self.retries = 0
        self.streams = True

    async def row(self, prompt: Prompt, taken_at: float) -> Completion:
        """Return the completion of a row taken at `taken_at` (monotonic). Raises Unusable if all rows would fail."""
        if self._form is None:
            return await self._row(prompt, taken_at)
        # Shown at its end: what arrives may have to be put into the layout, or be asked for again.
        asked = prompt._replace(on_text=None)
        answer = await self._row(asked, taken_at)
        completion = _in_form(self._form, answer)
        if completion is None:
            self.retries += 1
            asked = asked._replace(row_seed=(prompt.row_seed + 1) % _SEEDS)
            answer = await self._row(asked, taken_at)
            completion = _in_form(self._form, answer)
        if completion is None:
            error = "the server's answer does not have the form's headings, twice in a row"
            return answer._replace(text="", finish_reason="error", error=error, reasoning=None)
        if prompt.on_text is not None and completion.text:
            prompt.on_text(completion.text)
        return completion

    async def _row(self, prompt: Prompt, taken_at: float) -> Completion:
        """Return the completion of a row, whatever its text."""
        tries, alive = 0, self._max_retries == 0  # whether the server answered others before this try

        async def spent(state: RetryCallState) -> bool:
            nonlocal tries, alive
            trouble = _trouble(state)
            tries += not trouble.crowded
            # A late answer does not show whether the server is down or slow.
            if tries < self._max_retries and not trouble.late:
                return False
            before, alive = alive, await self._answers_others()
            return tries > self._max_retries and not trouble.crowded and before and alive

        try:
            return await self._persist(prompt, spent, taken_at)
        except Refusal as fault:
            if fault.suspicious:
                await self._answers_others()
            error = f"the server {fault.what}"
        except Trouble as fault:
            error = f"the server {fault.what}, again and again, while it answered others"
        # Nothing was generated, so nothing is measured.
        now, waited = int(time.time() * 1000), time.monotonic() - taken_at
        return Completion(prompt.key, "", "error", error, None, 0, waited, None, 0.0, 0.0, 0.0, now, now)

    async def greet(self) -> list[str]:
        """Ask a test question, and return the keys of [sampling] that the server refuses.

        Waits for a server that is not up yet. Raises Unusable if no question can be answered.
        """
        client = self._client
        if await self._refusal() is None:
            return []
        # One or more parameters, or the request as such: start with none, and keep those that are accepted.
        client.taken = ()
        if refusal := await self._refusal():
            if client.routed:  # the router does not know the model or provider
                what = refusal.what.replace("refused this row", "does not serve this model")
                raise Unusable(what, "check api.provider, api.model and the token")
            raise _refused_all(refusal, "check api.model, and that the server answers chat completions")
        for name in OPTIONAL:
            before, client.taken = client.taken, (*client.taken, name)
            if await self._refusal():
                client.taken = before
        known = {OPTIONAL[name] for name in client.taken}
        return [key for key in dict.fromkeys(OPTIONAL.values()) if key not in known]

    async def _refusal(self) -> Refusal | None:
        """Ask a test question until it is answered or refused, and return the refusal."""
        try:
            await self._persist(_TEST_QUESTION, self._is_no_server)
        except Refusal as refusal:
            return refusal
        return None

    async def _is_no_server(self, state: RetryCallState) -> bool:
        trouble = _trouble(state)
        if state.attempt_number > self._max_retries and trouble.nonsense and not self._client.answered:
            raise Unusable(trouble.what, "check that api.base_url is an OpenAI-compatible server") from None
        return False

    async def _answers_others(self) -> bool:
        """Return whether the server answers anything asked from now on. Raises Unusable if it refuses everything."""
        now = time.monotonic()
        async with self._asking_test_question:
            if self._last_answered > now:
                return True
            try:
                await self._attempt(_TEST_QUESTION)
            except Trouble:
                return False
            except Refusal as refusal:
                if refusal.suspicious:
                    raise _refused_all(refusal, "check api.model and what the token may do") from None
            return True

    async def _persist(self, prompt: Prompt, spent: _Spent, taken_at: float = 0.0) -> Completion:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Trouble),
            stop=cast(Any, spent),  # may be a coroutine, which the type hints do not allow
            wait=self._wait,
            before_sleep=self._count,
            reraise=True,
        )
        return await retrying(self._attempt, prompt, taken_at)

    def _wait(self, state: RetryCallState) -> float:
        return max(self._backoff(state), _trouble(state).retry_after or 0.0)

    def _count(self, _: RetryCallState) -> None:
        self.retries += 1

    async def _attempt(self, prompt: Prompt, taken_at: float = 0.0) -> Completion:
        async with self._throttle.entered():
            started_at, started_at_ms = time.monotonic(), int(time.time() * 1000)
            shown_at: list[float] = []
            mark = self._meter.enter()
            try:
                try:
                    answer = await self._answer(prompt, shown_at)
                finally:
                    seconds, share, in_flight = self._meter.leave(mark)
            except Trouble as trouble:
                self._troubled(trouble, started_at, in_flight)
                raise
            except Refusal:
                self._outage.alive()
                raise
        self._answered(prompt, started_at)
        return Completion(
            prompt.key,
            *answer[:-1],
            seconds_queued=started_at - taken_at,
            seconds_to_first_token=shown_at[0] - started_at if shown_at else None,
            seconds_generating=seconds,
            seconds_share=share,
            rows_in_batch=in_flight,
            started_at_ms=started_at_ms,
            finished_at_ms=int(time.time() * 1000),
            reasoning=answer.reasoning,
        )

    def _troubled(self, trouble: Trouble, started_at: float, in_flight: float) -> None:
        """Record that a request failed which began at `started_at` and shared the server with `in_flight` in all."""
        self._outage.trouble(trouble)
        if trouble.overloaded:
            self._throttle.overloaded(started_at, trouble.retry_after, late=trouble.late)
        # It waited for others, and no later row overtook it: with fewer requests it may be in time.
        crowded = round(in_flight) > 1 and self._last_row <= started_at
        trouble.crowded = trouble.late and crowded and self._max_retries > 0

    def _answered(self, prompt: Prompt, started_at: float) -> None:
        """Record an answer to a request that began at `started_at`."""
        self._outage.alive()
        self._last_answered = max(self._last_answered, started_at)
        if prompt is not _TEST_QUESTION:  # which takes no time, so that it says nothing about rows
            self._last_row = max(self._last_row, started_at)
            self._throttle.answered()

    async def _answer(self, prompt: Prompt, shown_at: list[float]) -> Answer:
        on_text = prompt.on_text
        if on_text is None:
            return await self._client.ask(prompt)

        def show(text: str) -> None:
            shown_at.append(time.monotonic())
            on_text(text)

        answer = None
        if self.streams:
            try:
                answer = await self._client.stream(prompt, show)
            except (Trouble, Refusal) as fault:
                if shown_at:  # a second try would show a different beginning
                    raise Refusal(f"{fault.what}, in the middle of a text that was being shown") from None
                if isinstance(fault, Trouble):
                    raise
        if answer is None:  # the server does not stream this one: show the whole text at the end
            answer = await self._client.ask(prompt)
            self.streams = False
            if answer.text:
                on_text(answer.text)
        return answer


def _refused_all(refusal: Refusal, next_step: str) -> Unusable:
    return Unusable(refusal.what.replace("this row", "even a test question"), next_step)


def _trouble(state: RetryCallState) -> Trouble:
    trouble = state.outcome.exception() if state.outcome else None
    assert isinstance(trouble, Trouble)  # nothing else is retried
    return trouble


class Throttle:
    """Limits concurrent requests, on one event loop. Overload halves the limit; each round of answers adds one."""

    def __init__(self, most: int) -> None:
        self._most = self.limit = most
        self._inside = self._answered = 0
        self._closed_until = self._halved_at = 0.0

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """Wait for a place below the limit, and hold it inside the block."""
        # Polling is simpler than waking, and costs nothing compared with a request.
        while self._inside >= self.limit or time.monotonic() < self._closed_until:
            await asyncio.sleep(_LOOK_SECONDS)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def overloaded(self, started_at: float, retry_after: float | None, *, late: bool = False) -> None:
        """Record that the server was overloaded by a request that began at `started_at` (time.monotonic seconds).

        Requests in flight together halve the limit once. `retry_after` (seconds) applies to every request. A `late`
        answer takes minutes, too long to halve a limit that the requests in flight do not reach.
        """
        self._answered = 0
        if started_at >= self._halved_at:
            self._halved_at = time.monotonic()
            used = min(self.limit, self._inside) if late else self.limit
            self.limit = max(1, used // 2)
        self._closed_until = max(self._closed_until, time.monotonic() + (retry_after or 0.0))

    def answered(self) -> None:
        """Record an answer."""
        self._answered += 1
        if self._answered >= self.limit:
            self._answered = 0
            self.limit = min(self._most, self.limit + 1)


class Meter:
    """Divides time among the requests in flight, by two integrals over time: of 1/n and of n."""

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


def _in_form(form: Form, answer: Completion) -> Completion | None:
    """Return an answer with its text in the form's layout, None if it lacks the form; a failed one stays as it is.

    What looks like reasoning is part of a text that has the form with it. If the token limit ended it, its last
    section is cut.
    """
    if answer.error is not None:
        return answer
    for one in (answer, without_reasoning(answer)):
        text = in_layout(form, one.text)
        if text is not None and one.finish_reason == "length":
            return one._replace(text=text, finish_reason="closed", cut_sections=(len(form.parts) - 1,))
        if text is not None:
            return one._replace(text=text)
    return None
