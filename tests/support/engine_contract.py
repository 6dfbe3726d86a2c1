"""The contract of every engine, as tests.

An engine's test file subclasses `EngineContract`, names the subclass `Test...`, and gives it a fixture `subject`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from gxr_batch.engines.base import EngineInfo, Pulse, Session, StopRequest
from gxr_batch.records import Completion, Prompt

CANARY = "zebrafish"
_NAP_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An engine for the contract's tests.

    `open` opens it. `prompts(n)` gives n prompts with distinct keys, `lasting(n)` gives n that each keep it busy for
    more than two pulses (None: those of `prompts` do). `spoil(prompt)` turns a prompt into one that fails as a row and
    whose text contains the CANARY. `sees_first_token` is False for an engine that gets whole answers.
    """

    open: Callable[[], AbstractContextManager[Session]]
    prompts: Callable[[int], list[Prompt]]
    spoil: Callable[[Prompt], Prompt]
    lasting: Callable[[int], list[Prompt]] | None = None
    sees_first_token: bool = True

    def long(self, count: int) -> list[Prompt]:
        return (self.lasting or self.prompts)(count)


@dataclass
class Watched:
    """A stream as the runner sees it: what was taken, what was returned, and when.

    `stall` is the total time (seconds) for which a thread that only sleeps was kept waiting, because the machine was
    busy with something else: the engine is not at fault for it. An engine that holds the GIL would look the same.
    """

    taken: list[Prompt] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    pulses: list[Pulse] = field(default_factory=list)
    ahead: int = 0
    longest_silence: float = 0.0
    stall: float = 0.0
    seconds: float = 0.0

    def feed(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        for prompt in prompts:
            self.taken.append(prompt)
            self.ahead = max(self.ahead, len(self.taken) - len(self.completions))
            yield prompt

    def watch(
        self,
        session: Session,
        prompts: Sequence[Prompt],
        stop: StopRequest | None = None,
        after: Callable[[Watched], None] = lambda _: None,
    ) -> Watched:
        """Read a stream to its end, calling `after` once each event is recorded."""
        began = last = time.monotonic()
        with self._stalls_noted():
            for event in session.stream(self.feed(prompts), stop or StopRequest()):
                now = time.monotonic()
                self.longest_silence = max(self.longest_silence, now - last)
                if isinstance(event, Completion):
                    self.completions.append(event)
                else:
                    self.pulses.append(event)
                after(self)
                last = time.monotonic()
        self.longest_silence = max(self.longest_silence, time.monotonic() - last)
        self.seconds = time.monotonic() - began
        return self

    @contextmanager
    def _stalls_noted(self) -> Iterator[None]:
        """Add up the stalls inside the block: by how much a sleeping thread overslept."""
        over = threading.Event()

        def sleep() -> None:
            while not over.is_set():
                began = time.monotonic()
                over.wait(_NAP_SECONDS)
                late = time.monotonic() - began - _NAP_SECONDS
                self.stall += late if late > _NAP_SECONDS else 0.0

        sleeper = threading.Thread(target=sleep)
        sleeper.start()
        try:
            yield
        finally:
            over.set()
            sleeper.join()

    def keys(self) -> list[tuple[str, int]]:
        return [tuple(completion.key) for completion in self.completions]


class EngineContract:
    """The tests; `subject` comes from the subclass."""

    def test_it_describes_itself(self, subject: Subject):
        with subject.open() as session:
            info = session.info
        assert isinstance(info, EngineInfo)
        assert info.slots >= 1
        assert info.load_seconds >= 0
        assert info.identity.kind
        assert info.identity.model

    def test_it_yields_exactly_one_completion_for_each_prompt(self, subject: Subject):
        with subject.open() as session:
            prompts = subject.prompts(2 * session.info.slots + 1)
            seen = Watched().watch(session, prompts)
        assert sorted(seen.keys()) == sorted(tuple(prompt.key) for prompt in prompts)
        for completion in seen.completions:
            assert completion.error is None
            assert completion.finish_reason in {"stop", "length"}

    def test_no_prompts_give_no_events(self, subject: Subject):
        with subject.open() as session:
            seen = Watched().watch(session, [])
        assert (seen.completions, seen.pulses) == ([], [])

    def test_it_takes_no_more_prompts_than_it_has_slots(self, subject: Subject):
        with subject.open() as session:
            seen = Watched().watch(session, subject.prompts(3 * session.info.slots))
            assert seen.ahead <= session.info.slots + 1

    def test_it_gives_a_heartbeat_every_second(self, subject: Subject):
        with subject.open() as session:
            seen = Watched().watch(session, subject.long(session.info.slots))
        assert seen.longest_silence < 1.0 + seen.stall
        assert seen.pulses
        assert max(pulse.rows_in_flight for pulse in seen.pulses) >= 1
        tokens = [pulse.new_tokens for pulse in seen.pulses]
        assert tokens == sorted(tokens)

    def test_answers_respect_their_length_limit(self, subject: Subject):
        with subject.open() as session:
            prompts = subject.prompts(session.info.slots + 1)
            limits = {prompt.key: prompt.max_new_tokens for prompt in prompts}
            seen = Watched().watch(session, prompts)
        for completion in seen.completions:
            assert 0 < completion.new_tokens <= limits[completion.key]
            if completion.finish_reason == "length":
                assert completion.new_tokens == limits[completion.key]

    def test_times_are_plausible_and_shares_add_up(self, subject: Subject):
        with subject.open() as session:
            before = time.time() * 1000
            seen = Watched().watch(session, subject.long(2 * session.info.slots))
            after = time.time() * 1000
        for completion in seen.completions:
            assert 0 <= completion.seconds_queued <= seen.seconds
            assert 0 <= completion.seconds_generating <= seen.seconds
            assert (completion.seconds_to_first_token is not None) == subject.sees_first_token
            assert 0 <= (completion.seconds_to_first_token or 0.0) <= completion.seconds_generating
            assert 0 < completion.seconds_share <= completion.seconds_generating + 1e-6
            assert 0.98 <= completion.rows_in_batch <= session.info.slots * 1.02
            # Timestamps are whole milliseconds.
            assert before - 2 <= completion.started_at_ms <= completion.finished_at_ms <= after + 2
            lasted = (completion.finished_at_ms - completion.started_at_ms) / 1000
            assert abs(lasted - completion.seconds_generating) < 0.1 + seen.stall
        busy = sum(completion.seconds_share for completion in seen.completions)
        assert 0.95 * seen.seconds - 0.15 - seen.stall <= busy <= 1.01 * seen.seconds

    def test_a_row_that_fails_is_a_completion_and_the_other_rows_succeed(self, subject: Subject):
        with subject.open() as session:
            prompts = subject.prompts(session.info.slots + 2)
            prompts[1] = subject.spoil(prompts[1])
            seen = Watched().watch(session, prompts)
        by_key = {completion.key: completion for completion in seen.completions}
        assert len(by_key) == len(seen.completions) == len(prompts)
        failed = by_key.pop(prompts[1].key)
        assert failed.finish_reason == "error"
        assert failed.error
        assert failed.text == ""
        assert CANARY not in failed.error
        assert all(completion.error is None for completion in by_key.values())

    def test_it_returns_at_once_when_asked_to(self, subject: Subject):
        stop = StopRequest()
        asked: list[float] = []

        def interrupt(_: Watched) -> None:
            if not asked:
                asked.append(time.monotonic())
                stop.now()

        with subject.open() as session:
            seen = Watched().watch(session, subject.long(3 * session.info.slots), stop, interrupt)
            assert time.monotonic() - asked[0] < 10
        assert len(seen.completions) < len(seen.taken), "it waited for the rows in flight"

    def test_while_draining_it_takes_no_prompts_and_finishes_its_rows(self, subject: Subject):
        stop = StopRequest()
        taken: list[int] = []

        def drain(seen: Watched) -> None:
            if not taken:
                taken.append(len(seen.taken))
                stop.drain(time.monotonic() + 120)

        with subject.open() as session:
            seen = Watched().watch(session, subject.prompts(4 * session.info.slots), stop, drain)
        assert len(seen.taken) == taken[0]
        assert sorted(seen.keys()) == sorted(tuple(prompt.key) for prompt in seen.taken)

    def test_while_draining_it_returns_by_the_deadline(self, subject: Subject):
        stop = StopRequest()
        asked: list[float] = []

        def drain(_: Watched) -> None:
            if not asked:
                asked.append(time.monotonic())
                stop.drain(asked[0] + 0.2)

        with subject.open() as session:
            seen = Watched().watch(session, subject.long(4 * session.info.slots), stop, drain)
            assert time.monotonic() - asked[0] < 1.2 + seen.stall
        assert set(seen.keys()) <= {tuple(prompt.key) for prompt in seen.taken}
        assert len(set(seen.keys())) == len(seen.keys())

    def test_a_stream_that_is_left_early_does_not_spoil_the_next(self, subject: Subject):
        with subject.open() as session:
            stream = session.stream(iter(subject.long(session.info.slots)), StopRequest())
            next(stream)
            stream.close()
            prompts = subject.prompts(2)
            seen = Watched().watch(session, prompts)
        assert sorted(seen.keys()) == sorted(tuple(prompt.key) for prompt in prompts)
