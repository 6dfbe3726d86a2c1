"""Draws rows for an audit and writes a workbook for each reader, in the order in which to read them.

No workbook shows what others said of its rows; a blind one shows neither model nor flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.audit.audit_files import Audit, add_audit, audits_of
from gxr_batch.audit.draw import By, draw, frame_of
from gxr_batch.errors import RunError
from gxr_batch.export.export_rows import Exported, Source, open_source
from gxr_batch.export.workbook import write_xlsx
from gxr_batch.forms import PREFIX
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.exports import ExportFile
from gxr_batch.ledger.reviews import REVIEWS_NAME, UNREVIEWED, one_import
from gxr_batch.ledger.run_format import next_number
from gxr_batch.records import DISCLAIMER, FLAGS_OF_REVIEWS, Key, review_schema
from gxr_batch.rows.columns import counted

# What a blind workbook keeps besides sections: what the import needs, and what every output says.
_BLIND = {"gxr_row_id", "gxr_sample", "gxr_text", "gxr_prompt_sha256", "gxr_ai_generated", "gxr_disclaimer"}
# Without a seed of the user's own: the draw is the same every time, and no row is chosen by hand.
_SEED = 0


class AuditChoice(NamedTuple):
    """What is asked for: rows in all, readers, rows that all of them read, strata, and the seed (None: the usual)."""

    rows: int
    readers: int = 1
    overlap: int = 0
    by: By | None = None
    seed: int | None = None
    blind: bool = False
    partial: bool = False


class Drew(NamedTuple):
    """The record of the draw, the workbooks, one for each reader, and notes for the user."""

    record: Path
    workbooks: Sequence[Exported]
    notes: Sequence[str]


def export_audit(reader: RunReader, choice: AuditChoice) -> Drew:
    """Draw rows, record the draw, and write the workbooks. Raises RunError, RunLocked, StorageError.

    A later draw continues the first one: it takes other rows, with the same strata and seed.
    """
    if choice.overlap > choice.rows:
        raise RunError("--overlap is more than --audit.", where=f"--overlap {choice.overlap}")
    with one_import(reader.folder):
        audit, notes = _drawn(reader, choice)
        source = open_source(reader, partial=choice.partial)
        table = _table(source, audit)
        workbooks = [_workbook(source, audit, number, table) for number in range(1, choice.readers + 1)]
        # Last: rows count as drawn only if somebody can read them. The same draw would choose the same rows.
        record = add_audit(reader.folder, audit)
    return Drew(record, workbooks, notes)


def _drawn(reader: RunReader, choice: AuditChoice) -> tuple[Audit, list[str]]:
    earlier = audits_of(reader.folder)
    last = earlier[-1] if earlier else None
    by, seed = choice.by, _SEED if choice.seed is None else choice.seed
    if last is not None:
        if choice.by not in {None, last.by} or choice.seed not in {None, last.seed}:
            how = f"by {last.by}" if last.by else "without strata"
            raise RunError(
                f"An earlier draw of this run was made {how}, with seed {last.seed}.",
                where=f"reviews/audit-{last.number:03d}.json",
                next_step="leave out --by and --seed to continue it: together the draws are one random sample",
            )
        by, seed = last.by, last.seed
    before: dict[str, int] = {}
    for audit in earlier:
        for row in audit.rows:
            before[row.stratum] = before.get(row.stratum, 0) + 1
    source = open_source(reader, partial=choice.partial)
    frame = frame_of(source.tables, by, seed, choice.rows + max(before.values(), default=0))
    if last is not None and frame.sha256 != last.frame_sha256:
        raise RunError(
            "The generated rows of this run have changed since the earlier draw.",
            where=f"reviews/audit-{last.number:03d}.json",
            next_step=f"rename it to audit-{last.number:03d}.json.old to draw again; reviews of unchanged texts stay",
        )
    rows = draw(frame, choice.rows, readers=choice.readers, overlap=choice.overlap, seed=seed, before=before)
    audit = Audit(
        number=next_number(reader.folder / REVIEWS_NAME, (one.number for one in earlier)),
        created_at=datetime.now().astimezone().isoformat(timespec="seconds"),
        seed=seed,
        by=by,
        blind=choice.blind,
        readers=choice.readers,
        overlap=choice.overlap,
        frame_rows=frame.rows,
        frame_sha256=frame.sha256,
        rows=rows,
    )
    notes = [f"continues audit {last.number:03d}: other rows, together one random sample"] if last else []
    return audit, notes


def _table(source: Source, audit: Audit) -> pa.Table:
    """Return the drawn rows in reading order, as if nobody had reviewed them."""
    places = {row.key: at for at, row in enumerate(audit.rows)}
    wanted = pa.array({key.row_id for key in places}, pa.string())
    found: list[pa.Table] = []
    order: list[int] = []
    for table in source.tables:
        some = table.filter(pc.is_in(table["gxr_row_id"], value_set=wanted))
        keys = [Key(*pair) for pair in zip(some["gxr_row_id"].to_pylist(), some["gxr_sample"].to_pylist(), strict=True)]
        mine = [at for at, key in enumerate(keys) if key in places]
        found.append(some.take(pa.array(mine, pa.int64())))
        order += [places[keys[at]] for at in mine]
    table = pa.concat_tables(found)
    ordered = table.take(pc.sort_indices(pa.array(order, pa.int64())))
    return _unreviewed(ordered, blind=audit.blind)


def _unreviewed(table: pa.Table, *, blind: bool) -> pa.Table:
    reviews = review_schema()
    arrays, fields = [], []
    for field in table.schema:
        column = table[field.name]
        if field.name in reviews.names:
            column = pa.nulls(table.num_rows, field.type)
        elif field.name == "gxr_review_status":
            column = pa.array([UNREVIEWED] * table.num_rows, field.type)
        elif field.name == "gxr_disclaimer":  # that of a reviewed row names the reviewer
            column = pa.array([DISCLAIMER] * table.num_rows, field.type)
        elif field.name == "gxr_flags":
            flags = [_own(one) for one in column.to_pylist()]
            column = pa.array([None] * table.num_rows if blind else flags, field.type)
        elif blind and field.name.startswith("gxr_") and not field.name.startswith(PREFIX) and field.name not in _BLIND:
            continue
        arrays.append(column)
        fields.append(field)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=table.schema.metadata))


def _own(flags: Iterable[str] | None) -> list[str]:
    return [flag for flag in flags or () if flag not in FLAGS_OF_REVIEWS]


def _workbook(source: Source, audit: Audit, number: int, table: pa.Table) -> Exported:
    reader = source.reader
    file = ExportFile(reader, reader.folder / f"audit-{audit.number:03d}-reader-{number}.xlsx")
    at = [place for place, row in enumerate(audit.rows) if number in row.readers]
    own = source._replace(
        schema=table.schema,
        tables=iter([table.take(pa.array(at, pa.int64()))]),
        part=f"audit {audit.number:03d}, reader {number} of {audit.readers}: {counted(len(at), 'row')} drawn at random",
        blind=audit.blind,
    )
    done = write_xlsx(own, file)
    return done._replace(notes=(*done.notes, *file.notes))
