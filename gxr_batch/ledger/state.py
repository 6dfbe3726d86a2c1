"""What the parts say of every key of the table: its newest status, its attempt, and where its result stands.

Arrays by row position and sample, about 16 bytes a key, so that ten million rows fit. Looked up by row id and content,
never by position: `State.scan` is the only place that relates parts to a table. The newest attempt of a key counts;
a failed one never replaces an ok one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.errors import StorageError
from gxr_batch.ledger.parts import KEY_COLUMNS, STATUS_NAMES, DamagedPart, part_numbers, part_path, read_part
from gxr_batch.ledger.table import keys_of
from gxr_batch.records import Result, Status

TODO, OK, FAILED, HELD = 0, 1, 2, 3
CODES: dict[Status, int] = {"ok": OK, "failed": FAILED, "held": HELD}
# Ids of so many part rows are looked up at once: one hash table of the input's ids serves them all.
_ROWS_A_LOOKUP = 1_000_000

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
Bools = npt.NDArray[np.bool_]


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
        Raises StorageError where the disk does not let a part be read.
        """
        numbers = part_numbers(folder)
        keys = keys_of(input_path)
        state = cls(keys.num_rows, samples)
        ids = keys["gxr_row_id"].combine_chunks()
        group: list[tuple[int, pa.Table]] = []
        size = 0
        for number in numbers:
            if (keys_of_part := state._keys(folder, number, whole)) is not None:
                group.append((number, keys_of_part))
                size += keys_of_part.num_rows
            if group and (size >= _ROWS_A_LOOKUP or number == numbers[-1]):
                state._take_in(ids, keys["gxr_content_hash"], group)
                group, size = [], 0
        return state

    def _keys(self, folder: Path, number: int, whole: bool) -> pa.Table | None:
        """Return a part's key columns, None where it is damaged or has just been set aside by a writer."""
        try:
            return read_part(folder, number, None if whole else KEY_COLUMNS).select(list(KEY_COLUMNS))
        except DamagedPart:
            self.damaged.append(number)
        except StorageError:
            if part_path(folder, number).exists():
                raise
        return None

    def _take_in(self, ids: pa.Array, contents: pa.ChunkedArray, group: Sequence[tuple[int, pa.Table]]) -> None:
        table = pa.concat_tables([part for _, part in group])
        position = pc.index_in(table["gxr_row_id"], value_set=ids)
        same = pc.equal(contents.take(position), table["gxr_content_hash"])
        valid = pc.and_kleene(same, pc.less_equal(table["gxr_sample"], self.samples))
        known = pc.fill_null(valid, False).to_numpy()
        found = np.empty(int(known.sum()), _FOUND)
        found["row"] = pc.fill_null(position, 0).to_numpy()[known]
        found["sample"] = table["gxr_sample"].to_numpy()[known] - 1
        found["status"] = pc.index_in(table["gxr_status"], value_set=STATUS_NAMES).to_numpy()[known] + 1
        found["truncated"] = pc.equal(table["gxr_finish_reason"], "length").to_numpy()[known]
        found["attempt"] = table["gxr_attempt"].to_numpy()[known]
        found["part"] = np.repeat([number for number, _ in group], [part.num_rows for _, part in group])[known]
        found["line"] = np.concatenate([np.arange(part.num_rows) for _, part in group])[known]
        # A key can stand in one group twice (a retry): each round takes the first of each key that is left.
        while len(found):
            _, first = np.unique(found["row"] * self.samples + found["sample"], return_index=True)
            self._put(found[first])
            found = np.delete(found, first)

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
