"""Signals during `run`: the first asks for an orderly stop, a second Ctrl-C stops at once. Saved rows survive both."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from gxr_batch.cli.exit_codes import Terminated

if TYPE_CHECKING:
    from gxr_batch.run.stop import Stopper


def catch_early() -> None:
    """Exit cleanly on a signal that arrives while the program is still loading."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, end)


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
