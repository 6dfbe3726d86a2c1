"""Draws rows of a run for reading: at random, or at random in each stratum, divided among readers.

Every row has a place in an order that depends on the seed and its id alone. A draw takes the first rows of each
stratum, a later draw the next ones: together they are one random sample.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.errors import RunError
from gxr_batch.ledger.reviews import judged_sha256
from gxr_batch.records import FLAGS_OF_REVIEWS, Key

By = Literal["flags", "template"]
ALL, FLAGGED, PLAIN = "all", "with flags", "without flags"
COLUMNS = ("gxr_row_id", "gxr_sample", "gxr_text", "gxr_prompt_sha256", "gxr_flags", "gxr_template")
# Smaller strata would say nothing of themselves.
_LEAST_OF_A_STRATUM = 30


class Drawn(NamedTuple):
    """A drawn row: its key, the digest of what is to be judged, its stratum, and the readers, counted from 1."""

    key: Key
    judged_sha256: str
    stratum: str
    readers: tuple[int, ...]


class Frame(NamedTuple):
    """The rows that can be drawn: how many in each stratum, a digest of all, and the first of each stratum in order."""

    rows: Mapping[str, int]
    sha256: str
    first: Mapping[str, Sequence[tuple[Key, str]]]


def stratum_of(flags: Iterable[str] | None, template: str | None, by: By | None) -> str:
    """Return the stratum of a row with these flags and this template."""
    if by == "template":
        return template or ""
    if by == "flags":
        return FLAGGED if set(flags or ()) - FLAGS_OF_REVIEWS else PLAIN
    return ALL


def frame_of(tables: Iterable[pa.Table], by: By | None, seed: int, most: int) -> Frame:
    """Read the generated rows of a run's tables; keep the first `most` of each stratum."""
    counts: Counter[str] = Counter()
    kept: dict[str, list[tuple[int, Key, str]]] = {}
    digest = hashlib.sha256()
    for table in tables:
        for key, judged, stratum in _rows(table, by):
            counts[stratum] += 1
            digest.update(judged.encode())
            # The heap's least element is the last in order.
            entry = (-_place(key, seed), key, judged)
            heap = kept.setdefault(stratum, [])
            if len(heap) < most:
                heapq.heappush(heap, entry)
            elif entry > heap[0]:
                heapq.heapreplace(heap, entry)
    first = {name: [(key, judged) for _, key, judged in sorted(heap, reverse=True)] for name, heap in kept.items()}
    return Frame(dict(sorted(counts.items())), digest.hexdigest(), first)


def _rows(table: pa.Table, by: By | None) -> Iterator[tuple[Key, str, str]]:
    generated = table.filter(pc.equal(table["gxr_status"], "ok"))
    for row_id, sample, text, prompt, flags, template in zip(
        *(generated[name].to_pylist() for name in COLUMNS), strict=True
    ):
        yield Key(row_id, sample), judged_sha256(text or "", prompt), stratum_of(flags, template, by)


def _place(key: Key, seed: int | str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{key.sample}\x1f{key.row_id}".encode()).digest())


def draw(frame: Frame, count: int, *, readers: int, overlap: int, seed: int, before: Mapping[str, int]) -> list[Drawn]:
    """Return `count` rows in the order in which to read them; `before`: how many of each stratum were drawn already.

    The first `overlap` rows are for every reader, the others are dealt in turn. Raises RunError if too few are left.
    """
    left = {name: rows - before.get(name, 0) for name, rows in frame.rows.items()}
    if count > sum(left.values()):
        raise RunError(
            f"Only {sum(left.values()):,} generated rows of this run were not drawn yet.",
            where=f"--audit {count}",
            next_step="draw fewer rows",
        )
    chosen: list[tuple[Key, str, str]] = []
    for name, own in shares(left, count).items():
        start = before.get(name, 0)
        chosen += [(*row, name) for row in frame.first[name][start : start + own]]
    # Another order than that of the draw, in which a stratum of which most is drawn would come last.
    chosen.sort(key=lambda row: _place(row[0], f"{seed} read"))
    everybody = tuple(range(1, readers + 1))
    return [
        Drawn(key, judged, stratum, everybody if at < overlap else (1 + (at - overlap) % readers,))
        for at, (key, judged, stratum) in enumerate(chosen)
    ]


def shares(left: Mapping[str, int], count: int) -> dict[str, int]:
    """Divide `count` among strata in proportion to the rows left in them, but at least 30 or all rows for each."""
    names = [name for name, rows in left.items() if rows]
    least = min(_LEAST_OF_A_STRATUM, count // max(len(names), 1))
    found = {name: min(left[name], least) for name in names}
    rest, total = count - sum(found.values()), sum(left[name] - found[name] for name in names)
    exact = {name: rest * (left[name] - found[name]) / total if total else 0.0 for name in names}
    for name in names:
        found[name] += int(exact[name])
    for name in sorted(names, key=lambda name: int(exact[name]) - exact[name]):
        if sum(found.values()) < count and found[name] < left[name]:
            found[name] += 1
    return found
