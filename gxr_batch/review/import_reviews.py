"""Stores the reviews of sheets, each for the generated text that it is about, never by position.

A row is found by row id and sample; match_rows finds those whose id was changed by a spreadsheet.

A row is imported completely or not at all, and a refused row does not affect the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import CUT_MARK, for_workbook, is_unicode, quoted
from gxr_batch.disk import sha256_of
from gxr_batch.errors import RunError
from gxr_batch.forms import Form
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.reviews import UNREVIEWED, Reviews, add_reviews, disagree, one_import, same_person
from gxr_batch.records import Key, Review
from gxr_batch.review.match_rows import Case, Elsewhere, cases, leads_to_its_text
from gxr_batch.review.parse_row import (
    Defaults,
    Generated,
    Judged,
    columns_read,
    is_filled_in,
    lost_letters,
    may_withdraw,
    refuse_edited_in_place,
    review_columns_of,
    review_of,
    same_text,
    shows_a_review,
    shows_a_verdict,
)
from gxr_batch.review.read_sheets import SheetRow, read_sheets
from gxr_batch.review.row_text import InvalidRow
from gxr_batch.run.invocation_record import user_name

# What a reviewer wrote as text.
_OWN_TEXTS = ("gxr_review_text", "gxr_review_comment", "gxr_reviewer")
_OUT_OF_SIGHT = (
    "the sheet is very hidden: Excel does not list it, so no reviewer can have seen it; make it visible, or copy the "
    "row to the sheet Cases"
)
_NO_NAME = "gxr_reviewer is empty; fill it in, or add --reviewer NAME"
_MAYBE_LOST = (
    "what the reviewer wrote has a ?, and the file lost letters when it was saved; save it again as CSV UTF-8 (not "
    "CSV) or as a workbook"
)


class Refused(NamedTuple):
    """A row of a sheet that was not imported."""

    row_id: str
    sample: int
    file: str
    sheet: str
    row: int
    why: str


class Disagreement(NamedTuple):
    """A text on which reviewers disagree: the name and verdict of each."""

    row_id: str
    sample: int
    verdicts: tuple[tuple[str, str], ...]


@dataclass(kw_only=True)
class Imported:
    """The result of an import, in rows. `unreviewed` rows are not filled in; `unchanged` ones are already stored.

    `remarks`: how many of the `taken` rows have entries but no verdict. `withdrawn`: how many are empty, and end the
    reviewer's earlier review. `notices` are sentences about whole files.
    """

    taken: int = 0
    unchanged: int = 0
    unreviewed: int = 0
    remarks: int = 0
    withdrawn: int = 0
    refused: list[Refused] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


class _Line(NamedTuple):
    """A row of a sheet."""

    file: str
    row: SheetRow

    def refused(self, key: Key, why: str) -> Refused:
        """Return this row as refused, with the reason."""
        return Refused(*key, self.file, self.row.sheet, self.row.number, why)


class _Found(NamedTuple):
    """The rows of all sheets by key: those filled in, those filled in where nobody sees them, and the others."""

    judged: dict[Key, list[_Line]]
    hidden: dict[Key, list[_Line]]
    untouched: dict[Key, list[_Line]]


def import_reviews(reader: RunReader, paths: Sequence[Path], reviewer: str = "") -> Imported:
    """Import the reviews of these sheets into the run. Raises RunError, StorageError.

    `reviewer`: name for rows whose gxr_reviewer is empty.
    """
    done = Imported()
    found = _Found({}, {}, {})
    samples = int(reader.manifest.job["sampling"]["samples_per_row"])
    for path in paths:
        _collect(path, samples, reader.form, found, done)
    with one_import(reader.folder):
        texts = dict(_texts(reader, {*found.judged, *found.hidden, *found.untouched}))
        for key, lines in found.hidden.items():
            done.refused += [line.refused(_known(key, texts), _OUT_OF_SIGHT) for line in lines]
        _refuse_edited_in_place(reader, found.untouched, texts, done)
        defaults = Defaults(reviewer.strip(), date.today(), reader.form)
        if new := _take(reader, found.judged, texts, defaults, done):
            add_reviews(reader.folder, new, _metadata(paths))
    return done


def _refuse_edited_in_place(
    reader: RunReader, untouched: Mapping[Key, list[_Line]], texts: Mapping[Key, Generated], done: Imported
) -> None:
    """Count the rows that are not filled in; refuse those whose generated text was edited in its own column."""
    edited: list[tuple[Key, _Line, str]] = []
    for key, lines in untouched.items():
        exact = _exact(key, texts)
        for line in lines:
            try:
                refuse_edited_in_place(texts.get(exact, Generated()), line.row.cells, reader.form)
            except InvalidRow as invalid:
                edited.append((exact, line, str(invalid)))
            else:
                done.unreviewed += 1
    elsewhere = Elsewhere(reader.finished() if edited else (), [line.row.cells for _, line, _ in edited])
    for key, line, why in edited:
        own = same_text(texts[key].text or "", line.row.cells["gxr_text"])  # then a section was edited
        if not own and elsewhere.holds(line.row.cells):  # a spreadsheet changed the id, or moved columns
            done.unreviewed += 1
        else:
            done.refused.append(line.refused(key, why))


def _take(
    reader: RunReader,
    judged: Mapping[Key, list[_Line]],
    texts: dict[Key, Generated],
    defaults: Defaults,
    done: Imported,
) -> list[Review]:
    """Return the new reviews, and find the texts on which reviewers now disagree."""
    known = Reviews.load(reader.folder)
    judged = _without_lost_letters(_placed(reader, judged, texts, done), texts, reader.form, done)
    new: list[Review] = []
    for key, rows in judged.items():
        exact = _exact(key, texts)
        generated = texts.get(exact, Generated())
        said = known.valid(exact, generated.text, generated.prompt_sha256)
        earlier = known.history(exact) if said else ()
        for judged_now, line in _reviews(exact, generated, rows, defaults, done):
            what = _news(judged_now, said, earlier, defaults, line.row.cells)
            done.unchanged += what == "unchanged"
            done.unreviewed += what == "empty"
            if what == "new":
                new.append(judged_now.review)
                empty = judged_now.review.is_empty
                done.withdrawn += empty
                done.remarks += not empty and judged_now.review.status == UNREVIEWED
            elif what not in {"unchanged", "empty"}:
                done.refused.append(line.refused(exact, what))
    done.taken = len(new)
    done.disagreements = list(_disagreements(Reviews([*known.all, *new]), texts))
    return new


def _collect(path: Path, samples: int, form: Form | None, found: _Found, done: Imported) -> None:
    """Add the rows of one file to what was found."""
    names = columns_read(form)
    for row in read_sheets(path):
        row_id, sample = _row_id(row.cells.get("gxr_row_id")), _sample(row.cells.get("gxr_sample"), samples)
        read = row._replace(cells={name: cell for name, cell in row.cells.items() if name in names})
        if not is_filled_in(row.cells, form) and not may_withdraw(row.cells):
            if row_id:
                found.untouched.setdefault(Key(row_id, sample or 0), []).append(_Line(path.name, read))
        elif not row_id.strip() or sample is None:
            why = "gxr_row_id is empty" if not row_id.strip() else "gxr_sample is missing or not a number"
            done.refused.append(Refused("", 0, path.name, row.sheet, row.number, why))
        elif row.out_of_sight:
            found.hidden.setdefault(Key(row_id, sample), []).append(_Line(path.name, read))
        elif half := _half_character(row.cells, names):
            why = f"{half} has half a character, such as _xD800_; type it again"
            done.refused.append(Refused("", sample, path.name, row.sheet, row.number, why))
        else:
            found.judged.setdefault(Key(row_id, sample), []).append(_Line(path.name, read))


def _half_character(cells: Mapping[str, Any], names: Collection[str]) -> str:
    """Return the first column that is read whose cell has half a character, "" if none has."""
    texts = ((name, cell) for name, cell in cells.items() if name in names and isinstance(cell, str))
    return next((name for name, text in texts if not is_unicode(text)), "")


def _row_id(cell: Any) -> str:
    """Return a row id as text; a spreadsheet may have converted it to a number."""
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


def _texts(reader: RunReader, wanted: Collection[Key]) -> Iterator[Case]:
    """Yield the run's text and status of each wanted key."""
    ids = pa.array({name for key in wanted for name in (key.row_id, key.row_id.strip())}, pa.string())
    for table in reader.finished():
        yield from cases(table.filter(pc.is_in(table["gxr_row_id"], value_set=ids)))


def _exact(key: Key, texts: Mapping[Key, Generated]) -> Key:
    return key if key in texts else Key(key.row_id.strip(), key.sample)


def _known(key: Key, texts: Mapping[Key, Generated]) -> Key:
    """Return a key for a message: an unknown id may be any text of a broken sheet, so it is not repeated there."""
    exact = _exact(key, texts)
    return exact if exact in texts else Key("", key.sample)


def _placed(
    reader: RunReader, judged: Mapping[Key, list[_Line]], texts: dict[Key, Generated], done: Imported
) -> Mapping[Key, list[_Line]]:
    """Return the rows by the key that each is about, and add what the run has for new ones to `texts`.

    Records rows with parts of several cases as refused.
    """
    odd = [
        line.row.cells
        for key, lines in judged.items()
        for line in lines
        if not leads_to_its_text(texts.get(_exact(key, texts)), line.row.cells)
    ]
    if not odd:
        return judged
    elsewhere = Elsewhere(reader.finished(), odd)
    placed: dict[Key, list[_Line]] = {}
    renamed: Counter[str] = Counter()
    for key, lines in judged.items():
        generated = texts.get(_exact(key, texts))
        for line in lines:
            case = None
            try:
                if not leads_to_its_text(generated, line.row.cells):
                    case = elsewhere.place(key, generated, line.row.cells)
            except InvalidRow as invalid:
                done.refused.append(line.refused(_known(key, texts), str(invalid)))
                continue
            if case is not None:
                renamed[line.file] += 1
                texts[case.key] = case.generated
            placed.setdefault(case.key if case else key, []).append(line)
    done.notices += [
        f"{quoted(file)}: a spreadsheet changed gxr_row_id of {_counted(rows)}, e.g. by removing leading zeros; "
        "matched by "
        "gxr_prompt_sha256 and gxr_text"
        for file, rows in renamed.items()
    ]
    return placed


def _without_lost_letters(
    judged: Mapping[Key, list[_Line]], texts: Mapping[Key, Generated], form: Form | None, done: Imported
) -> Mapping[Key, list[_Line]]:
    """Refuse reviews that may have lost letters, because generated texts of the same file did.

    Adds a notice for other CSV files that are not Unicode, if reviews have letters outside ASCII.
    """
    lossy = {line.file for key, lines in judged.items() for line in lines if _lost_letters(key, line, texts)}
    kept: dict[Key, list[_Line]] = {}
    foreign: Counter[str] = Counter()
    names = [*_OWN_TEXTS, *review_columns_of(form)]
    for key, lines in judged.items():
        for line in lines:
            own = "".join(str(line.row.cells.get(name) or "") for name in names)
            if line.file in lossy and "?" in own and not _lost_letters(key, line, texts):
                done.refused.append(line.refused(_known(key, texts), _MAYBE_LOST))
                continue
            foreign[line.file] += line.file not in lossy and line.row.encoding == "cp1252" and not own.isascii()
            kept.setdefault(key, []).append(line)
    done.notices += [
        f"{quoted(file)}: not UTF-8, read as Western European Windows; check the letters of {_counted(rows)}, or "
        "save it again "
        "as CSV UTF-8"
        for file, rows in foreign.items()
        if rows
    ]
    return kept


def _lost_letters(key: Key, line: _Line, texts: Mapping[Key, Generated]) -> bool:
    text, shown = texts.get(_exact(key, texts), Generated()).text, line.row.cells.get("gxr_text")
    return text is not None and not same_text(text, shown) and lost_letters(text, shown)


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows:,} rows"


def _reviews(
    key: Key, generated: Generated, lines: Sequence[_Line], defaults: Defaults, done: Imported
) -> list[tuple[Judged, _Line]]:
    """Return the reviews of one key, one per reviewer; record the rows that are refused."""
    found: dict[str, list[tuple[Judged, _Line]]] = {}
    for line in lines:
        try:
            judged = review_of(key, generated, line.row.cells, defaults)
        except InvalidRow as invalid:
            done.refused.append(line.refused(key if generated.status else Key("", key.sample), str(invalid)))
        else:
            found.setdefault(same_person(judged.review.reviewer), []).append((judged, line))
    taken = []
    for said in found.values():
        if all(judged.review == said[0][0].review for judged, _ in said):
            taken.append(said[0])
        elif not said[0][0].review.reviewer:
            done.refused += [line.refused(key, _NO_NAME) for _, line in said]
        else:  # it is unknown which of them is valid
            places = "; ".join(
                f"{quoted(line.file)}, sheet {quoted(line.row.sheet)}, row {line.row.number}" for _, line in said
            )
            done.refused += [line.refused(key, f"conflicting reviews by one reviewer: {places}") for _, line in said]
    return taken


def _news(
    judged: Judged, said: Sequence[Review], earlier: Sequence[Review], defaults: Defaults, cells: Mapping[str, Any]
) -> str:
    """Return "new", "unchanged", "empty", or the reason why a review is refused.

    A review without a date matches a stored one of any date. If `cells` show a review, an empty one with a name
    withdraws this reviewer's earlier review.
    """
    name = same_person(judged.review.reviewer)
    mine = [one for one in said if same_person(one.reviewer) == name]
    # A remark that was stored without a name, by an earlier version, belongs to nobody.
    if any(_equal(one, judged) for one in said if one in mine or not (one.reviewer or judged.named)):
        return "unchanged"
    if judged.review.is_empty and not (mine and shows_a_review(cells)):
        return "empty"
    replaced = [one for one in earlier if same_person(one.reviewer) == name]
    return next(_refusals(judged, mine, replaced, defaults, verdict_shown=shows_a_verdict(cells)), "new")


def _refusals(
    judged: Judged, mine: Sequence[Review], replaced: Sequence[Review], defaults: Defaults, *, verdict_shown: bool
) -> Iterator[str]:
    """Yield reasons against a review; `mine` are the reviewer's valid ones, `replaced` are all of the reviewer's."""
    review, latest = judged.review, max((one.reviewed_at for one in mine), default=date.min)
    if not review.reviewer:  # without names, two readers would be one
        yield _NO_NAME
    if (review.text or "").endswith(CUT_MARK.strip()):
        yield "gxr_review_text was cut on export at Excel's cell limit; write a shorter text"
    if mine and defaults.reviewer and same_person(review.reviewer) != same_person(defaults.reviewer):
        yield "the review was changed, but gxr_reviewer has another name than --reviewer; enter your name there"
    if any(_equal(one, judged) for one in replaced):
        yield "the reviewer has replaced this review since; to restore it, enter a new gxr_reviewed_at"
    if review.status == UNREVIEWED and not verdict_shown and any(one.status != UNREVIEWED for one in mine):
        yield "the reviewer's earlier verdict is not in this sheet; enter it in gxr_review_status, or export again"
    if review.reviewed_at < latest:
        yield f"the reviewer's stored review is newer, of {latest}; to replace it, enter that date or a later one"
    if review.reviewed_at > max(latest, defaults.today + timedelta(days=1)):  # a day, for other time zones
        yield "gxr_reviewed_at is in the future"


def _equal(known: Review, judged: Judged) -> bool:
    """Return whether a stored review is the same; a text that the workbook cut equals its full text."""
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


def _disagreements(reviews: Reviews, texts: Mapping[Key, Generated]) -> Iterator[Disagreement]:
    for key, generated in texts.items():
        said = reviews.valid(key, generated.text, generated.prompt_sha256)
        if disagree(said):
            yield Disagreement(*key, tuple((review.reviewer, review.status) for review in said))


def _metadata(paths: Sequence[Path]) -> dict[str, str]:
    try:
        files = ", ".join(f"{path.name} {sha256_of(path, links=True)}" for path in paths)
    except OSError as error:
        raise RunError("A sheet was removed while it was read.", where=str(error.filename)) from None
    return {
        "gxr_imported_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "gxr_imported_by": user_name(),
        "gxr_sheets": files,
    }
