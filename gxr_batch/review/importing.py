"""Matches the rows of reviewed sheets with the run's generated texts, by row id and sample, never by position.

A row is taken whole or not at all, and one that cannot be taken never keeps out the others.
"""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.errors import RunError
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.files import sha256_of
from gxr_batch.ledger.reviews import Reviews, add_reviews, disagree, one_import
from gxr_batch.records import Key, Review
from gxr_batch.review.judgement import COLUMNS_READ, Defaults, Wrong, review_of, says_something
from gxr_batch.review.sheets import SheetRow, read_sheets


class Refused(NamedTuple):
    """A row of a sheet that was not taken."""

    row_id: str
    sample: int
    file: str
    sheet: str
    row: int
    why: str


class Disagreement(NamedTuple):
    """A text on which reviewers differ: each one's name and verdict."""

    row_id: str
    sample: int
    verdicts: tuple[tuple[str, str], ...]


@dataclass(kw_only=True)
class Imported:
    """What an import did, in rows. `unreviewed` rows say nothing, `unchanged` ones what the run knew already."""

    taken: int = 0
    unchanged: int = 0
    unreviewed: int = 0
    refused: list[Refused] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)


class _Generated(NamedTuple):
    """What the run has for a key: its status ("" = no such row, or still to do) and its text."""

    status: str
    text: str | None


_NO_ROW = _Generated("", None)


class _Judged(NamedTuple):
    """A row of a sheet in which a reviewer said something."""

    file: str
    row: SheetRow


def import_reviews(reader: RunReader, paths: Sequence[Path], reviewer: str = "") -> Imported:
    """Take the reviews of these sheets into the run. Raises RunError, StorageError.

    `reviewer` is the name for rows that leave it empty.
    """
    done = Imported()
    judged: dict[Key, list[_Judged]] = {}
    samples = int(reader.manifest.job["sampling"]["samples_per_row"])
    for path in paths:
        _collect(path, samples, judged, done)
    with one_import(reader.folder):
        _take(reader, judged, Defaults(reviewer.strip(), date.today()), _metadata(paths), done)
    return done


def _take(
    reader: RunReader,
    judged: Mapping[Key, list[_Judged]],
    defaults: Defaults,
    metadata: Mapping[str, str],
    done: Imported,
) -> None:
    """Store what the run does not know yet, and look where reviewers now differ."""
    known, texts = Reviews.load(reader.folder), dict(_texts(reader, judged))
    new: list[Review] = []
    for key, rows in judged.items():
        generated = texts.get(key, _NO_ROW)
        reviews = _reviews(key, generated, rows, defaults, done)
        fresh = [review for review in reviews if review not in known.valid(key, generated.text)]
        done.unchanged += len(reviews) - len(fresh)
        new += fresh
    if new:
        add_reviews(reader.folder, new, metadata)
    done.taken = len(new)
    done.disagreements = list(_disagreements(Reviews.load(reader.folder), texts))


def _collect(path: Path, samples: int, judged: dict[Key, list[_Judged]], done: Imported) -> None:
    """Gather the rows of one file that say something, by key."""
    for row in read_sheets(path):
        row_id, sample = _spelled(row.cells.get("gxr_row_id")), _sample(row.cells.get("gxr_sample"), samples)
        if not says_something(row.cells):
            done.unreviewed += bool(row_id)
        elif not row_id or sample is None:
            why = "gxr_row_id is empty" if not row_id else "gxr_sample is missing or no number"
            done.refused.append(Refused(row_id, 0, path.name, row.sheet, row.number, why))
        else:
            read = {name: cell for name, cell in row.cells.items() if name in COLUMNS_READ}
            judged.setdefault(Key(row_id, sample), []).append(_Judged(path.name, row._replace(cells=read)))


def _spelled(cell: Any) -> str:
    """Return a row id as text; a spreadsheet may have made a number of it."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell or "").strip()


def _sample(cell: Any, samples: int) -> int | None:
    if cell is None:
        return 1 if samples == 1 else None
    with suppress(ValueError):
        return int(float(str(cell)))
    return None


def _texts(reader: RunReader, wanted: Mapping[Key, Any]) -> Iterator[tuple[Key, _Generated]]:
    """Yield what the run has for the wanted keys."""
    ids = pa.array({key.row_id for key in wanted}, pa.string())
    for table in reader.finished():
        chosen = table.filter(pc.is_in(table["gxr_row_id"], value_set=ids))
        names = ("gxr_row_id", "gxr_sample", "gxr_status", "gxr_text")
        for row_id, sample, status, text in zip(*(chosen[name].to_pylist() for name in names), strict=True):
            yield Key(row_id, sample), _Generated(status, text)


def _reviews(
    key: Key, generated: _Generated, rows: Sequence[_Judged], defaults: Defaults, done: Imported
) -> list[Review]:
    """Return what the rows of the sheets say of one key, one review a reviewer; note those that cannot be taken."""
    found: dict[str, tuple[Review, _Judged]] = {}
    for one in rows:
        try:
            if generated.text is None or generated.status != "ok":
                raise Wrong(_no_text(generated.status))
            review = review_of(key, generated.text, one.row.cells, defaults)
            before = found.get(review.reviewer)
            if before is not None and before[0] != review:
                raise Wrong(f"{review.reviewer or 'the reviewer'} says something else in {_place(before[1])}")
            found[review.reviewer] = (review, one)
        except Wrong as wrong:
            done.refused.append(Refused(*key, one.file, one.row.sheet, one.row.number, str(wrong)))
    return [review for review, _ in found.values()]


def _no_text(status: str) -> str:
    return {
        "": "this run has no such row, or has not generated it yet",
        "failed": "the row failed and has no text",
        "held": "the row is held back by identifier screening; release it with run --retry held --row",
    }.get(status, "the row has no text")


def _place(one: _Judged) -> str:
    return f"{one.file}, sheet {one.row.sheet}, row {one.row.number}"


def _disagreements(reviews: Reviews, texts: Mapping[Key, _Generated]) -> Iterator[Disagreement]:
    for key, generated in texts.items():
        said = reviews.valid(key, generated.text)
        if disagree(said):
            yield Disagreement(*key, tuple((review.reviewer, review.status) for review in said))


def _metadata(paths: Sequence[Path]) -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without an entry for its user
        user = ""
    try:
        files = ", ".join(f"{path.name} {sha256_of(path)}" for path in paths)
    except OSError as error:
        raise RunError("A sheet vanished while it was read.", where=str(error.filename)) from None
    return {
        "gxr_imported_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "gxr_imported_by": user,
        "gxr_sheets": files,
    }
