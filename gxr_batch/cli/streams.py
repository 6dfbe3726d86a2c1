"""Standard output and error that may be full, closed, or of an encoding that lacks a letter.

A reader of stdout that has gone away (`| head`) is no failure: the verb ends as it would have. A full disk behind
stdout is one. Nothing on stderr may end a run: its rows matter more than its notices.

Click covers less: at a broken pipe its main() ends the verb with exit code 1, its echo() raises every other write
error, and it replaces letters on ASCII streams alone. echo() skips a stream that is None, but print() then writes to
stdout what was meant for stderr.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from gxr_batch.errors import StorageError


class _Stream:
    """A text stream whose write errors are dealt with; everything else is the stream's own."""

    def __init__(self, stream: TextIO, *, must_arrive: bool) -> None:
        self._stream, self._must_arrive = stream, must_arrive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; raises StorageError where the text must arrive and cannot."""
        if text != "":  # click tries streams out with empty texts, and swallows what these raise
            with self._errors():
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; raises StorageError where the text must arrive and cannot."""
        with self._errors():
            self._stream.flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What the stream still holds goes to nowhere, as all that follows: Python flushes it at the process's end.
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            if self._must_arrive and error.errno != errno.EPIPE:
                reason = error.strerror or type(error).__name__
                raise StorageError(
                    f"The result cannot be written: {reason}.",
                    where="standard output",
                    next_step="make room there, then run the same command again; what a run generated is safe",
                ) from None


@contextmanager
def careful_streams() -> Iterator[None]:
    """Put careful streams in the place of stdout and stderr for the block; a closed one leads nowhere."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a file name that is no UTF-8, an ASCII terminal
            # Typed as never None, and None where the process was started with the stream closed.
            setattr(sys, name, cast(TextIO, _Stream(stream or nowhere, must_arrive=name == "stdout")))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
