"""A worker: one engine in a separate process, which Ray starts, watches and restarts.

The engine has its own thread and pulls prompts from a small queue; Ray's calls arrive in another. No method raises, and
nothing is printed. Does not use Ray.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from gxr_batch.engines.base import Create, EngineInfo, Pulse, Session, StopRequest
from gxr_batch.engines.ray.worker_messages import Failure, Order, Report
from gxr_batch.job import Job
from gxr_batch.models.offline import asked_only_by_fetch
from gxr_batch.records import Completion, Key, Prompt


class Worker:
    """Holds the engine that `create` makes from `job`, and follows orders of increasing errands."""

    def __init__(self, job: Job, create: Create, folder: str) -> None:
        """`folder` is the driver's: paths in the job are relative to it, if it exists on this host."""
        with suppress(OSError):
            os.chdir(folder)
        self._job, self._create = job, create
        self._life, self._host = secrets.token_hex(8), socket.gethostname()
        self._changed = threading.Condition()  # guards everything below
        self._errand, self._last, self._stop = -1, False, StopRequest()
        self._waiting: deque[tuple[Prompt, float]] = deque()  # with their arrival times
        self._ended: list[Completion] = []
        self._said: list[str] = []
        self._pulse, self._stirred_at = Pulse(0, 0), time.monotonic()
        self._asks = False  # the engine waits for the driver, which is not a fault
        self._info: EngineInfo | None = None
        self._failure: Failure | None = None
        threading.Thread(target=self._live, name="gxr-batch-engine", daemon=True).start()

    def exchange(self, order: Order) -> Report:
        """Process an order and return a report once there is news."""
        received_at = time.time()
        with self._changed:
            self._begin(order.errand)
            if order.errand == self._errand:
                self._waiting.extend((prompt, time.monotonic()) for prompt in order.prompts)
                self._last = order.last
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_news(order), order.patience)
            return self._report(order, received_at)

    def drop(self, errand: int) -> None:
        """Drop the work of all errands below this one."""
        with self._changed:
            self._begin(errand)

    def _begin(self, errand: int) -> None:
        if errand <= self._errand:
            return
        self._stop.now()
        self._errand, self._last, self._stop = errand, False, StopRequest()
        self._waiting.clear()
        self._ended.clear()
        self._changed.notify_all()

    def _has_news(self, order: Order) -> bool:
        news = bool(self._ended or self._said or self._failure) or order.errand != self._errand
        return news or (order.greet and self._info is not None)

    def _report(self, order: Order, received_at: float) -> Report:
        current = order.errand == self._errand
        completions, said = tuple(self._ended) if current else (), tuple(self._said)
        if current:
            self._ended.clear()
        self._said.clear()
        info = self._info if order.greet or said else None
        return Report(
            life=self._life,
            errand=order.errand,
            host=self._host,
            received_at=received_at,
            sent_at=time.time(),
            completions=completions,
            said=said,
            pulse=self._pulse,
            quiet_seconds=0.0 if self._asks else time.monotonic() - self._stirred_at,
            info=info,
            failure=self._failure,
        )

    def _live(self) -> None:
        """Open the engine and work until the process ends; every report after an error names that error."""
        try:
            with asked_only_by_fetch(), self._create(self._job, self._say).open() as session:
                with self._changed:
                    self._info = session.info
                    self._changed.notify_all()
                while True:
                    self._work(session)
        except BaseException as error:  # even what no engine should raise: this thread has no other way to report it
            failure = Failure.of(error)
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _work(self, session: Session) -> None:
        """Run one stream: from the first waiting prompt until there are no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            errand, stop = self._errand, self._stop
        waited: dict[Key, float] = {}
        for event in session.stream(self._prompts(errand, waited), stop):
            with self._changed:
                self._stirred_at = time.monotonic()
                if isinstance(event, Pulse):
                    self._pulse = event
                    if event.notices:  # by which the driver learns that the slots may have changed
                        self._info = session.info
                        self._said += event.notices
                        self._changed.notify_all()
                elif errand == self._errand:
                    queued = event.seconds_queued + waited.pop(event.key)
                    self._ended.append(event._replace(seconds_queued=queued))
                    self._changed.notify_all()

    def _prompts(self, errand: int, waited: dict[Key, float]) -> Iterator[Prompt]:
        """Yield the errand's prompts as they arrive; wait for the driver while it has more."""
        while True:
            with self._changed:
                self._asks = True
                self._changed.wait_for(lambda: self._waiting or self._last or errand != self._errand)
                self._asks, self._stirred_at = False, time.monotonic()
                if errand != self._errand or not self._waiting:
                    return
                prompt, came_at = self._waiting.popleft()
                waited[prompt.key] = time.monotonic() - came_at
            yield prompt

    def _say(self, sentence: str) -> None:
        with self._changed:
            self._said.append(sentence)
            self._changed.notify_all()
