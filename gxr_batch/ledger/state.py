"""What the parts say of every key of the table: its newest status, its attempt, and where its result stands.

Arrays by row position and sample, 12 bytes a key, so that ten million rows fit. Looked up by row id and content, never
by position: `State.scan` is the only place that relates parts to a table. The newest attempt of a key counts; a failed
one never replaces an ok one. What counts as another content is decided in rows/ids (the cells that the template uses),
and whether a finished run looks again at all in `source_key` of run/prepare.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.errors import StorageError
from gxr_batch.ledger.input_copy import Index, rows_of
from gxr_batch.ledger.parts import KEY_COLUMNS, STATUS_NAMES, DamagedPart, groups_of, part_numbers, part_path
from gxr_batch.records import Result, Status

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
Bools = npt.NDArray[np.bool_]  # (rows, samples) or (rows,)


class Counts(NamedTuple):
    """How many keys are in which state. `left` are still to do."""

    ok: int
    failed: int
    held: int
    left: int

    @property
    def total(self) -> int:
        """All keys of the table."""
        return self.ok + self.failed + self.held + self.left


class State:
    """The newest result of every key of a table of `rows` rows with `samples` samples each.

    `damaged` are the numbers of the parts that a scan passed over because they could not be read.
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
        """Read the keys of all parts and relate them to the table in `input_path`.

        A damaged part counts as if it were not there. `whole` reads the other columns too, and so finds damage in them.
        Raises StorageError if the disk does not let a part be read.
        """
        numbers = part_numbers(folder)
        if not numbers:
            return cls(rows_of(input_path), samples)
        index = Index(input_path)
        state, seen = cls(index.rows, samples), set(numbers)
        while numbers:
            vanished = [number for number in numbers if not state._take_in(folder, number, index, whole)]
            # What a writer puts into a union while this reads stands in it, under a number of its own: look again.
            numbers = [number for number in part_numbers(folder) if number not in seen] if vanished else []
            seen.update(numbers)
        return state

    def _take_in(self, folder: Path, number: int, index: Index, whole: bool) -> bool:
        """Book the rows of a part that are the table's, none if it is damaged; return False if it is gone."""
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
        # A key can stand in one part twice (a retry): each round takes the first of each key that is left.
        while len(found):
            _, first = np.unique(found["row"] * self.samples + found["sample"], return_index=True)
            self._put(found[first])
            found = np.delete(found, first)
        return True

    def _known(self, index: Index, table: pa.Table, part: int, start: int) -> npt.NDArray[np.void]:
        """Return the rows of a table of keys, from line `start` of a part on, that are the table's."""
        table = table.combine_chunks()
        position = index.find(table["gxr_row_id"].combine_chunks())
        known = index.same_content(position, table["gxr_content_hash"])
        sample = table["gxr_sample"].to_numpy()
        known &= sample <= self.samples
        found = np.empty(int(known.sum()), _FOUND)
        found["row"] = position[known]
        found["sample"] = sample[known] - 1
        found["status"] = pc.index_in(table["gxr_status"], value_set=STATUS_NAMES).to_numpy()[known] + 1
        found["truncated"] = pc.equal(table["gxr_finish_reason"], "length").to_numpy()[known]
        found["attempt"] = table["gxr_attempt"].to_numpy()[known]
        found["part"], found["line"] = part, start + np.flatnonzero(known)
        return found

    def _put(self, found: npt.NDArray[np.void]) -> None:
        was_ok = self.status[found["row"], found["sample"]] == OK
        better = found[(found["status"] == OK) | ~was_ok]
        at = (better["row"], better["sample"])
        for name in ("status", "truncated", "attempt", "part", "line"):
            getattr(self, name)[at] = better[name]

    def record(self, position: int, result: Result, part: int, line: int) -> None:
        """Take in one new result that stands in line `line` (from 0) of part number `part`."""
        at = (position, result.sample - 1)
        if self.status[at] == OK and result.status != "ok":
            return
        self.status[at] = CODES[result.status]
        self.truncated[at] = result.finish_reason == "length"
        self.attempt[at] = result.attempt
        self.part[at] = part
        self.line[at] = line

    def counts(self) -> Counts:
        """Count the keys by state."""
        tally = np.bincount(self.status.ravel(), minlength=4)
        return Counts(ok=int(tally[OK]), failed=int(tally[FAILED]), held=int(tally[HELD]), left=int(tally[TODO]))
