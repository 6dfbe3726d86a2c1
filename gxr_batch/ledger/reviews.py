"""Reviews of generated texts: separate files next to the parts, applied to the rows when these are read.

A review never changes a generated text. It belongs to the exact text that was judged: if the row is generated again,
the review becomes stale; it is marked as such and does not apply to the new text. Every import is one immutable file.
The newest review of each reviewer of a text counts, whatever was judged before or since; if two reviewers disagree, the
row is flagged.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gxr_batch.disk import make_folder, parquet_file, reading, storage_errors, write_whole
from gxr_batch.errors import RunError, RunLocked, StorageError
from gxr_batch.files import NoLocks, open_to_change, remove_leftovers, require_folder, try_lock
from gxr_batch.ledger.run_format import FORMAT, FORMAT_MARK, next_number, refuse_later_file, with_missing_columns
from gxr_batch.records import (
    APPROVED,
    DISCLAIMER,
    ERROR_COUNTS,
    REMARKED,
    REVIEW_STATUSES,
    REVIEWED_DISCLAIMER,
    REVIEWERS_DISAGREE,
    STALE_REVIEW,
    Key,
    Review,
    review_schema,
)

REVIEWS_NAME = "reviews"
UNREVIEWED = "unreviewed"
_NAME = re.compile(r"review-(\d{8})\.parquet")
_KEY_COLUMNS = ("gxr_row_id", "gxr_sample", "gxr_judged_sha256", "gxr_review_status")
_LOCK_NAME, _LOCK_SECONDS, _LOOK_SECONDS = "import.lock", 30, 0.05


def judged_sha256(text: str, prompt_sha256: str | None) -> str:
    """Return the sha256 (hex) of what a reviewer judges: a generated text and its prompt."""
    return hashlib.sha256(f"{prompt_sha256 or ''}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()


class Reviews:
    """The reviews of one run: the newest of each reviewer for each text of a key."""

    def __init__(self, reviews: Sequence[Review] = ()) -> None:
        self.all = list(reviews)
        self._of: dict[Key, dict[tuple[str, str], Review]] = {}
        self._history: dict[Key, list[Review]] = {}
        # By date of judgement: an old sheet that is imported late is not newer.
        for review in sorted(reviews, key=lambda review: review.reviewed_at):
            self._history.setdefault(review.key, []).append(review)
            said, who = self._of.setdefault(review.key, {}), (same_person(review.reviewer), review.judged_sha256)
            said.pop(who, None)  # so that the newest is last
            said[who] = review

    @classmethod
    def load(cls, folder: Path) -> Reviews:
        """Read all reviews of a run. Raises RunError if a file is damaged, StorageError."""
        return cls([review for path in review_files(folder) for review in _read(path)])

    def __len__(self) -> int:
        """Count the reviewed keys, including keys whose reviewed text was replaced."""
        return sum(any(one.status != UNREVIEWED for one in said.values()) for said in self._of.values())

    def valid(self, key: Key, text: str | None, prompt_sha256: str | None) -> list[Review]:
        """Return each reviewer's review of this text of a key, newest last."""
        said = self._of.get(key)
        if not said or text is None:
            return []
        digest = judged_sha256(text, prompt_sha256)
        return [review for review in said.values() if review.judged_sha256 == digest]

    def history(self, key: Key) -> Sequence[Review]:
        """Return every review of a key, oldest first."""
        return self._history.get(key, ())

    def apply_to(self, table: pa.Table) -> pa.Table:
        """Return a table of result rows with review columns added and status, flags and disclaimer updated."""
        extra = review_schema()
        if not self._of:
            nulls = [pa.nulls(table.num_rows, field.type) for field in extra]
            return pa.Table.from_arrays([*table.columns, *nulls], schema=with_review_columns(table.schema))
        columns: dict[str, list[Any]] = {field.name: [None] * table.num_rows for field in extra}
        columns |= {name: table[name].to_pylist() for name in ("gxr_review_status", "gxr_flags", "gxr_disclaimer")}
        names = ("gxr_row_id", "gxr_sample", "gxr_text", "gxr_prompt_sha256")
        rows = zip(*(table[name].to_pylist() for name in names), strict=True)
        for at, (row_id, sample, text, prompt_sha256) in enumerate(rows):
            if (row_id, sample) in self._of:
                valid = self.valid(Key(row_id, sample), text, prompt_sha256)
                for name, value in _cells(valid, columns["gxr_flags"][at]).items():
                    columns[name][at] = value
        schema = with_review_columns(table.schema)
        arrays = [
            pa.array(columns[field.name], field.type) if field.name in columns else table[field.name]
            for field in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)


def _cells(valid: Sequence[Review], flags: Sequence[str] | None) -> Mapping[str, Any]:
    """Return the review cells of a row that has reviews; `valid` are those of its current text."""
    if not valid:
        return {"gxr_flags": [*(flags or ()), STALE_REVIEW]}
    judged = [review for review in valid if review.status != UNREVIEWED]
    said = [review for review in valid if not review.is_empty]
    newest = (judged or said or valid)[-1]  # a comment without a verdict keeps the earlier verdict
    cells: dict[str, Any] = dict(_columns(newest))
    if judged:
        date = newest.reviewed_at.isoformat()
        cells["gxr_disclaimer"] = REVIEWED_DISCLAIMER.format(reviewer=newest.reviewer, date=date)
    elif said:
        cells["gxr_disclaimer"] = DISCLAIMER + REMARKED
    if disagree(valid):
        cells["gxr_flags"] = [*(flags or ()), REVIEWERS_DISAGREE]
    return cells


def same_person(name: str) -> str:
    """Return a reviewer's name normalized for comparison: "Dr. Ray" and "dr.  ray" are one person."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def disagree(reviews: Sequence[Review]) -> bool:
    """Return whether reviewers of one text differ in their verdicts or in their corrected texts."""
    judged = [review for review in reviews if review.status != UNREVIEWED]
    return len({(review.status, review.text) for review in judged}) > 1


def approved(table: pa.Table) -> pa.Table:
    """Return the rows that are generated and approved, and on which reviewers do not disagree."""
    status = pc.is_in(table["gxr_review_status"], value_set=pa.array(APPROVED))
    agreed = pa.array([REVIEWERS_DISAGREE not in (flags or ()) for flags in table["gxr_flags"].to_pylist()], pa.bool_())
    return table.filter(pc.and_(pc.and_(status, agreed), pc.equal(table["gxr_status"], "ok")))


def with_review_columns(schema: pa.Schema) -> pa.Schema:
    """Return the schema of result rows with the review columns added."""
    return pa.schema([*schema, *review_schema()], metadata=schema.metadata)


@contextmanager
def one_import(folder: Path) -> Iterator[None]:
    """Lock out other imports into this run for the block; a running job is not affected. Raises RunLocked."""
    home = folder / REVIEWS_NAME
    with storage_errors(home):
        make_folder(home)
        require_folder(home)
    remove_leftovers(home)
    deadline = time.monotonic() + _LOCK_SECONDS
    with storage_errors(home / _LOCK_NAME):
        descriptor = open_to_change(home / _LOCK_NAME)
    try:
        with storage_errors(home / _LOCK_NAME), suppress(NoLocks):  # then two imports at once are not noticed
            while not try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise RunLocked(
                        "Another import into this run is in progress.",
                        where=str(home.absolute()),
                        next_step="try again",
                    )
                time.sleep(_LOOK_SECONDS)
        yield
    finally:
        os.close(descriptor)


def add_reviews(folder: Path, reviews: Sequence[Review], metadata: Mapping[str, str]) -> Path:
    """Write reviews as one new file of a run, inside `one_import`. Raises StorageError."""
    home = folder / REVIEWS_NAME
    number = next_number(home, (int(path.stem.rpartition("-")[2]) for path in review_files(folder)))
    target = home / f"review-{number:08d}.parquet"
    schema = _file_schema().with_metadata({**metadata, FORMAT_MARK: str(FORMAT)})
    rows = [
        {
            "gxr_row_id": review.key.row_id,
            "gxr_sample": review.key.sample,
            "gxr_judged_sha256": review.judged_sha256,
            **_columns(review),
        }
        for review in reviews
    ]
    table = pa.Table.from_pylist(rows, schema=schema)

    def write(file: BinaryIO) -> None:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)

    write_whole(target, write)
    return target


def _columns(review: Review) -> dict[str, Any]:
    return {
        "gxr_review_status": review.status,
        "gxr_review_quality": review.quality,
        **{f"gxr_review_{name}": count for name, count in zip(ERROR_COUNTS, review.errors, strict=True)},
        "gxr_review_text": review.text,
        "gxr_review_comment": review.comment,
        "gxr_reviewer": review.reviewer,
        "gxr_reviewed_at": review.reviewed_at,
    }


def _file_schema() -> pa.Schema:
    names = ("gxr_row_id", "gxr_judged_sha256", "gxr_review_status")
    key = [*(pa.field(name, pa.string()) for name in names), pa.field("gxr_sample", pa.int32())]
    return pa.schema([*key, *review_schema()])


def review_files(folder: Path) -> list[Path]:
    """Return the review files in the order of their numbers. Raises StorageError if their folder cannot be read."""
    home = folder / REVIEWS_NAME
    with storage_errors(home):  # glob() finds nothing in a folder that it may not read
        try:
            return sorted(path for path in home.iterdir() if _NAME.fullmatch(path.name))
        except FileNotFoundError:
            return []


def refuse_later_reviews(folder: Path) -> None:
    """Raise LaterVersion if a later version wrote a review file. Files that cannot be read are passed over."""
    try:
        files = review_files(folder)
    except StorageError:  # does not affect a run; `Reviews.load` reports it
        return
    for path in files:
        try:
            with parquet_file(path) as file:
                stored = file.schema_arrow
        except MemoryError:
            raise
        except (OSError, pa.ArrowException, ValueError):  # `Reviews.load` reports damage
            continue
        refuse_later_file(path, stored, _file_schema().names)


def _read(path: Path) -> list[Review]:
    damaged = RunError(
        "A review file is damaged.",
        where=str(path.absolute()),
        next_step=f"rename it to {path.name}.damaged and import its sheets again",
    )
    with reading(path, damaged):
        try:
            with parquet_file(path, page_checksum_verification=True) as file:
                refuse_later_file(path, file.schema_arrow, _file_schema().names)
                table = file.read()
            table.validate(full=True)
            if not set(_KEY_COLUMNS) <= set(table.column_names):
                raise ValueError
            table = with_missing_columns(table, _file_schema().names, _file_schema())
            return [_review(row) for row in table.cast(_file_schema()).to_pylist()]
        except (ValueError, LookupError, TypeError, OverflowError):  # a date beyond the years that Python knows
            raise damaged from None


def _review(row: Mapping[str, Any]) -> Review:
    if row["gxr_review_status"] not in REVIEW_STATUSES or not row["gxr_row_id"] or row["gxr_sample"] is None:
        raise ValueError
    if row["gxr_reviewed_at"] is None:
        raise ValueError
    return Review(
        key=Key(row["gxr_row_id"], row["gxr_sample"]),
        judged_sha256=row["gxr_judged_sha256"],
        status=row["gxr_review_status"],
        reviewer=row["gxr_reviewer"] or "",
        reviewed_at=row["gxr_reviewed_at"],
        quality=row["gxr_review_quality"],
        errors=tuple(row[f"gxr_review_{name}"] for name in ERROR_COUNTS),
        text=row["gxr_review_text"],
        comment=row["gxr_review_comment"],
    )
