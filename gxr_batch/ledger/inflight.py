"""inflight.json: which keys the engine holds, so that a row that kills the process can be identified.

A hint, not a record: it is written without fsync, may be lost or torn without harm, and does not decide which rows are
done. If it cannot be written, the run continues without it. A process that ends normally leaves no key behind. Keys
found by the next invocation were in the engine when the process died; `engines.suspects` decides what follows. Rows
that an engine holds in other processes kill those, not this one: they are here only if their engine gave up.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gxr_batch.files import open_to_change, read_json
from gxr_batch.ledger.boot import boot_id
from gxr_batch.records import Key

INFLIGHT_NAME = "inflight.json"
# The most writes per second: a real engine takes far fewer rows, and a fake one can do without.
_WRITES_A_SECOND, _WRITES_AT_ONCE = 500.0, 200.0


class InFlight:
    """The keys in the engine now, and how often the process died on a key before."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / INFLIGHT_NAME
        self._held: dict[Key, None] = {}
        self._crashes = _read(self._path)
        self._descriptor = -1
        self._written = 0
        self._budget, self._looked = _WRITES_AT_ONCE, time.monotonic()
        self.failure = ""  # why the file could not be written, the first time

    @property
    def known(self) -> list[Key]:
        """The keys that were in the engine when a process died."""
        return list(self._crashes)

    def keep(self, unfinished: Collection[Key]) -> Mapping[Key, int]:
        """Forget the keys that have finished; return how often the process died on the others."""
        self._crashes = {key: crashes for key, crashes in self._crashes.items() if key in unfinished}
        if self._crashes or self._path.exists():
            self._write()
        return self._crashes

    def take(self, key: Key, *, deadly: bool = True) -> None:
        """Note that the engine has a key; on disk before it runs, if the row could kill this process."""
        self._held[key] = None
        if not deadly:
            return
        now = time.monotonic()
        self._budget = min(_WRITES_AT_ONCE, self._budget + (now - self._looked) * _WRITES_A_SECOND)
        self._looked = now
        if self._budget >= 1:
            self._budget -= 1
            self._write()

    def settle(self, key: Key) -> None:
        """Forget a key and its deaths: the engine returned it, so that it killed no process, or it was given up."""
        self._held.pop(key, None)
        self._crashes.pop(key, None)

    def close(self, *, in_order: bool) -> None:
        """Leave no key behind after a normal end, else the keys that the engine held. Never raises."""
        if in_order:
            self._held = {}
        try:
            if self._held or self._path.exists():
                self._write()
            if self._descriptor >= 0:
                os.close(self._descriptor)
        except Exception:  # only a hint; the user should read the error that ended the run
            pass
        self._descriptor = -1

    def _write(self) -> None:
        """Replace the content in one system call: spaces overwrite longer earlier content. A failure is remembered."""
        crashes = [[*key, times] for key, times in self._crashes.items()]
        content = {"boot": boot_id(), "crashes": crashes, "in_flight": list(self._held)}
        text = json.dumps(content).encode()
        try:
            if self._descriptor < 0:
                self._descriptor = _opened(self._path)
                self._written = os.fstat(self._descriptor).st_size
            os.pwrite(self._descriptor, text.ljust(self._written), 0)
        except OSError as error:
            self.failure = self.failure or error.strerror or type(error).__name__
        else:
            self._written = max(self._written, len(text))


def _opened(path: Path) -> int:
    """Open the file for writing, with the permissions that the umask allows, so that a colleague can resume the run."""
    try:
        return open_to_change(path)
    except PermissionError:  # it belongs to a colleague; who may write to the folder may replace it
        path.unlink(missing_ok=True)
        return open_to_change(path)


def _read(path: Path) -> dict[Key, int]:
    """Return how often the process died on each key; {} if unknown."""
    try:
        content = read_json(path)
        crashes = {_key(row_id, sample): int(times) for row_id, sample, times in content["crashes"]}
        if content.get("boot") != boot_id():  # the machine rebooted, which ended the process
            return crashes
        for row_id, sample in content["in_flight"]:
            key = _key(row_id, sample)
            crashes[key] = crashes.get(key, 0) + 1
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return {}
    return crashes


def _key(row_id: Any, sample: Any) -> Key:
    """Return a key of the file. Raises ValueError if no row can have it: it is looked up in tables and by index."""
    str(row_id).encode()
    if int(sample) < 1:
        raise ValueError
    return Key(str(row_id), int(sample))
