"""The pool's stream: a report arrives, its rows are yielded, and its worker gets the next order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from gxr_batch.engines.base import EngineInfo, Pulse, Say, StopRequest
from gxr_batch.engines.ray.pool import Lost, Member, Pool, check_alike, joined
from gxr_batch.engines.ray.row_assignment import Dealer, Taken
from gxr_batch.engines.ray.worker_messages import Order, Report
from gxr_batch.engines.suspects import CRASHED
from gxr_batch.errors import EngineFailed, EngineUnavailable, GxrError, ModelUnavailable, OutOfDeviceMemory
from gxr_batch.records import Completion, Prompt

_PULSE_SECONDS = 0.5
_LOOK_SECONDS = 0.1
_CALL_SECONDS = 0.5
# After one of these errors another process, perhaps on another host, may succeed.
_MAY_PASS = (EngineFailed, OutOfDeviceMemory)


class Patience(NamedTuple):
    """How long to wait for any live worker, and for a heartbeat from one that has rows (seconds)."""

    give_up_seconds: float
    hung_seconds: float


class RaySession:
    """Workers whose engines are open. One stream at a time."""

    def __init__(self, info: EngineInfo, pool: Pool, patience: Patience, say: Say) -> None:
        self.info = info
        self._pool, self._patience, self._say = pool, patience, say
        self._errand = 0
        self._again = 0
        self._reported: set[str] = set()
        self._error: GxrError | None = None  # from the last worker that failed

    def stream(self, prompts: Iterator[Prompt], stop: StopRequest) -> Iterator[Completion | Pulse]:
        """Generate for every prompt.

        `on_text` of a prompt gets the whole answer at its end. Raises EngineFailed if no worker is left,
        EngineUnavailable if none is alive for too long, and what a worker's engine raised.
        """
        self._errand += 1
        dealer = Dealer(prompts, stop, [member.hand for member in self._pool.members])
        began = pulsed = lived = time.monotonic()
        try:
            while not dealer.over:
                for member in self._pool.idle:
                    self._pool.call(member, self._order(member, dealer))
                came = self._pool.next(_LOOK_SECONDS)
                if stop.must_return(time.monotonic()):
                    break
                if came is not None:
                    for completion in self._take(*came, dealer, stop):
                        pulsed = time.monotonic()
                        yield completion
                yield from self._replace_hung(dealer)
                now = time.monotonic()
                lived = now if any(member.alive for member in self._pool.members) else lived
                self._look_for_life(now - lived)
                if now - pulsed >= _PULSE_SECONDS or isinstance(came and came[1], Lost):
                    pulsed = now
                    yield self._pulse(dealer)
            if pulsed != began:
                yield self._pulse(dealer)  # the final row counts of each worker
        finally:
            self._again += dealer.again
            dealer.close()
            self._pool.drop(self._errand + 1)

    def _pulse(self, dealer: Dealer) -> Pulse:
        return self._pool.pulse(dealer.in_flight, self._again + dealer.again)

    def _order(self, member: Member, dealer: Dealer) -> Order:
        if member.info is None:
            return Order(self._errand, patience=_CALL_SECONDS, greet=True)
        unit = dealer.deal(member.hand)
        # A worker with free slots still comes back at once for its next unit, after the others got theirs.
        patience = 0.0 if dealer.wants_more(member.hand) else _CALL_SECONDS
        return Order(self._errand, unit, dealer.last, patience)

    def _take(self, member: Member, came: Report | Lost, dealer: Dealer, stop: StopRequest) -> Iterator[Completion]:
        """Record what came from a member: rows, sentences, a failure, or its loss."""
        if isinstance(came, Lost):
            yield from map(_crashed, dealer.lose(member.hand))
            if stop.admitting:
                self._tell(member, came)
            return
        for sentence in came.said:
            self.tell(sentence)
        if came.errand == self._errand:
            for completion in came.completions:
                here = _by_our_clock(member, completion)
                if (settled := dealer.settle(member.hand, here)) is not None:
                    yield settled
        if came.failure is not None:
            error = came.failure.error(member.name)
            if isinstance(error, EngineUnavailable):  # for every worker; and its rows did not cause it
                raise error
            yield from map(_crashed, dealer.lose(member.hand))
            self._failed(member, error)
        elif came.info is not None:
            self._opened(member, came.info)

    def tell(self, sentence: str) -> None:
        """Report a worker's sentence once: workers tend to report the same."""
        if sentence not in self._reported:
            self._reported.add(sentence)
            self._say(sentence)

    def _tell(self, member: Member, lost: Lost) -> None:
        if lost.final:  # also the last of several attempts to open it
            self._say(f"{member.name.capitalize()} was lost too often and will not be replaced.")
        elif lost.open:
            self._say(f"{member.name.capitalize()} was lost; it will be replaced, and its rows run again at the end.")

    def _failed(self, member: Member, error: GxrError) -> None:
        """Have a worker replaced whose engine failed. Raises errors that are not specific to this process."""
        self._error = error
        opened = member.info is not None
        if not isinstance(error, (*_MAY_PASS, ModelUnavailable)):
            raise error
        if opened and isinstance(error, _MAY_PASS):
            self._pool.restart(member)
            self._say(f"{error.what} {member.name.capitalize()} will be replaced, and its rows run again at the end.")
        else:
            self._pool.give_up(member)
            self._say(f"{error.what} {member.name.capitalize()} will not be replaced.")

    def _opened(self, member: Member, info: EngineInfo) -> None:
        """Admit a replaced worker, if it holds the same model as the others."""
        member.info = info
        others = [other for other in self._pool.members if other is not member and other.info is not None]
        try:
            for other in others[:1]:
                check_alike(other, member)
        except ModelUnavailable as error:
            self._failed(member, error)
        else:
            member.hand.slots = info.slots
            opened = [one for one in self._pool.members if one.info is not None]
            now = joined(opened, self.info.load_seconds, self.info.versions)
            reproducible = self.info.reproducible and now.reproducible  # of all texts so far
            self.info = replace(now, reproducible=reproducible, notices=self.info.notices)

    def _replace_hung(self, dealer: Dealer) -> Iterator[Completion]:
        """Have workers replaced that hold rows without progress, in their engine or altogether."""
        for member in self._pool.hung(self._patience.hung_seconds):
            yield from map(_crashed, dealer.lose(member.hand))
            self._pool.restart(member)
            self._say(
                f"{member.name.capitalize()} did not respond for {self._patience.hung_seconds:,.0f} s; it will be "
                "replaced, and its rows run again at the end."
            )

    def _look_for_life(self, seconds: float) -> None:
        if not self._pool.members:
            raise self._error or EngineFailed(
                "Every worker was lost more often than ray.max_restarts allows.",
                where="ray.max_restarts",
                next_step="check the hosts, then run the same command again",
            )
        if seconds >= self._patience.give_up_seconds:
            raise EngineUnavailable(
                f"No worker was alive for {seconds:,.0f} s.",
                where="ray.give_up_after",
                next_step="check the cluster, then run the same command again",
            )


def _by_our_clock(member: Member, completion: Completion) -> Completion:
    return completion._replace(
        started_at_ms=member.clock.here(completion.started_at_ms),
        finished_at_ms=member.clock.here(completion.finished_at_ms),
    )


def _crashed(taken: Taken) -> Completion:
    """Return the completion of a row whose worker was lost again while the row ran alone."""
    now, length = int(time.time() * 1000), taken.prompt.encoded.length
    return Completion(taken.prompt.key, "", "error", CRASHED, length, 0, 0.0, None, 0.0, 0.0, 0.0, now, now)
