"""A run as the table of another job: its table's columns as they are, its results as columns `source_...`.

The rows are those that are finished when the job looks: a run may be read while it is unfinished or still running. Held
rows are never read, because their cells and texts are withheld until a person releases them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import quoted
from gxr_batch.disk import expanded
from gxr_batch.errors import GxrError, TableError
from gxr_batch.job import InputSection
from gxr_batch.ledger import RunReader, State, is_run
from gxr_batch.ledger.reviews import approved
from gxr_batch.records import SOURCE_PREFIX
from gxr_batch.rows.columns import RESERVED_PREFIX, counted
from gxr_batch.rows.null_words import without
from gxr_batch.rows.source_files import Say, changed_error
from gxr_batch.rows.survey import refuse_keys_without_effect

ROW_ID = f"{SOURCE_PREFIX}row_id"


@dataclass(frozen=True, kw_only=True)
class RunSource:
    """The rows of a run that were finished at the time of the survey: a `rows.source_files.Source`.

    `only` is `input.only`; `table_sha256` belongs to the run's copy of its table.
    """

    path: Path
    schema: pa.Schema
    mark: str
    only: str
    reader: RunReader
    state: State
    table_sha256: str

    def batches(self, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
        """Yield the rows as tables of `schema`. Raises TableError if the run's table was replaced meanwhile."""
        words = pa.array(list(nulls), pa.string())
        read = 0
        try:
            for table in self._chosen():
                read += table.num_rows
                yield self._under_final_names(table, words)
        except GxrError:
            if self.changed():
                raise changed_error(self) from None
            raise
        for sentence in self._left_out(read):
            say(sentence)

    def changed(self) -> bool:
        """Return whether the run read its table again since; results that were added since do not count."""
        with suppress(GxrError):
            return self.reader.table_sha256() != self.table_sha256
        return True

    def _chosen(self) -> Iterator[pa.Table]:
        """Yield the rows that the job reads, in the columns of the run."""
        for table in self.reader.finished_in(self.state):
            status = table["gxr_status"]
            if self.only == "approved":
                yield approved(table)
            else:
                yield table.filter(pc.equal(status, "ok") if self.only == "ok" else pc.not_equal(status, "held"))

    def _under_final_names(self, table: pa.Table, words: pa.Array) -> pa.Table:
        columns = [table[name] for name in table.column_names]
        if self.state.samples > 1:
            sample = table["gxr_sample"].cast(pa.string())
            columns[table.column_names.index("gxr_row_id")] = pc.binary_join_element_wise(
                table["gxr_row_id"], sample, "/"
            )
        if len(words):
            columns = [
                pa.chunked_array([without(chunk, words) for chunk in column.chunks], column.type) for column in columns
            ]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _left_out(self, read: int) -> Iterator[str]:
        """Yield notices about the rows of the run that the job does not read."""
        counts = self.state.counts()
        if counts.left:
            now = " and is still running" if self.reader.holder else ""
            yield (
                f"{quoted(self.path)}: this run is unfinished{now}: {counts.total - counts.left:,} of "
                f"{counted(counts.total, 'row')} so far; run this job again later to read the others"
            )
        if self.state.damaged:
            yield (
                f"{quoted(self.path)}: {counted(len(self.state.damaged), 'damaged part')}, whose rows are left out; "
                "`gxr-batch run` of that job generates them again"
            )
        if counts.held:
            yield f"{quoted(self.path)}: {counted(counts.held, 'row')} held by identifier screening: left out"
        names = zip(self.reader.schema.names, self.schema.names, strict=True)
        renamed = [(before, after) for before, after in names if before != after and not _is_result(before)]
        if renamed:
            more = f", and {len(renamed) - 1:,} more alike" if len(renamed) > 1 else ""
            before, after = map(quoted, renamed[0])
            yield f"{quoted(self.path)}: its column {before} is called {after} here{more}"
        if self.only:
            if others := counts.ok + counts.failed - read:
                kind = "not generated" if self.only == "ok" else "not approved"
                yield f"{quoted(self.path)}: {counted(read, 'row')} read, {others:,} {kind} and left out"
        elif counts.failed:
            yield (
                f"{quoted(self.path)}: {counted(counts.failed, 'row')} failed and "
                f'{"has" if counts.failed == 1 else "have"} no source_text; input.only = "ok" leaves them out'
            )


def run_source(section: InputSection) -> RunSource | None:
    """Return the run that the input path names, None if it names no run.

    Raises TableError for a key of [input] without effect on runs, RunError if the run cannot be read, StorageError.
    """
    path = expanded(section.path)
    if not is_run(path):
        return None
    refuse_keys_without_effect(section, {path: "run"})
    reader = RunReader(path)
    table_sha256 = reader.table_sha256()
    state = reader.sound_state()
    names = _final_names(reader.schema.names)
    schema = pa.schema([field.with_name(names[field.name]) for field in reader.schema])
    source = RunSource(
        path=path, schema=schema, mark="", only=section.only, reader=reader, state=state, table_sha256=table_sha256
    )
    return replace(source, mark=_mark(source))


def refuse_own_folder(section: InputSection, output: Path) -> None:
    """Raise TableError if a job would read the run that it writes."""
    path = expanded(section.path)
    if output.exists() and path.samefile(output):
        raise TableError(
            "The job would read the run that it writes.",
            where=f"input.path, run.output: {output.absolute()}",
            next_step="set run.output to another folder",
        )


def id_column_of(section: InputSection, source: RunSource) -> str:
    """Return the column of the row ids: those of the run, unless the job names another column."""
    own = source.reader.manifest.job.get("input", {}).get("id_column", "")
    return ROW_ID if section.id_column in {"", own} else section.id_column


def _final_names(names: list[str]) -> dict[str, str]:
    """Return the name of each column of the run in this job.

    A column of the run's table that has the name of one of the run's results, as in a chain of jobs, gets one more
    prefix.
    """
    results = {name: SOURCE_PREFIX + name.removeprefix(RESERVED_PREFIX) for name in names if _is_result(name)}
    taken = {*results.values(), *names}
    final = dict(results)
    for name in names:
        if _is_result(name):
            continue
        free = name
        if name in results.values():
            while free in taken:
                free = SOURCE_PREFIX + free
            taken.add(free)
        final[name] = free
    return final


def _is_result(name: str) -> bool:
    return name.startswith(RESERVED_PREFIX)


def _mark(source: RunSource) -> str:
    """Return a sha256 over the names, types and cells that the job reads."""
    seen = hashlib.sha256(str(source.schema).encode())
    for table in source.batches((), lambda _: None):
        for batch in table.combine_chunks().to_batches():
            seen.update(batch.serialize())
    return f"run {seen.hexdigest()}"
