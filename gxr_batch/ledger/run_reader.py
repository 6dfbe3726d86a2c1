"""A run folder opened to read: counts, finished rows, metadata. Never blocks a writer and never sees half a part."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from gxr_batch.disk import reading
from gxr_batch.errors import RunError
from gxr_batch.ledger.input_copy import has_footer, own_fields
from gxr_batch.ledger.join import INPUT_NAME, RESULTS_NAME, joined, joined_schema, stored_schema
from gxr_batch.ledger.lock import Holder, writing
from gxr_batch.ledger.manifest import MANIFEST_NAME, Manifest, load_manifest, refuse_later_files
from gxr_batch.ledger.reviews import Reviews, laid_over
from gxr_batch.ledger.state import State

if TYPE_CHECKING:
    import pandas as pd
_ROWS_A_SLICE = 65_536


class RunReader:
    """One run folder, read as it is at this moment. Raises RunError if it is none."""

    def __init__(self, folder: Path) -> None:
        if not is_run(folder):
            raise RunError(
                "There is no run here.",
                where=str(folder.absolute()),
                next_step="name the run folder, e.g. outputs/demo; `gxr-batch run JOB.toml` makes one",
            )
        self.folder = folder
        manifest = load_manifest(folder)
        refuse_later_files(folder)
        if manifest is None or not (folder / INPUT_NAME).exists():
            raise RunError("This run has not read its table yet.", where=str(folder.absolute()))
        own_fields(folder / INPUT_NAME)  # raises where it is damaged
        self.manifest: Manifest = manifest

    @cached_property
    def state(self) -> State:
        """What the parts say of every key. A damaged part counts as if it were not there."""
        return self._scan(whole=False)

    def _scan(self, *, whole: bool) -> State:
        samples = int(self.manifest.job["sampling"]["samples_per_row"])
        return State.scan(self.folder, self.folder / INPUT_NAME, samples, whole=whole)

    @property
    def holder(self) -> Holder | None:
        """The process that writes to this run: a living one here, or one on another host, alive or dead."""
        return writing(self.folder)

    @property
    def results(self) -> Path | None:
        """Where results.parquet stands, None if no state of this run was complete yet, or where it is cut off."""
        path = self.folder / RESULTS_NAME
        return path if path.exists() and has_footer(path) else None

    @property
    def schema(self) -> pa.Schema:
        """The columns of the finished rows, those of reviews included."""
        return laid_over(joined_schema(self.folder))

    @cached_property
    def reviews(self) -> Reviews:
        """What people said of the generated texts. Raises RunError if a file of reviews is damaged."""
        return Reviews.load(self.folder)

    def finished(self, *, include_held: bool = False) -> Iterator[pa.Table]:
        """Yield the rows that are done at this moment, in input order, as tables of `schema`, reviews laid over.

        The text of a held row is null unless `include_held` is set.
        """
        marks = self.manifest.model.get("provenance", {})
        tables = joined(self.folder, self._scan(whole=True), marks, include_held=include_held)
        return map(self.reviews.lay_over, tables)


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run."""
    try:
        return (folder / MANIFEST_NAME).exists()
    except OSError:  # a name too long, a folder that this user may not enter
        return False


def read_results(run_dir: str | Path, *, include_held: bool = False) -> pd.DataFrame:
    """Return the finished rows of a run as a DataFrame of the contract's columns, in input order.

    `run_dir` is a run folder. Works at any time: of an unfinished run it returns the rows that are generated, failed or
    held so far; rows still to do are absent. Seconds are seconds, `gxr_started_at` and `gxr_finished_at` are UTC. The
    newest review is laid over each row: `gxr_review_status`, `gxr_review_text` and the other review columns. The text
    of a held row is left out unless `include_held` is set. Raises RunError if the folder holds no run.
    """
    reader = RunReader(Path(run_dir))
    table = None if include_held else _whole(reader)
    if table is None:
        table = pa.concat_tables([reader.schema.empty_table(), *reader.finished(include_held=include_held)])
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _whole(reader: RunReader) -> pa.Table | None:
    """Return results.parquet where it is the run's present state and can be read, else None: the parts know it all."""
    newest = (reader.manifest.invocations or [{}])[-1]
    if "results_sha256" not in newest:  # killed before it wrote them: they are those of an earlier start
        return None
    if reader.results is None or reader.state.counts().left or reader.holder:
        return None
    try:
        with reading(reader.results, RunError("")):
            stored = pq.read_table(reader.results, partitioning=None, page_checksum_verification=True)
    except RunError:
        return None
    if (
        stored_schema(reader.results).names != stored.schema.names
        or stored.schema.names != joined_schema(reader.folder).names
    ):  # those of another version
        return None
    slices = range(0, stored.num_rows, _ROWS_A_SLICE)
    laid = [reader.reviews.lay_over(stored.slice(start, _ROWS_A_SLICE)) for start in slices]
    return pa.concat_tables([laid_over(stored.schema).empty_table(), *laid])
