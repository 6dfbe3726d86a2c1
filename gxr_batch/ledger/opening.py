"""Opens a run folder to write: makes it, holds its lock, and leaves hint and log in order however the run ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gxr_batch.errors import EngineFailed, GxrError, RunError
from gxr_batch.ledger.files import aside, make_folder, sync_folder
from gxr_batch.ledger.lock import LOCK_NAME, locked
from gxr_batch.ledger.manifest import MANIFEST_NAME
from gxr_batch.ledger.parts import PARTS_NAME, part_numbers
from gxr_batch.ledger.writer import RunWriter
from gxr_batch.storage import storage_errors


@contextmanager
def open_run(folder: Path, *, fresh: bool = False, take_over: bool = False) -> Iterator[RunWriter]:
    """Open a run folder to write, made where it is missing, and hold its lock.

    `fresh` moves an earlier run aside under the name NAME.before-<timestamp>; `take_over` says that its holder on
    another host is dead. Raises RunLocked, StorageError, RunError.
    """
    with storage_errors(folder):
        _refuse_other_folders(folder)
    if fresh and folder.exists() and any(folder.iterdir()):
        with locked(folder, take_over=take_over), storage_errors(folder):
            target = aside(folder)
            folder.rename(target)
            sync_folder(folder.parent)
            (target / LOCK_NAME).write_text("")  # nobody writes there any more
    with storage_errors(folder, gone="The run folder cannot be made there."):
        make_folder(folder / PARTS_NAME)
    with locked(folder, take_over=take_over) as before:
        writer = RunWriter(folder)
        writer.took_over = str(before) if before else ""
        in_order = False
        try:
            yield writer
            in_order = True
        except Exception as error:
            # An engine that broke, or a bug, may be one row's doing; a full disk or a missing model is not.
            in_order = isinstance(error, GxrError) and not isinstance(error, EngineFailed)
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
