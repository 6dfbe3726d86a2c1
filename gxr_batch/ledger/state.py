"""The state of every key of the table according to the parts: its newest status, attempt, and result location.

Arrays by row position and sample, 12 bytes per key, so that ten million rows fit. Keys are looked up by row id and
content, never by position; only `State.scan` maps parts to a table. The newest attempt of a key counts; a failed one
never replaces an ok one, but counts as an attempt. rows/ids decides what counts as changed content (the cells that the
template uses), and `source_key` in run/prepare whether a finished run looks again at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.errors import StorageError
from gxr_batch.ledger.input_copy import Index, rows_of
from gxr_batch.ledger.parts import KEY_COLUMNS, STATUS_NAMES, DamagedPart, groups_of, part_numbers, part_path
from gxr_batch.records import TRUNCATED_REASONS, Result, Status

_TRUNCATED = pa.array(TRUNCATED_REASONS)
TODO, OK, FAILED, HELD = 0, 1, 2, 3
CODES: dict[Status, int] = {"ok": OK, "failed": FAILED, "held": HELD}

_FOUND = np.dtype(
    [
        ("row", np.int64),
        ("sample", np.int64),
        ("status", np.int8),
        ("truncated", np.bool_),
        ("attempt", np.int16),
        ("part", np.int32),
        ("line", np.int32),
    ]
)
# No count or time of a run is larger.
MOST_COUNTED = 2**53
Bools = npt.NDArray[np.bool_]  # (rows, samples) or (rows,)


class Counts(NamedTuple):
    """The number of keys in each state. `left` are still to do."""

    ok: int
    failed: int
    held: int
    left: int

    @property
    def total(self) -> int:
        """The number of keys in the table."""
        return self.ok + self.failed + self.held + self.left


def are_counts(value: Mapping[str, object]) -> bool:
    """Return whether an object has the fields of `Counts`, each a count."""
    numbers = [number for number in value.values() if isinstance(number, int) and 0 <= number <= MOST_COUNTED]
    return set(value) == set(Counts._fields) and len(numbers) == len(value)


class State:
    """The newest result of every key of a table of `rows` rows with `samples` samples each.

    `damaged` are the numbers of the parts that a scan skipped because they could not be read.
    """

    def __init__(self, rows: int, samples: int) -> None:
        shape = (rows, samples)
        self.rows, self.samples = rows, samples
        self.status = np.zeros(shape, np.int8)
        self.truncated = np.zeros(shape, np.bool_)
        self.attempt = np.zeros(shape, np.int16)
        self.part = np.zeros(shape, np.int32)
        self.line = np.zeros(shape, np.int32)
        self.damaged: list[int] = []

    @classmethod
    def scan(cls, folder: Path, input_path: Path, samples: int, *, whole: bool = False) -> State:
        """Read the keys of all parts and match them to the table in `input_path`.

        Damaged parts are ignored. `whole` reads the other columns too, and so detects damage in them. Raises
        StorageError if the disk fails.
        """
        numbers = part_numbers(folder)
        if not numbers:
            return cls(rows_of(input_path), samples)
        index = Index(input_path)
        state, seen = cls(index.rows, samples), set(numbers)
        while numbers:
            vanished = [number for number in numbers if not state._read_part(folder, number, index, whole)]
            # A writer may compact parts during this scan, under a new number: look again.
            numbers = [number for number in part_numbers(folder) if number not in seen] if vanished else []
            seen.update(numbers)
        return state

    def _read_part(self, folder: Path, number: int, index: Index, whole: bool) -> bool:
        """Record the rows of a part that belong to the table, none if it is damaged; return False if it is missing."""
        known, rows = [np.empty(0, _FOUND)], 0
        try:
            for table in groups_of(folder, number, None if whole else KEY_COLUMNS):
                known.append(self._known(index, table.select(list(KEY_COLUMNS)), number, rows))
                rows += table.num_rows
        except DamagedPart:
            self.damaged.append(number)
            return True
        except StorageError:
            if part_path(folder, number).exists():
                raise
            return False
        found = np.concatenate(known)
        # A key can be in one part twice (a retry): each round takes the first remaining one of each key.
        while len(found):
            _, first = np.unique(found["row"] * self.samples + found["sample"], return_index=True)
            self._put(found[first])
            found = np.delete(found, first)
        return True

    def _known(self, index: Index, table: pa.Table, part: int, start: int) -> npt.NDArray[np.void]:
        """Return the keys that belong to the table, from a part's keys beginning at line `start`."""
        table = table.combine_chunks()
        position = index.find(table["gxr_row_id"].combine_chunks())
        known = index.same_content(position, table["gxr_content_hash"])
        sample = table["gxr_sample"].to_numpy()
        known &= sample <= self.samples
        found = np.empty(int(known.sum()), _FOUND)
        found["row"] = position[known]
        found["sample"] = sample[known] - 1
        found["status"] = pc.index_in(table["gxr_status"], value_set=STATUS_NAMES).to_numpy()[known] + 1
        found["truncated"] = pc.is_in(table["gxr_finish_reason"], value_set=_TRUNCATED).to_numpy()[known]
        found["attempt"] = table["gxr_attempt"].to_numpy()[known]
        found["part"], found["line"] = part, start + np.flatnonzero(known)
        return found

    def _put(self, found: npt.NDArray[np.void]) -> None:
        at = (found["row"], found["sample"])
        # Of any result, so that a failed one of an ok key counts too, and the next attempt has another seed.
        self.attempt[at] = np.maximum(self.attempt[at], found["attempt"])
        better = found[(found["status"] == OK) | (self.status[at] != OK)]
        at = (better["row"], better["sample"])
        for name in ("status", "truncated", "part", "line"):
            getattr(self, name)[at] = better[name]

    def record(self, position: int, result: Result, part: int, line: int) -> None:
        """Record one new result at line `line` (from 0) of part number `part`."""
        at = (position, result.sample - 1)
        self.attempt[at] = max(self.attempt[at], result.attempt)
        if self.status[at] == OK and result.status != "ok":
            return
        self.status[at] = CODES[result.status]
        self.truncated[at] = result.finish_reason in TRUNCATED_REASONS
        self.part[at] = part
        self.line[at] = line

    def counts(self) -> Counts:
        """Count the keys by state."""
        tally = np.bincount(self.status.ravel(), minlength=4)
        return Counts(ok=int(tally[OK]), failed=int(tally[FAILED]), held=int(tally[HELD]), left=int(tally[TODO]))
