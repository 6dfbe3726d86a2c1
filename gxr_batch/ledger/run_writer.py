"""A run folder opened for writing: reads the table, adds results, seals parts, writes the merged results.

Opened through `open_run`, which makes the folder, holds its lock, and closes hint and log however the run ends.
Whatever happens in between, sealed rows are kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import quoted
from gxr_batch.disk import (
    aside,
    make_folder,
    publish,
    put_aside,
    sha256_of,
    storage_errors,
    sync_folder,
)
from gxr_batch.errors import EngineFailed, EngineUnavailable, GxrError, RunError
from gxr_batch.files import remove_leftovers, temporary_path
from gxr_batch.forms import Form
from gxr_batch.ledger.compaction import (
    FULL_BYTES,
    FULL_ROWS,
    PartInfo,
    compact,
    drop_sources,
    due,
    part_info,
    part_infos,
)
from gxr_batch.ledger.inflight import InFlight
from gxr_batch.ledger.input_copy import Index, has_footer, is_sound, key_batches, rows_of, sha256_of_copy
from gxr_batch.ledger.join import INPUT_NAME, RESULTS_NAME, write_failed, write_results
from gxr_batch.ledger.lock import LOCK_NAME, Lock, locked
from gxr_batch.ledger.log import RunLog
from gxr_batch.ledger.manifest import MANIFEST_NAME, Manifest, known_manifest, refuse_later_run, refuse_links
from gxr_batch.ledger.parts import (
    PARTS_NAME,
    DamagedPart,
    file_metadata,
    next_part_number,
    part_numbers,
    part_path,
    write_part,
)
from gxr_batch.ledger.state import Bools, Counts, State
from gxr_batch.records import Result


class Drift(NamedTuple):
    """How the table differs from the one that the previous invocation read, in rows."""

    new: int
    edited: int
    removed: int
    kept: int

    def __str__(self) -> str:
        return f"{self.new:,} new, {self.edited:,} edited, {self.removed:,} removed, {self.kept:,} kept"


class RunWriter:
    """The one writer of a run folder. `set_aside` are the new names of damaged files."""

    def __init__(self, folder: Path, lock: Lock) -> None:
        self.folder, self._lock = folder, lock
        for home in (folder, folder / PARTS_NAME):
            remove_leftovers(home)
        self.incoming_input = temporary_path(folder / INPUT_NAME)  # where to write the table, for `adopt_input`
        self.kept: Path | None = None  # the earlier run, under the name that `fresh` gave it
        self.state = State(0, 1)
        self.part_metadata: dict[str, str] = {}
        self._open: list[Result] = []
        self._characters = 0
        self._sealed_at = time.monotonic()
        self.set_aside: list[str] = []
        self.took_over = str(lock.before) if lock.before else ""  # the holder on another host that was taken over
        self._next_part = next_part_number(folder)
        self._parts: list[PartInfo] = []
        self.manifest: Manifest | None = known_manifest(folder)
        self.in_flight = InFlight(folder)
        self.log = RunLog(folder)
        if self.previous_input and not is_sound(self.previous_input):
            self.set_aside.append(put_aside(self.previous_input))

    def require_lock(self) -> None:
        """Raise StorageError if another process may be writing this run, before anything is written."""
        self._lock.require()
        refuse_links(self.folder)

    @property
    def previous_input(self) -> Path | None:
        """The table of the previous invocation, None in the first."""
        path = self.folder / INPUT_NAME
        return path if path.exists() else None

    def adopt_input(self, samples: int) -> Drift | None:
        """Make the incoming table the run's table and look up its rows in the parts.

        Returns the difference from the previous one, None in a run's first invocation. Raises StorageError, RunError.
        """
        self.require_lock()
        previous = self.previous_input
        drift = _drift(previous, self.incoming_input) if previous else None
        with storage_errors(self.folder / INPUT_NAME):
            publish(self.incoming_input, self.folder / INPUT_NAME)
        self.rescan(samples)
        return drift

    def rescan(self, samples: int) -> None:
        """Look up every key of the table in the parts again, and set damaged parts aside."""
        self.state = State.scan(self.folder, self.folder / INPUT_NAME, samples, whole=True)
        self.set_aside += [put_aside(part_path(self.folder, number)) for number in self.state.damaged]
        self._parts = drop_sources(self.folder, part_infos(self.folder))

    def damage(self) -> list[str]:
        """Return messages about the damaged files that were set aside."""
        parts = [name for name in self.set_aside if name.startswith("part-")]
        what, whose = ("part was", "its") if len(parts) == 1 else ("parts were", "their")
        about_parts = f"{len(parts):,} damaged {what} set aside: {', '.join(parts)}; {whose} rows are generated again."
        others = [f"{INPUT_NAME} was damaged and set aside as {name}." for name in self.set_aside if name not in parts]
        return ([about_parts] if parts else []) + others

    def add(self, position: int, result: Result) -> None:
        """Record one result for the row at `position`; it is durable only after `seal`. Raises StorageError."""
        self.state.record(position, result, self._next_part, len(self._open))
        self._open.append(result)
        self._characters += len(result.text or "")
        if len(self._open) >= FULL_ROWS or self._characters >= FULL_BYTES:  # early, to bound memory
            self.seal()

    def seal_if_due(self, seconds: float) -> None:
        """Seal the open part if the last one was sealed at least `seconds` ago. Raises StorageError."""
        if time.monotonic() - self._sealed_at >= seconds:
            self.seal()

    def seal(self) -> None:
        """Write the results added since the last part as a new part. Raises StorageError."""
        if self._open:
            self.require_lock()
            number, results = self._next_part, self._open
            write_part(self.folder, number, results, self.part_metadata)
            # First: whatever fails from here on, these rows are safe and the number is not reused.
            self._next_part, self._open, self._characters = number + 1, [], 0
            self._log_part(number, results)
            self._parts.append(part_info(self.folder, number))
            self._compact()
        self._sealed_at = time.monotonic()

    def _compact(self) -> None:
        """Compact the newest parts while there are enough of them. A damaged part leaves all unchanged."""
        while sources := due(self._parts):
            # If this fails, no part is compacted before the next invocation, and the number is not reused.
            others, self._parts = self._parts[: -len(sources)], []
            number, self._next_part = self._next_part, self._next_part + 1
            try:
                compacted = compact(self.folder, sources, number)
            except DamagedPart:  # the next invocation sets it aside and generates its rows again
                return
            self._parts = [*others, compacted]
            self.log.event("parts_united", part=compacted.number, rows=compacted.rows, parts=len(sources))

    def _log_part(self, number: int, sealed: Sequence[Result]) -> None:
        failed = [result for result in sealed if result.status == "failed"]
        held = [result for result in sealed if result.status == "held"]
        self.log.event("part_sealed", part=number, rows=len(sealed), failed=len(failed), held=len(held))
        for results, name in ((failed, self.log.row_failed), (held, self.log.row_held)):
            for result in results:
                name(result.row_id, result.sample, result.attempt, result.error or "")

    def drop_unsealed(self) -> None:
        """Forget the results that could not be sealed, so that the state is what the next invocation will find."""
        if self._open:
            self.require_lock()
            self._open, self._characters = [], 0
            self.rescan(self.state.samples)

    def save_manifest(self, manifest: Manifest) -> None:
        """Replace run.json. Raises StorageError."""
        self.require_lock()
        manifest.save(self.folder)

    def counts(self) -> Counts:
        """Count the keys of the table by state."""
        return self.state.counts()

    def write_results(
        self, provenance: Mapping[str, Any], metadata: Mapping[str, str], form: Form | None = None
    ) -> str:
        """Replace results.parquet and failed.parquet with the current state; return the sha256 of the results.

        Raises StorageError.
        """
        self.require_lock()
        write_results(self.folder, self.state, provenance, metadata, form)
        self.write_failed()
        with storage_errors(self.folder / RESULTS_NAME):
            return sha256_of(self.folder / RESULTS_NAME)

    def rows_named(self, row_ids: Sequence[str]) -> Bools:
        """Return which positions have one of these ids. Raises RunError if an id is not in the table."""
        at = self.positions_of(row_ids)
        if unknown := [row_id for row_id in row_ids if row_id not in at]:
            raise RunError(
                f"The table has no row {', '.join(map(quoted, unknown[:10]))}.",
                where="--row",
                next_step="see the column gxr_row_id",
            )
        named: Bools = np.zeros(self.state.rows, np.bool_)
        named[list(at.values())] = True
        return named

    def keys_at(self, rows: Bools) -> dict[str, str]:
        """Return the row ids and content hashes of the rows in a mask."""
        found: dict[str, str] = {}
        start = 0
        for batch in key_batches(self.folder / INPUT_NAME):
            chosen = batch.filter(pa.array(rows[start : start + batch.num_rows]))
            found |= zip(*(column.to_pylist() for column in chosen.columns), strict=True)
            start += batch.num_rows
        return found

    def positions_of(self, row_ids: Sequence[str]) -> dict[str, int]:
        """Return the positions of these rows in the table; unknown ids are left out."""
        found: dict[str, int] = {}
        wanted, start = pa.array(row_ids, pa.string()), 0
        for batch in key_batches(self.folder / INPUT_NAME):
            ids = batch.column(0)
            at = np.flatnonzero(pc.is_in(ids, value_set=wanted))
            found |= zip(ids.take(pa.array(at)).to_pylist(), (start + at).tolist(), strict=True)
            start += batch.num_rows
        return found

    def write_failed(self) -> None:
        """Replace only failed.parquet, for a run that ends before all its rows are done. Raises StorageError."""
        self.require_lock()
        write_failed(self.folder, self.state)

    def table_sha256(self) -> str:
        """Return the sha256 of the run's copy of its table, hex. Raises RunError, StorageError."""
        return sha256_of_copy(self.folder / INPUT_NAME)

    def results_metadata(self, sha256: str | None) -> dict[str, str]:
        """Return the metadata of results.parquet if it has this sha256 and every part is sound, else {}."""
        path = self.folder / RESULTS_NAME
        if self.previous_input is None:  # missing, or set aside when the run was opened
            return {}
        with suppress(OSError):
            if sha256 == sha256_of(path) and all(
                has_footer(part_path(self.folder, number)) for number in part_numbers(self.folder)
            ):
                return file_metadata(path)
        return {}


def _drift(previous: Path, current: Path) -> Drift:
    old = Index(previous)
    known = kept = 0
    for batch in key_batches(current):
        position = old.find(batch.column(0))
        known += int((position >= 0).sum())
        kept += int(old.same_content(position, batch.column(1)).sum())
    return Drift(new=rows_of(current) - known, edited=known - kept, removed=rows_of(previous) - known, kept=kept)


def encode_metadata(values: Mapping[str, Any]) -> dict[str, str]:
    """Encode values as Parquet metadata: text as it is, everything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


@contextmanager
def open_run(folder: Path, *, fresh: bool = False, take_over: bool = False) -> Iterator[RunWriter]:
    """Open a run folder for writing, create it if missing, and hold its lock.

    `fresh` renames an earlier run to NAME.before-<timestamp>; `take_over` declares the lock's holder on
    another host dead. Raises RunLocked, StorageError, RunError.
    """
    kept = None
    with storage_errors(folder):
        _refuse_other_folders(folder)
        if fresh and folder.is_symlink():
            folder = folder.resolve()  # the run is renamed, not the link, which leads to the new run then
    if fresh and folder.exists() and any(folder.iterdir()):
        with locked(folder, take_over=take_over), storage_errors(folder):
            kept = aside(folder)
            folder.rename(kept)
            sync_folder(folder.parent)
    refuse_links(folder)
    refuse_later_run(folder)  # before anything is written here, the lock included
    with storage_errors(folder, gone="The run folder cannot be created there."):
        make_folder(folder / PARTS_NAME)
    with locked(folder, take_over=take_over) as lock:
        refuse_later_run(folder)  # again: it may have appeared in between
        writer = RunWriter(folder, lock)
        writer.kept = kept
        in_order = False
        try:
            yield writer
            in_order = True
        except Exception as error:
            # A row may cause an engine failure or a bug, but not a full disk, a missing model or a refused token.
            blameless = isinstance(error, EngineUnavailable) or not isinstance(error, EngineFailed)
            in_order = isinstance(error, GxrError) and blameless
            writer.log.failed(error)
            raise
        except BaseException as error:  # a signal
            in_order = True
            writer.log.failed(error)
            raise
        finally:
            writer.in_flight.close(in_order=in_order)
            writer.log.close()


def _refuse_other_folders(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(
            "The output path is a file, not a folder.",
            where=str(folder.absolute()),
            next_step="choose another --output",
        )
        # Names such as "parts" occur in many folders; files that only a run has decide. A run that was killed right at
        # the beginning leaves an empty parts folder behind.
    names = {path.name for path in folder.iterdir()}
    marks = names & {MANIFEST_NAME, LOCK_NAME}
    ours = any(not (folder / name).is_dir() for name in marks) or part_numbers(folder)
    started = names == {PARTS_NAME} and not any((folder / PARTS_NAME).iterdir())
    if names and not ours and not started:
        raise RunError(
            "The output folder is not empty and is not a run of gxr-batch.",
            where=str(folder.absolute()),
            next_step="choose an empty or a new folder with --output",
        )
