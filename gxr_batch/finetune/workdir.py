"""The two folders of a fine-tuning: the finished adapter, and next to it the training in progress.

    NAME/               the adapter: weights, tokenizer, README.md, evaluation; appears once the training is finished
    NAME.training/      finetune.json (settings, data, starts), checkpoints, run.lock; can be deleted once NAME exists

One process works in them at a time. The record has a fingerprint of everything that decides the adapter; a training
with other settings or data never resumes this one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from gxr_batch.cells import quoted
from gxr_batch.disk import (
    aside,
    denied,
    follow_umask,
    library_errors,
    make_folder,
    not_plain,
    put_aside,
    sha256_of,
    storage_errors,
    sync_folder,
    write_text,
)
from gxr_batch.errors import FingerprintError, RunError, StorageError
from gxr_batch.files import NoObject, NotPlain, open_plain, read_json, require_folder
from gxr_batch.ledger.lock import Lock, locked

RECORD_NAME = "finetune.json"
FORMAT = 1
PACKAGES = ("trl", "peft", "datasets")
# What a resume reads from a checkpoint.
WEIGHTS, OPTIMIZER, SCHEDULER = "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"
RANDOM, STATE = "rng_state.pth", "trainer_state.json"
_READ = (WEIGHTS, OPTIMIZER, SCHEDULER, RANDOM, STATE)
_COMPLETE = "complete.json"  # written last in a checkpoint: the sha256 of these files
_NUMBERED = re.compile(r"checkpoint-([1-9][0-9]{0,17})")
_CHECKPOINTS_KEPT = 2  # the newest may be incomplete after a power failure
_PARTIAL = "adapter.partial"


@dataclass(kw_only=True)
class Record:
    """The content of finetune.json: settings, fingerprint, data, and each invocation (`starts`).

    `resolved`: values known once the model is loaded, such as the number format; they are compared like the
    fingerprint.
    """

    name: str
    created_at: str
    job: dict[str, Any]
    fingerprint: dict[str, Any]
    data: dict[str, Any]
    resolved: dict[str, Any] = field(default_factory=dict)
    loss_before: float | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Replace the folder's record. Raises StorageError."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_text(folder / RECORD_NAME, text)

    def compare(self, fingerprint: Mapping[str, Any], where: Path) -> None:
        """Raise FingerprintError, naming the keys, if this fingerprint differs from the stored one."""
        _refuse_changes(self.fingerprint, fingerprint, where)

    def settle(self, resolved: Mapping[str, Any], folder: Path) -> None:
        """Store the resolved values. Raises FingerprintError if an earlier invocation had others."""
        if self.resolved:
            _refuse_changes(self.resolved, resolved, folder)
        self.resolved = dict(resolved)


class Checkpoint(NamedTuple):
    """A checkpoint's folder and step."""

    folder: Path
    step: int


class Flaw(NamedTuple):
    """Why a checkpoint cannot be used: its step, the file, and what is wrong with that."""

    step: int
    path: Path
    why: str


def _refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], where: Path) -> None:
    changed = [
        f"{quoted(key)} ({_brief(old.get(key))} -> {_brief(value)})"
        for key, value in new.items()
        if old.get(key) != value
    ]
    if changed:
        raise FingerprintError(
            f"This adapter was started with other settings or data: {', '.join(changed)}.",
            where=str(where.absolute()),
            next_step="add --fresh to start from scratch (the old folders are kept under other names), choose another "
            "--output, or restore the old values",
        )


class Work:
    """The folders of one training, with the lock held. `adapter`: the folder of the result."""

    def __init__(self, adapter: Path, lock: Lock | None = None) -> None:
        self.adapter, self.folder = adapter, training_folder(adapter)
        self._lock = lock
        self.record = _load(adapter) or _load(self.folder)

    @property
    def finished(self) -> bool:
        """Whether the adapter exists."""
        return self.adapter.exists()

    @property
    def checkpoints(self) -> Path:
        """The folder of the trainer's checkpoints."""
        return self.folder / "checkpoints"

    def begin(self, record: Record) -> Record:
        """Return the stored record, or save and return this one if none is stored.

        Raises FingerprintError if the stored record is of another training, StorageError.
        """
        if self.record is None:
            self.record = record
            record.save(self.folder)
        else:
            self.record.compare(record.fingerprint, self.adapter if self.finished else self.folder)
            # What decides the adapter is the same; whatever else was stored, this invocation's is what it is made of.
            self.record.job, self.record.data = record.job, record.data
        return self.record

    def sealed_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints that were completed, newest first, and remove the others. Raises StorageError.

        What else is there under a checkpoint's name (a file, a link) is among them, so that it is reported.
        """
        found = []
        with storage_errors(self.checkpoints):
            require_folder(self.checkpoints)
            for entry in list(os.scandir(self.checkpoints)):
                if numbered := _NUMBERED.fullmatch(entry.name):
                    path = Path(entry.path)
                    if entry.is_dir(follow_symlinks=False) and not os.path.lexists(path / _COMPLETE):
                        shutil.rmtree(path)  # a killed invocation was writing it
                    else:
                        found.append(Checkpoint(path, int(numbered[1])))
        return sorted(found, key=lambda checkpoint: -checkpoint.step)

    def flaw(self, checkpoint: Checkpoint) -> Flaw | None:
        """Return what is wrong with a checkpoint, None if it holds the files that were written. Raises StorageError."""
        path, why = checkpoint.folder, ""
        try:
            require_folder(path)
            path = checkpoint.folder / _COMPLETE
            written = read_json(path)
            for name in _READ:
                path = checkpoint.folder / name
                found = sha256_of(path)
                if written and written.get(name) != found:  # earlier versions recorded nothing
                    return Flaw(checkpoint.step, path, "it is not what was written")
        except NoObject as error:
            why = str(error)
        except NotPlain as error:
            why = str(error.strerror)
        except FileNotFoundError:
            why = "it is missing"
        except IsADirectoryError:
            why = "it is a folder"
        except NotADirectoryError:
            why = "it is a file, not a folder"
        except OSError:
            with storage_errors(path):
                raise
        return Flaw(checkpoint.step, path, why) if why else None

    def set_aside(self, flaws: list[Flaw]) -> str:
        """Rename checkpoints that cannot be used, so that they are kept; return a notice. Raises StorageError."""
        names = [put_aside(self.checkpoints / f"checkpoint-{flaw.step}") for flaw in flaws]
        first = flaws[0]
        others = f" {len(flaws) - 1} more cannot be used either." if len(flaws) > 1 else ""
        return (
            f"A checkpoint cannot be used: {quoted(first.path.relative_to(self.checkpoints))}: {first.why}.{others} "
            f"Kept as {', '.join(names)}."
        )

    def refuse(self, flaw: Flaw) -> StorageError:
        """Return the error if no checkpoint can be used."""
        return StorageError(
            f"No checkpoint of this training can be used: {flaw.why}.",
            where=str(flaw.path.absolute()),
            next_step="restore it or move it away, or add --fresh to start from scratch (the old folder is kept under "
            "another name)",
        )

    @contextmanager
    def checkpointing(self, step: int, most: int) -> Iterator[None]:
        """Make the block's checkpoint durable, mark it as complete and remove old ones. Raises StorageError.

        `most`: bytes of its largest file, at most. The block writes to a folder that is new, so that nothing is written
        through a link that somebody put there.
        """
        self._require_lock()
        folder = self.checkpoints / f"checkpoint-{step}"
        with storage_errors(folder):
            require_folder(self.checkpoints)
            if os.path.lexists(folder):
                put_aside(folder)
            folder.mkdir()
            try:
                with library_errors(folder, most):
                    yield
                follow_umask(folder)
                _sync_tree(folder)
                written = {name: sha256_of(folder / name) for name in _READ}
                write_text(folder / _COMPLETE, json.dumps(written, indent=2) + "\n")
                self._require_lock()
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)  # free its disk space
                raise
            sync_folder(self.checkpoints)
            earlier = [one.folder for one in self.sealed_checkpoints() if one.step <= step]
            for old in [path for path in earlier if stat.S_ISDIR(os.lstat(path).st_mode)][_CHECKPOINTS_KEPT:]:
                shutil.rmtree(old)

    def _require_lock(self) -> None:
        """Raise StorageError if another process may write to these folders."""
        if self._lock is not None:
            self._lock.require()

    @contextmanager
    def publishing(self) -> Iterator[Path]:
        """Yield an empty folder, and make it the adapter once it is filled and durable. Raises StorageError."""
        partial = self.folder / _PARTIAL
        with storage_errors(self.adapter):
            if os.path.lexists(partial):
                _remove(partial)  # left by an invocation that was killed here
            partial.mkdir()
            try:
                with library_errors(partial):
                    yield partial
                _sync_tree(partial)
                self._require_lock()
                partial.rename(self.adapter)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)  # free its disk space
                raise
            sync_folder(self.adapter.parent)
            sync_folder(self.folder)


def _remove(path: Path) -> None:
    """Remove a folder with all that it holds, or a file or link. Raises OSError."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()


def training_folder(adapter: Path) -> Path:
    """Return the folder of an adapter's training in progress."""
    return adapter.with_name(f"{adapter.name}.training")


@contextmanager
def open_work(adapter: Path, *, fresh: bool, take_over: bool) -> Iterator[Work]:
    """Open the folders of an adapter and hold their lock for the block.

    `fresh` renames earlier folders; `take_over`: the lock's holder on another host is dead. Raises RunError if the
    output is something else, RunLocked, StorageError.
    """
    folder = training_folder(adapter)
    with storage_errors(adapter):
        _refuse_others(adapter)
    if not fresh and adapter.exists() and not folder.exists():  # finished, and its training folder was deleted
        yield Work(adapter)
        return
    if fresh and folder.exists():
        with locked(folder, take_over=take_over), storage_errors(folder):
            _move(folder)
    if fresh and adapter.exists():
        with storage_errors(adapter):
            _move(adapter)
    with storage_errors(folder, gone="The adapter folder cannot be created there."):
        make_folder(folder)
    with storage_errors(folder / "checkpoints"):
        make_folder(folder / "checkpoints")
    with locked(folder, take_over=take_over) as lock:
        yield Work(adapter, lock)


def _move(folder: Path) -> Path:
    target = aside(folder)
    folder.rename(target)
    sync_folder(folder.parent)
    return target


def _refuse_others(adapter: Path) -> None:
    """Raise RunError if the output exists and is something else."""
    folder = training_folder(adapter)
    for path in (adapter, folder):
        if path.is_symlink() and not path.exists():
            raise RunError("The output is a link that leads nowhere.", where=str(path.absolute()), next_step=_ELSEWHERE)
        if path.exists() and not path.is_dir():
            raise RunError("The output is a file, not a folder.", where=str(path.absolute()), next_step=_ELSEWHERE)
    if adapter.exists() and not (adapter / RECORD_NAME).exists():
        raise RunError(
            "The output folder is not an adapter of gxr-batch finetune.",
            where=str(adapter.absolute()),
            next_step=_ELSEWHERE,
        )


_ELSEWHERE = "choose another --output, or set finetune.output"


def _load(folder: Path) -> Record | None:
    path = folder / RECORD_NAME
    try:
        record = Record(**read_json(path))
        _require_types(record)
        return record  # noqa: TRY300  # an `else` would only separate the return from its try
    except FileNotFoundError:
        return None
    except PermissionError:
        raise denied(path) from None
    except NotPlain as error:
        raise not_plain(path, error) from None
    except (OSError, ValueError, TypeError):
        raise RunError(
            "The record of this training is damaged, or from a later version of gxr-batch.",
            where=str(path.absolute()),
            next_step="update gxr-batch, or add --fresh to start from scratch (the old folder is kept under another "
            "name)",
        ) from None


def _require_types(record: Record) -> None:
    """Raise ValueError if a value is of another type than this version writes, or from a later version."""
    tables = (record.job, record.fingerprint, record.data, record.resolved)
    loss = record.loss_before
    if (
        not all(isinstance(table, dict) for table in tables)
        or not isinstance(record.starts, list)
        or not (loss is None or (isinstance(loss, int | float) and not isinstance(loss, bool)))
        or record.format > FORMAT
    ):
        raise ValueError


def _sync_tree(folder: Path) -> None:
    """Sync every file below a folder, then the folders. Raises OSError."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            with open_plain(path) as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def _brief(value: object) -> str:
    text = quoted(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def now() -> str:
    """Return the current time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
