"""The echo engine with faults that tests ask for. It is registered as "echo", so jobs keep that kind.

`faulty_cli.py` registers it in a separate process; `playing` does in this one. Ray sends it to its workers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from gxr_batch.engines import ENGINES, register
from gxr_batch.engines.base import Create, EngineInfo, Identity, Pulse, Say, Session, StopRequest, require_time
from gxr_batch.engines.echo import EchoEncoder, EchoEngine
from gxr_batch.errors import EngineFailed
from gxr_batch.job import Job
from gxr_batch.records import Completion, Key, Prompt


class Faults(NamedTuple):
    """The faults to play; none by default.

    `fail_every` fails every Nth prompt, by its row seed; `fail_containing` fails prompts that contain this text;
    `crash_after` ends the engine after so many completions; `kill_containing` kills the process over such a prompt,
    like a fault in a kernel or the system's OOM killer; `hang_containing` hangs over it permanently, like a driver that
    never returns; `more_slots` is how many slots there are after the first completion, and then texts are not
    reproducible; `opens_after` is how long the engine loads (seconds); `never_opens` waits until it has to stop.
    """

    fail_every: int = 0
    fail_containing: str = ""
    crash_after: int = 0
    kill_containing: str = ""
    hang_containing: str = ""
    more_slots: int = 0
    opens_after: float = 0
    never_opens: bool = False


def faulty(faults: Mapping[str, Any]) -> Create:
    """Return a factory of engines that play these faults; it can be pickled."""
    return partial(FaultyEngine, Faults(**faults))


@contextmanager
def playing(faults: Mapping[str, Any]) -> Iterator[None]:
    """Let "echo" play these faults in this process for the block; without faults it is unchanged."""
    before = ENGINES["echo"]
    if faults:
        register("echo", faulty(faults))
    try:
        yield
    finally:
        register("echo", before)


class FaultyEngine:
    """An echo engine whose session plays faults."""

    def __init__(self, faults: Faults, job: Job, _say: Say) -> None:
        self._faults, self._echo = faults, EchoEngine(job)

    def identity(self) -> Identity:
        return self._echo.identity()

    def encoder(self) -> EchoEncoder:
        return self._echo.encoder()

    @contextmanager
    def open(self, until: float = float("inf")) -> Iterator[FaultySession]:
        time.sleep(self._faults.opens_after)
        while self._faults.never_opens:
            require_time(until)
            time.sleep(0.01)
        with self._echo.open() as session:
            yield FaultySession(session, self._faults)


class FaultySession:
    """Lets the echo engine answer, and replaces answers before they are passed on."""

    def __init__(self, echo: Session, faults: Faults) -> None:
        self._echo, self._faults = echo, faults
        self._done = 0

    @property
    def info(self) -> EngineInfo:
        return self._echo.info

    def stream(self, prompts: Iterator[Prompt], stop: StopRequest) -> Iterator[Completion | Pulse]:
        """Answer every prompt. Raises EngineFailed after `crash_after` completions, counted over all streams."""
        taken: dict[Key, Prompt] = {}

        def noted() -> Iterator[Prompt]:
            for prompt in prompts:
                taken[prompt.key] = prompt
                yield prompt._replace(on_text=None)  # the text of a row that is to fail is not shown

        for event in self._echo.stream(noted(), stop):
            yield self._spoil(taken.pop(event.key), event) if isinstance(event, Completion) else event
            if self._faults.more_slots > self.info.slots:
                self._echo.info = replace(self.info, slots=self._faults.more_slots, reproducible=False)
                yield Pulse(0, 0, notices=(f"{self.info.slots} slots from now on.",))

    def _spoil(self, prompt: Prompt, completion: Completion) -> Completion:
        self._done += 1
        faults, text = self._faults, prompt.messages.turns[-1].text
        if faults.crash_after and self._done > faults.crash_after:
            raise EngineFailed("The echo engine was asked to fail here.", where="crash_after")
        if faults.kill_containing and faults.kill_containing in text:
            os.kill(os.getpid(), signal.SIGKILL)
        while faults.hang_containing and faults.hang_containing in text:
            time.sleep(60)
        if faults.fail_every and prompt.row_seed % faults.fail_every == 0:
            return self._failed(completion, "the echo engine was asked to fail this row")
        if faults.fail_containing and faults.fail_containing in text:
            return self._failed(completion, "the echo engine was asked to fail rows like this one")
        if prompt.on_text and completion.text:
            prompt.on_text(completion.text)
        return completion

    @staticmethod
    def _failed(completion: Completion, error: str) -> Completion:
        return completion._replace(text="", finish_reason="error", error=error, new_tokens=0)
