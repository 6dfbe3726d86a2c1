"""Standard output and error that may be full, closed, or limited to an encoding such as ASCII.

If the reader of stdout has gone away (`| head`), the verb ends as usual; if the disk behind stdout is full, that is an
error. Nothing on stderr may end a run: rows matter more than notices.

On a terminal, control characters on stdout show as escapes such as \\x1b.

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


def safe(text: str) -> str:
    """Return a text with its control characters as escapes: a cell or an answer must not control the terminal."""
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    from gxr_batch.cells import for_terminal

    return for_terminal(text)


class _Stream:
    """A text stream that handles write errors; everything else is passed through."""

    def __init__(self, stream: TextIO, *, must_arrive: bool) -> None:
        self._stream, self._must_arrive = stream, must_arrive
        # Nothing on stdout moves the cursor; the progress bar on stderr does, so notices are made safe where they are.
        self._shows_escapes = must_arrive and stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write. Raises StorageError if the text must arrive and cannot."""
        if text != "":  # click tries streams out with empty texts, and swallows what these raise
            with self._errors():
                self._stream.write(safe(text) if self._shows_escapes else text)
        return len(text)

    def flush(self) -> None:
        """Flush. Raises StorageError if the text must arrive and cannot."""
        with self._errors():
            self._stream.flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Python flushes the stream when the process ends: send what it holds, and all that follows, to /dev/null.
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            if self._must_arrive and error.errno != errno.EPIPE:
                reason = error.strerror or type(error).__name__
                raise StorageError(
                    f"The result cannot be written: {reason}.",
                    where="standard output",
                    next_step="free disk space, then run the same command again; generated rows are safe",
                ) from None


@contextmanager
def careful_streams() -> Iterator[None]:
    """Replace stdout and stderr with careful streams inside the block; a closed one leads to /dev/null."""
    before = sys.stdout, sys.stderr
    with open(os.devnull) as nothing, open(os.devnull, "w") as nowhere:
        sys.stdin = sys.stdin or nothing  # also typed as never None
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a file name that is not UTF-8, an ASCII terminal
            # Typed as never None, and None if the process was started with the stream closed.
            setattr(sys, name, cast(TextIO, _Stream(stream or nowhere, must_arrive=name == "stdout")))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
