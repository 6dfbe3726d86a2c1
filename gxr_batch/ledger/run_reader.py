"""A run folder opened for reading: counts, finished rows, metadata. Never blocks a writer or sees half a part."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from gxr_batch.disk import denied, parquet_file, reading
from gxr_batch.errors import RunError
from gxr_batch.forms import Form, form_of_run
from gxr_batch.ledger.input_copy import has_footer, own_fields, sha256_of_copy
from gxr_batch.ledger.join import INPUT_NAME, RESULTS_NAME, merged, merged_schema, stored_schema
from gxr_batch.ledger.lock import Holder, writing
from gxr_batch.ledger.manifest import (
    MANIFEST_NAME,
    Manifest,
    damaged_manifest,
    load_manifest,
    refuse_later_files,
    refuse_links,
)
from gxr_batch.ledger.reviews import Reviews, with_review_columns
from gxr_batch.ledger.state import State

if TYPE_CHECKING:
    import pandas as pd
_ROWS_A_SLICE = 65_536


class RunReader:
    """One run folder, read in its current state. Raises RunError if it is not a run."""

    def __init__(self, folder: Path) -> None:
        if not is_run(folder):
            _refuse_unreadable(folder)
            raise RunError(
                "There is no run here.",
                where=str(folder.absolute()),
                next_step="name a run folder, e.g. outputs/demo; `gxr-batch run JOB.toml` creates one",
            )
        self.folder = folder
        refuse_links(folder)
        manifest = load_manifest(folder)
        refuse_later_files(folder)
        if manifest is None or not (folder / INPUT_NAME).exists():
            raise RunError("This run has not read its table yet.", where=str(folder.absolute()))
        own_fields(folder / INPUT_NAME)  # raises if it is damaged
        self.manifest: Manifest = manifest

    @cached_property
    def state(self) -> State:
        """The state of every key according to the parts. Damaged parts are ignored."""
        return self._scan(whole=False)

    def _scan(self, *, whole: bool) -> State:
        samples = int(self.manifest.job["sampling"]["samples_per_row"])
        return State.scan(self.folder, self.folder / INPUT_NAME, samples, whole=whole)

    @cached_property
    def form(self) -> Form | None:
        """The form of the run's texts, None if they have none. Raises RunError if its record is damaged."""
        try:
            return form_of_run(self.manifest.fingerprint, self.manifest.job)
        except ValueError:
            raise damaged_manifest(self.folder) from None

    @property
    def holder(self) -> Holder | None:
        """The process that is writing to this run: a live one here, or one on another host, alive or dead."""
        return writing(self.folder)

    @property
    def results(self) -> Path | None:
        """The path of results.parquet, None if the run was never complete or the file is truncated."""
        path = self.folder / RESULTS_NAME
        return path if path.exists() and has_footer(path) else None

    @property
    def results_of_newest(self) -> Path | None:
        """The path of results.parquet if the newest invocation wrote it, else None: the parts may have newer texts."""
        newest = (self.manifest.invocations or [{}])[-1]
        return self.results if "results_sha256" in newest else None

    @property
    def schema(self) -> pa.Schema:
        """The columns of the finished rows, those of reviews included."""
        return with_review_columns(merged_schema(self.folder, self.form))

    @cached_property
    def reviews(self) -> Reviews:
        """The reviews of the generated texts. Raises RunError if a review file is damaged."""
        return Reviews.load(self.folder)

    def finished(self, *, include_held: bool = False, with_content_hash: bool = False) -> Iterator[pa.Table]:
        """Yield the rows finished so far, in input order, as tables of `schema`, with reviews applied.

        The text of a held row is null unless `include_held` is set. `with_content_hash` adds the private column.
        """
        return self.finished_in(self.sound_state(), include_held=include_held, with_content_hash=with_content_hash)

    def finished_in(
        self, state: State, *, include_held: bool = False, with_content_hash: bool = False
    ) -> Iterator[pa.Table]:
        """Like `finished`, for the rows that were finished in an earlier `sound_state`."""
        marks = self.manifest.model.get("provenance", {})
        rows = merged(
            self.folder, state, marks, self.form, include_held=include_held, with_content_hash=with_content_hash
        )
        return map(self.reviews.apply_to, rows)

    def sound_state(self) -> State:
        """Return the current state, after reading every column of the parts; damaged parts are ignored."""
        return self._scan(whole=True)

    def table_sha256(self) -> str:
        """Return the sha256 of the run's copy of its table. Raises RunError, StorageError."""
        return sha256_of_copy(self.folder / INPUT_NAME)


def _refuse_unreadable(folder: Path) -> None:
    try:
        (folder / MANIFEST_NAME).stat()
    except PermissionError:
        raise denied(folder) from None
    except OSError:
        pass


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run."""
    try:
        return not stat.S_ISDIR((folder / MANIFEST_NAME).lstat().st_mode)  # a run may have that name
    except OSError:  # a name too long, a folder that this user may not enter
        return False


def read_results(run_dir: str | Path, *, include_held: bool = False) -> pd.DataFrame:
    """Return the finished rows of a run as a DataFrame with the user's and the result columns, in input order.

    `run_dir` is a run folder. Works at any time: for an unfinished run it returns the rows that are generated, failed
    or held so far; rows still to do are absent. `gxr_started_at` and `gxr_finished_at` are in UTC. The newest review of
    each row is applied: `gxr_review_status`, `gxr_review_text` and the other review columns. The text of a held row is
    left out unless `include_held` is set. Raises RunError if the folder holds no run.
    """
    reader = RunReader(Path(run_dir))
    table = None if include_held else _whole(reader)
    if table is None:
        table = pa.concat_tables([reader.schema.empty_table(), *reader.finished(include_held=include_held)])
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _whole(reader: RunReader) -> pa.Table | None:
    """Return results.parquet if it is readable and up to date, else None: the parts have everything."""
    results = reader.results_of_newest
    if results is None or reader.state.counts().left or reader.holder:
        return None
    try:
        with reading(results, RunError("")), parquet_file(results, page_checksum_verification=True) as file:
            stored = file.read()
    except RunError:
        return None
    if (
        stored_schema(results, reader.form).names != stored.schema.names
        or stored.schema.names != merged_schema(reader.folder, reader.form).names
    ):  # written by another version
        return None
    slices = range(0, stored.num_rows, _ROWS_A_SLICE)
    laid = [reader.reviews.apply_to(stored.slice(start, _ROWS_A_SLICE)) for start in slices]
    return pa.concat_tables([with_review_columns(stored.schema).empty_table(), *laid])
