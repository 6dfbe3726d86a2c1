"""log.jsonl: what a run did and when, one JSON object a line, for people and monitors. It decides nothing.

Every line has `at` (UTC), `start` (which start of the run, as in run.json) and `event`; the README lists the events and
their fields. Row ids, reasons, counts and settings stand in it, never the text of a cell, a prompt or an answer.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from gxr_batch.disk import storage_errors
from gxr_batch.errors import GxrError

LOG_NAME = "log.jsonl"
_ENDS = frozenset({"ended", "broke_off", "nothing_to_do"})
# Failed and held rows that one invocation names one by one; all of them stand in failed.parquet.
_ROWS_NAMED = 1000


class RunLog:
    """Appends to the log of one run. A line is written whole, at once, without fsync."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_NAME
        self.start = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
        self._open = False  # between `started` and an event that ends a start
        self._file: TextIO | None = None
        self._rows_named = 0

    def event(self, event: str, **fields: Any) -> None:
        """Append one event. Raises StorageError."""
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"at": moment, "start": self.start, "event": event, **fields}, ensure_ascii=False)
        with storage_errors(self.path):
            if self._file is None:
                self._file = self._append()
            self._file.write(line + "\n")
            self._file.flush()
        self._open = event == "started" or (self._open and event not in _ENDS)

    def failed(self, error: BaseException) -> None:
        """Say that an error or a signal ended a start that was logged and has no end yet. Never raises."""
        if not self._open:
            return
        told = {"message": error.what, "where": error.where} if isinstance(error, GxrError) else {}
        with suppress(Exception):
            self.event("broke_off", error=type(error).__name__, **told)

    def _append(self) -> TextIO:
        file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        if file.tell() and not self._ends_a_line():  # the power went in the middle of one
            file.write("\n")
        return file

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def row_failed(self, row_id: str, sample: int, attempt: int, error: str) -> None:
        """Name a failed row, up to a number of them. Raises StorageError."""
        self._row("row_failed", row_id, sample, attempt, error)

    def row_held(self, row_id: str, sample: int, attempt: int, error: str) -> None:
        """Name a held row, up to the same number. Raises StorageError."""
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
