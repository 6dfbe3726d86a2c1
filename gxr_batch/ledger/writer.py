"""A run folder opened to write: takes in the table, adds results, seals parts, writes the joined results.

Opened through `open_run`, which holds the folder's lock. Whatever happens in between, what was sealed stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gxr_batch.errors import RunError
from gxr_batch.ledger.files import TEMPORARY_SUFFIX, publish, storage_errors, sync_folder
from gxr_batch.ledger.lock import LOCK_NAME, locked
from gxr_batch.ledger.manifest import MANIFEST_NAME, Manifest, load_manifest
from gxr_batch.ledger.merge import INPUT_NAME, RESULTS_NAME, write_failed, write_results
from gxr_batch.ledger.parts import PARTS_NAME, part_numbers, part_path, write_part
from gxr_batch.ledger.state import Bools, Counts, State
from gxr_batch.ledger.table import keys_of
from gxr_batch.records import Result

# A part is sealed after so many rows or characters even before its time, so that memory stays flat.
_ROWS_A_PART = 16_384
_CHARACTERS_A_PART = 2**25


class Drift(NamedTuple):
    """How the table differs from the one that the previous invocation read, in rows."""

    new: int
    edited: int
    removed: int
    kept: int

    def __str__(self) -> str:
        return f"{self.new:,} new, {self.edited:,} edited, {self.removed:,} removed, {self.kept:,} kept"


class RunWriter:
    """The one writer of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = State(0, 1)
        self.part_metadata: dict[str, str] = {}
        self._open: list[Result] = []
        self._characters = 0
        self._sealed_at = time.monotonic()
        self._next_part = max(part_numbers(folder), default=0) + 1
        self.manifest: Manifest | None = load_manifest(folder) or self._remembered()

    @property
    def incoming_input(self) -> Path:
        """Where the table is to be written before `adopt_input` takes it in."""
        return self.folder / (INPUT_NAME + TEMPORARY_SUFFIX)

    @property
    def previous_input(self) -> Path | None:
        """The table of the previous invocation, None in the first."""
        path = self.folder / INPUT_NAME
        return path if path.exists() else None

    def adopt_input(self, samples: int) -> Drift | None:
        """Make the incoming table the run's table and look up what the parts say of it.

        Returns how it differs from the previous one, None in a run's first invocation. Raises StorageError, RunError.
        """
        previous = self.previous_input
        drift = _drift(previous, self.incoming_input) if previous else None
        with storage_errors(self.folder / INPUT_NAME):
            publish(self.incoming_input, self.folder / INPUT_NAME)
        self.rescan(samples)
        return drift

    def rescan(self, samples: int) -> None:
        """Look up again what the parts say of every key of the table."""
        self.state = State.scan(self.folder, self.folder / INPUT_NAME, samples)

    def add(self, position: int, result: Result) -> None:
        """Book one result for the row at `position`; it is safe only once `seal` has run. Raises StorageError."""
        self.state.record(position, result, self._next_part, len(self._open))
        self._open.append(result)
        self._characters += len(result.text or "")
        if len(self._open) >= _ROWS_A_PART or self._characters >= _CHARACTERS_A_PART:
            self.seal()

    def seal_if_due(self, seconds: float) -> None:
        """Seal the open part where the last one was sealed at least `seconds` ago. Raises StorageError."""
        if time.monotonic() - self._sealed_at >= seconds:
            self.seal()

    def seal(self) -> None:
        """Write the results added since the last part as a part of their own. Raises StorageError."""
        if self._open:
            write_part(self.folder, self._next_part, self._open, self.part_metadata)
            self._open, self._characters = [], 0
            self._next_part += 1
        self._sealed_at = time.monotonic()

    def counts(self) -> Counts:
        """Count the keys of the table by state."""
        return self.state.counts()

    def write_results(self, provenance: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Replace results.parquet and failed.parquet by the state as it is now. Raises StorageError."""
        write_results(self.folder, self.state, provenance, metadata)
        write_failed(self.folder, self.state)

    def rows_named(self, row_ids: Sequence[str]) -> Bools:
        """Return which positions have one of these ids. Raises RunError where an id is not in the table."""
        ids = keys_of(self.folder / INPUT_NAME)["gxr_row_id"]
        unknown = [row_id for row_id in row_ids if not pc.any(pc.equal(ids, row_id)).as_py()]
        if unknown:
            raise RunError(f"The table has no row {', '.join(unknown)}.", next_step="row ids stand in gxr_row_id")
        named: Bools = pc.is_in(ids, value_set=pa.array(row_ids, pa.string())).to_numpy()
        return named

    def write_failed(self) -> None:
        """Replace failed.parquet alone, for a run that ends before all its rows are done. Raises StorageError."""
        write_failed(self.folder, self.state)

    def results_metadata(self) -> dict[str, str]:
        """Return the key-value metadata of results.parquet, {} where it or the run's table is missing or damaged."""
        try:
            with pq.ParquetFile(self.folder / RESULTS_NAME) as file:
                ids = file.read(columns=["gxr_row_id"])["gxr_row_id"]
            rows = keys_of(self.folder / INPUT_NAME).num_rows
        except (RunError, OSError, pa.ArrowException, ValueError, LookupError):
            return {}
        return file_metadata(self.folder / RESULTS_NAME) if len(pc.unique(ids)) == rows else {}

    def _remembered(self) -> Manifest | None:
        """Return what the newest part says of a run whose run.json is lost; None where there is no part."""
        marks = file_metadata(part_path(self.folder, self._next_part - 1))
        try:
            known = {name: json.loads(marks[f"gxr_{name}"]) for name in ("resolved", "fingerprint")}
        except (ValueError, KeyError):  # the part is damaged, which is said where it is read
            return None
        return Manifest(name=self.folder.name, created_at="", job={}, **known)


def file_metadata(path: Path) -> dict[str, str]:
    """Return a Parquet file's key-value metadata as text, {} where it cannot be read."""
    try:
        pairs = pq.read_schema(path).metadata or {}
        return {key.decode(): value.decode() for key, value in pairs.items() if key.startswith(b"gxr_")}
    except (OSError, pa.ArrowException, ValueError):
        return {}


@contextmanager
def open_run(folder: Path, *, fresh: bool = False) -> Iterator[RunWriter]:
    """Open a run folder to write, made where it is missing, and hold its lock.

    `fresh` moves an earlier run aside under the name NAME.before-<timestamp>. Raises RunLocked, StorageError, RunError.
    """
    with storage_errors(folder):
        _refuse_other_folders(folder)
    if fresh and folder.exists() and any(folder.iterdir()):
        with locked(folder), storage_errors(folder):
            folder.rename(_aside(folder))
            sync_folder(folder.parent)
    with storage_errors(folder):
        (folder / PARTS_NAME).mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield RunWriter(folder)


def _aside(folder: Path) -> Path:
    stamp = datetime.now().astimezone().strftime("%Y%m%dT%H%M%S")
    target = folder.with_name(f"{folder.name}.before-{stamp}")
    number = 2
    while target.exists():
        target = folder.with_name(f"{folder.name}.before-{stamp}-{number}")
        number += 1
    return target


def _refuse_other_folders(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError("The output path is a file, not a folder.", where=str(folder.absolute()))
    # Names such as "parts" stand in many folders; what only a run has decides. A run that was killed at its very start
    # leaves an empty folder of parts behind.
    names = {path.name for path in folder.iterdir()}
    ours = names & {MANIFEST_NAME, LOCK_NAME} or part_numbers(folder)
    started = names == {PARTS_NAME} and not any((folder / PARTS_NAME).iterdir())
    if names and not ours and not started:
        raise RunError(
            "The output folder holds other things than a run of gxr-batch.",
            where=str(folder.absolute()),
            next_step="choose an empty or a new folder with --output",
        )


def _drift(previous: Path, current: Path) -> Drift:
    old, new = keys_of(previous), keys_of(current)
    position = pc.index_in(new["gxr_row_id"], value_set=old["gxr_row_id"])
    known = len(position) - position.null_count
    kept = pc.sum(pc.equal(old["gxr_content_hash"].take(position), new["gxr_content_hash"])).as_py() or 0
    return Drift(new=new.num_rows - known, edited=known - kept, removed=old.num_rows - known, kept=kept)


def encode_metadata(values: Mapping[str, Any]) -> dict[str, str]:
    """Turn values into Parquet metadata: text stays, everything else becomes JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
