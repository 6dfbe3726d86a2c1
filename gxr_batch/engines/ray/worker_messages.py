"""The messages between driver and workers: an order out, a report back. Plain values, no Ray objects.

Failures are values too: Ray would print an exception raised in a worker, including its message.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import NamedTuple

from gxr_batch import errors
from gxr_batch.engines.base import EngineInfo, Pulse
from gxr_batch.errors import EngineFailed, GxrError
from gxr_batch.records import Completion, Prompt


class Order(NamedTuple):
    """What a worker should do. `errand` is the number of the stream that asks: work of lower ones is void.

    `last` means that no more prompts of this errand follow, except rows of a lost worker. The report comes once there
    is news, at the latest after `patience` seconds. `greet` asks the worker to report what it opened.
    """

    errand: int
    prompts: tuple[Prompt, ...] = ()
    last: bool = False
    patience: float = 0.0
    greet: bool = False


class Failure(NamedTuple):
    """An error that ended a worker's engine."""

    kind: str
    what: str
    where: str
    next_step: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        """Convert an error. For an unexpected one only the place is kept: its message may quote a cell."""
        if isinstance(error, GxrError):
            return Failure(type(error).__name__, error.what, error.where, error.next_step)
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(
            EngineFailed.__name__,
            f"The engine of a worker failed: {type(error).__name__}, {Path(place.filename).name} line {place.lineno}.",
            "",
            "run the same command again; if it happens again, report it with these lines",
        )

    def error(self, worker: str) -> GxrError:
        """Return the same error here, naming the worker that raised it."""
        kind = getattr(errors, self.kind, EngineFailed)
        if not issubclass(kind, GxrError):
            kind = EngineFailed
        where = f"{self.where} ({worker})" if self.where else worker
        made: GxrError = kind(self.what, where=where, next_step=self.next_step)
        return made


class Report(NamedTuple):
    """A worker's report. `life` identifies its process: after a loss Ray starts another.

    `received_at` and `sent_at` are its wall clock (seconds since 1970) for the order. `info` is set once the engine is
    open, if the order greets or something is said; `pulse` is the engine's newest, `quiet_seconds` the time since its
    last heartbeat; `said` are sentences for the user.
    """

    life: str
    errand: int
    host: str
    received_at: float
    sent_at: float
    completions: tuple[Completion, ...]
    said: tuple[str, ...]
    pulse: Pulse
    quiet_seconds: float
    info: EngineInfo | None
    failure: Failure | None
