"""log.jsonl: what a run did and when, one JSON object per line, for people and monitoring. Nothing depends on it.

Every line has `at` (UTC), `start` (the number of the invocation, as in run.json) and `event`; docs/run-folder.md lists
the events and their fields. It holds row ids, reasons, counts and settings, never the text of a cell, a prompt or an
answer.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from gxr_batch.cells import in_json
from gxr_batch.disk import storage_errors
from gxr_batch.errors import GxrError
from gxr_batch.files import open_to_change

LOG_NAME = "log.jsonl"
_ENDS = frozenset({"ended", "broke_off", "nothing_to_do"})
# The most failed and held rows that one invocation lists; failed.parquet has all of them.
_ROWS_NAMED = 1000


class RunLog:
    """Appends to the log of one run. Each line is written in one call, without fsync."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_NAME
        self.start = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
        self._open = False  # between `started` and an event that ends the invocation
        self._file: TextIO | None = None
        self._rows_named = 0

    def event(self, event: str, **fields: Any) -> None:
        """Append one event. Raises StorageError."""
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"at": moment, "start": self.start, "event": event, **fields}, ensure_ascii=False)
        line = in_json(line)
        with storage_errors(self.path):
            if self._file is None:
                self._file = self._append()
            self._file.write(line + "\n")
            self._file.flush()
        self._open = event == "started" or (self._open and event not in _ENDS)

    def failed(self, error: BaseException) -> None:
        """Log that an error or a signal ended the invocation, unless its end is logged. Never raises."""
        if not self._open:
            return
        fields = {"message": error.what, "where": error.where} if isinstance(error, GxrError) else {}
        with suppress(Exception):
            self.event("broke_off", error=type(error).__name__, **fields)

    def _append(self) -> TextIO:
        descriptor = open_to_change(self.path, os.O_APPEND)
        file = os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a power failure cut a line
            file.write("\n")
        return file

    def row_failed(self, row_id: str, sample: int, attempt: int, error: str) -> None:
        """Log a failed row, up to a limit. Raises StorageError."""
        self._row("row_failed", row_id, sample, attempt, error)

    def row_held(self, row_id: str, sample: int, attempt: int, error: str) -> None:
        """Log a held row, up to the same limit. Raises StorageError."""
        self._row("row_held", row_id, sample, attempt, error)

    def _row(self, event: str, row_id: str, sample: int, attempt: int, error: str) -> None:
        self._rows_named += 1
        if self._rows_named <= _ROWS_NAMED:
            self.event(event, row_id=row_id, sample=sample, attempt=attempt, error=error)
        elif self._rows_named == _ROWS_NAMED + 1:
            self.event("more_rows_failed", see="failed.parquet")

    def close(self) -> None:
        """Close the file. Never raises: every line is already written."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
