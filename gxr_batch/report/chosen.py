"""Which cases stand in the page's table: all of a usual night, of a huge run those that deserve a look first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gxr_batch.report.aggregate import Bools

Places = npt.NDArray[np.int64]


class Cases(NamedTuple):
    """Rows of a run in input order, with each one's place among all finished rows, counted from 0."""

    table: pa.Table
    places: Places
    marked_only: bool = False


class Chooser:
    """Keeps the first rows that are marked and the first that are not, and no more of each than the table shows."""

    def __init__(self, most: int) -> None:
        self._most, self._seen = most, 0
        self._kept: dict[bool, list[Cases]] = {True: [], False: []}
        self._counts = {True: 0, False: 0}

    def add(self, table: pa.Table, marked: Bools) -> None:
        """Take in finished rows; `marked` says which are failed, held or flagged."""
        for kind, kept in self._kept.items():
            room = self._most - sum(cases.table.num_rows for cases in kept)
            at = np.flatnonzero(marked == kind)
            self._counts[kind] += len(at)
            if room > 0 and len(at):
                kept.append(Cases(table.take(pa.array(at[:room])), at[:room] + self._seen))
        self._seen += table.num_rows

    def cases(self, schema: pa.Schema, most: int) -> Cases:
        """Return at most so many cases: marked ones before others, then in input order."""
        pieces: list[Cases] = []
        room = most
        for kind in (True, False):
            for cases in self._kept[kind]:
                pieces.append(Cases(cases.table.slice(0, room), cases.places[:room]))
                room -= pieces[-1].table.num_rows
        table = pa.concat_tables([schema.empty_table(), *(piece.table for piece in pieces)])
        places = np.concatenate([np.zeros(0, np.int64), *(piece.places for piece in pieces)])
        order = np.argsort(places)
        return Cases(table.take(pa.array(order)), places[order], marked_only=self._counts[True] >= most)
