"""Matches the rows of reviewed sheets with the run's generated texts, by row id and sample, never by position.

A row is taken whole or not at all, and one that cannot be taken never keeps out the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import CUT_MARK, for_workbook
from gxr_batch.disk import sha256_of
from gxr_batch.errors import RunError
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.reviews import Reviews, add_reviews, disagree, one_import, same_person
from gxr_batch.records import Key, Review
from gxr_batch.review.parse_row import (
    COLUMNS_READ,
    Defaults,
    Generated,
    Judged,
    Wrong,
    may_withdraw,
    review_of,
    says_something,
)
from gxr_batch.review.read_sheets import SheetRow, read_sheets
from gxr_batch.run.invocation_record import user_name


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
    """What an import did, in rows. `unreviewed` rows say nothing, `unchanged` ones what the run knew already.

    `remarks` of the taken ones have entries but no verdict.
    """

    taken: int = 0
    unchanged: int = 0
    unreviewed: int = 0
    remarks: int = 0
    refused: list[Refused] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)


class _Line(NamedTuple):
    """A row of a sheet in which a reviewer said something."""

    file: str
    row: SheetRow

    def refused(self, key: Key, why: str) -> Refused:
        """Say why it is not taken."""
        return Refused(*key, self.file, self.row.sheet, self.row.number, why)


def import_reviews(reader: RunReader, paths: Sequence[Path], reviewer: str = "") -> Imported:
    """Take the reviews of these sheets into the run. Raises RunError, StorageError.

    `reviewer` is the name for rows that leave it empty.
    """
    done = Imported()
    judged: dict[Key, list[_Line]] = {}
    samples = int(reader.manifest.job["sampling"]["samples_per_row"])
    for path in paths:
        _collect(path, samples, judged, done)
    with one_import(reader.folder):
        _take(reader, judged, Defaults(reviewer.strip(), date.today()), _metadata(paths), done)
    return done


def _take(
    reader: RunReader,
    judged: Mapping[Key, list[_Line]],
    defaults: Defaults,
    metadata: Mapping[str, str],
    done: Imported,
) -> None:
    """Store what the run does not know yet, and look where reviewers now differ."""
    known, texts = Reviews.load(reader.folder), dict(_texts(reader, judged))
    new: list[Review] = []
    for key, rows in judged.items():
        exact = key if key in texts else Key(key.row_id.strip(), key.sample)
        generated = texts.get(exact, Generated())
        said = known.valid(exact, generated.text, generated.prompt_sha256)
        earlier = known.history(exact) if said else ()
        for judged_now, line in _reviews(exact, generated, rows, defaults, done):
            what = _news(judged_now, said, earlier, defaults)
            done.unchanged += what == "nothing new"
            done.unreviewed += what == "nothing"
            done.remarks += what == "new" and judged_now.review.status == "unreviewed"
            if what == "new":
                new.append(judged_now.review)
            elif what not in {"nothing new", "nothing"}:
                done.refused.append(line.refused(exact, what))
    if new:
        add_reviews(reader.folder, new, metadata)
    done.taken = len(new)
    done.disagreements = list(_disagreements(Reviews([*known.all, *new]), texts))


def _collect(path: Path, samples: int, judged: dict[Key, list[_Line]], done: Imported) -> None:
    """Gather the rows of one file that say something, by key."""
    for row in read_sheets(path):
        row_id, sample = _spelled(row.cells.get("gxr_row_id")), _sample(row.cells.get("gxr_sample"), samples)
        if not says_something(row.cells) and not may_withdraw(row.cells):
            done.unreviewed += bool(row_id)
        elif not row_id.strip() or sample is None:
            why = "gxr_row_id is empty" if not row_id.strip() else "gxr_sample is missing or no number"
            done.refused.append(Refused("", 0, path.name, row.sheet, row.number, why))
        else:
            read = {name: cell for name, cell in row.cells.items() if name in COLUMNS_READ}
            judged.setdefault(Key(row_id, sample), []).append(_Line(path.name, row._replace(cells=read)))


def _spelled(cell: Any) -> str:
    """Return a row id as text; a spreadsheet may have made a number of it."""
    if cell is None:
        return ""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _sample(cell: Any, samples: int) -> int | None:
    if cell is None:
        return 1 if samples == 1 else None
    with suppress(ValueError, OverflowError):
        number = float(str(cell))
        return int(number) if number.is_integer() else None
    return None


def _texts(reader: RunReader, wanted: Mapping[Key, Any]) -> Iterator[tuple[Key, Generated]]:
    """Yield what the run has for the wanted keys."""
    ids = pa.array({name for key in wanted for name in (key.row_id, key.row_id.strip())}, pa.string())
    for table in reader.finished():
        chosen = table.filter(pc.is_in(table["gxr_row_id"], value_set=ids))
        names = ("gxr_row_id", "gxr_sample", "gxr_status", "gxr_text", "gxr_prompt_sha256", "gxr_attempt")
        for row_id, sample, *rest in zip(*(chosen[name].to_pylist() for name in names), strict=True):
            yield Key(row_id, sample), Generated(*rest)


def _reviews(
    key: Key, generated: Generated, lines: Sequence[_Line], defaults: Defaults, done: Imported
) -> list[tuple[Judged, _Line]]:
    """Return what the rows of the sheets say of one key, one review a reviewer; note those that cannot be taken."""
    found: dict[str, list[tuple[Judged, _Line]]] = {}
    for line in lines:
        try:
            judged = review_of(key, generated, line.row.cells, defaults)
        except Wrong as wrong:
            # An id that the run does not have may be any text of a broken sheet.
            done.refused.append(line.refused(key if generated.status else Key("", key.sample), str(wrong)))
        else:
            found.setdefault(same_person(judged.review.reviewer), []).append((judged, line))
    taken = []
    for said in found.values():
        if all(judged == said[0][0] for judged, _ in said):
            taken.append(said[0])
        else:  # which of them holds nobody knows
            places = "; ".join(f"{line.file}, sheet {line.row.sheet}, row {line.row.number}" for _, line in said)
            done.refused += [line.refused(key, f"one reviewer says different things: {places}") for _, line in said]
    return taken


def _news(judged: Judged, said: Sequence[Review], earlier: Sequence[Review], defaults: Defaults) -> str:
    """Return whether a review is new, nothing new, nothing, or why it is refused.

    One without a date of its own is the one that is known, whenever that was. An empty one that bears a name takes back
    what this reviewer said before, and else says nothing.
    """
    review, name = judged.review, same_person(judged.review.reviewer)
    mine = [one for one in said if same_person(one.reviewer) == name]
    if any(_equal(one, judged) for one in mine):
        return "nothing new"
    if review.status == "unreviewed" and not mine and _is_empty(review):
        return "nothing"
    if (review.text or "").endswith(CUT_MARK.strip()):
        return "gxr_review_text was cut by the workbook, for Excel's limit of a cell; write it anew, shorter"
    if mine and defaults.reviewer and name != same_person(defaults.reviewer):
        return "gxr_reviewer bears another name than yours, and that review was changed; put your own name there"
    if any(_equal(one, judged) for one in earlier):
        return "its reviewer said so before and something else since; to say it again, give it a new gxr_reviewed_at"
    return "new"


def _equal(known: Review, judged: Judged) -> bool:
    """Return whether a known review says the same; texts that the workbook had to cut are the known ones."""
    review = judged.review
    shown = known._replace(
        reviewer=review.reviewer,
        reviewed_at=known.reviewed_at if judged.dated else review.reviewed_at,
        text=_as_shown(known.text, review.text),
        comment=_as_shown(known.comment, review.comment),
    )
    return shown == review


def _as_shown(known: str | None, seen: str | None) -> str | None:
    return seen if known is not None and seen is not None and for_workbook(known).text.strip() == seen else known


def _is_empty(review: Review) -> bool:
    filled = (review.text, review.comment, review.quality, *review.errors)
    return all(value is None for value in filled)


def _disagreements(reviews: Reviews, texts: Mapping[Key, Generated]) -> Iterator[Disagreement]:
    for key, generated in texts.items():
        said = reviews.valid(key, generated.text, generated.prompt_sha256)
        if disagree(said):
            yield Disagreement(*key, tuple((review.reviewer, review.status) for review in said))


def _metadata(paths: Sequence[Path]) -> dict[str, str]:
    try:
        files = ", ".join(f"{path.name} {sha256_of(path)}" for path in paths)
    except OSError as error:
        raise RunError("A sheet vanished while it was read.", where=str(error.filename)) from None
    return {
        "gxr_imported_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "gxr_imported_by": user_name(),
        "gxr_sheets": files,
    }
