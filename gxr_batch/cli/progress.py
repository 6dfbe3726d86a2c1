"""Progress on stderr: a bar on a terminal, one line per minute anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gxr_batch.cli.streams import safe

if TYPE_CHECKING:
    from gxr_batch.run.invocation import Progress

_BAR_SECONDS = 0.2
_LINE_SECONDS = 60.0


class ProgressDisplay:
    """Draws what the runner reports. A context manager, so that the bar is always closed."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._terminal = sys.stderr.isatty()
        self._every = _BAR_SECONDS if self._terminal else _LINE_SECONDS
        self._next = 0.0 if self._terminal else time.monotonic() + _LINE_SECONDS

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(safe(sentence), file=sys.stderr)
        else:
            print(safe(sentence), file=sys.stderr)

    def show(self, progress: Progress) -> None:
        """Draw the progress if it is due. Called for every row, so it returns at once if it is not."""
        self.draw(settled(progress), progress.wanted, lambda: describe(progress))

    def draw(self, done: int, total: int, described: Callable[[], str]) -> None:
        """Draw `done` of `total`; `described` makes the text, and is called only if it is due."""
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        self._next = now + self._every
        if self._terminal:
            self._draw_bar(done, total, described())
        else:
            self.say(f"{time.strftime('%H:%M')} {described()}")

    def _draw_bar(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, bar_format="{bar} {desc}", file=sys.stderr, leave=False)
        self._bar.n = done
        self._bar.set_description_str(text)


def settled(progress: Progress) -> int:
    """Return how many of the rows to do are generated, rejected or held."""
    return progress.done + progress.rejected + progress.withheld


def describe(progress: Progress) -> str:
    """Return rows done of the rows to do in this invocation, rows per minute, tokens per second, time left, failed."""
    from gxr_batch.cli.layout import duration, rate

    done, total = settled(progress), progress.wanted
    text = f"{done:,}/{total:,} rows"
    if progress.done and progress.seconds > 0:
        speed = progress.done / progress.seconds
        text += f", {rate(speed * 60)} rows/min, {rate(progress.new_tokens / progress.seconds)} tok/s"
        text += f", {duration((total - done) / speed)} left"
    elif progress.rows_in_flight:
        text += f", {progress.rows_in_flight:,} in progress"
    text += f", {progress.failed + progress.rejected:,} failed"
    return f"{text}, {progress.withheld:,} held" if progress.withheld else text
