"""Signals: every verb that one ends cleans up. During `run` the first asks for an orderly stop; saved rows survive."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from gxr_batch.cli.exit_codes import Terminated

if TYPE_CHECKING:
    from gxr_batch.run.stop import Stopper


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """Let a signal end the block as an exception, so that no temporary file stays behind."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # as in tests: only the main thread may do this
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
    numbers = (signal.SIGTERM, signal.SIGUSR1, *(() if ignored else (signal.SIGHUP,)))
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """Turns SIGINT, SIGTERM, SIGUSR1 and SIGHUP into stop requests once rows are being generated."""

    def __init__(self, stopper: Stopper) -> None:
        self._stopper = stopper
        self._interrupted = False
        self.generating = False

    def _on(self, number: int, frame: FrameType | None) -> None:
        interrupt = number == signal.SIGINT
        if not self.generating or (interrupt and self._interrupted):
            self._stopper.request.now()
            raise KeyboardInterrupt if interrupt else Terminated
        self._interrupted = self._interrupted or interrupt
        self._stopper.ask("interrupt" if interrupt else "terminate")

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside the block."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        before = {number: signal.signal(number, self._on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
