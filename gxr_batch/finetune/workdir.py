"""The two folders of a fine-tuning: the finished adapter, and next to it the training in progress.

    NAME/               the adapter: weights, tokenizer, README.md, evaluation; appears once the training is finished
    NAME.training/      finetune.json (settings, data, starts), checkpoints, run.lock; can be deleted once NAME exists

One process works in them at a time. The record has a fingerprint of everything that decides the adapter; a training
with other settings or data never resumes this one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gxr_batch.cells import quoted
from gxr_batch.disk import aside, denied, follow_umask, make_folder, storage_errors, sync_folder, write_text
from gxr_batch.errors import FingerprintError, RunError
from gxr_batch.ledger.lock import locked

RECORD_NAME = "finetune.json"
FORMAT = 1
PACKAGES = ("trl", "peft", "datasets")
_COMPLETE = "complete.json"  # written last in a checkpoint
_CHECKPOINT = "checkpoint-"
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

    def __init__(self, adapter: Path, took_over: str) -> None:
        self.adapter, self.folder = adapter, training_folder(adapter)
        self.took_over = took_over
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
        return self.record

    def newest_checkpoint(self) -> tuple[Path, int] | None:
        """Return the newest complete checkpoint and its step, or None."""
        found = []
        for path in self.checkpoints.glob(f"{_CHECKPOINT}*/{_COMPLETE}"):
            number = path.parent.name.removeprefix(_CHECKPOINT)
            if number.isdecimal():
                found.append((int(number), path.parent))
        if not found:
            return None
        step, folder = max(found)
        return folder, step

    def remove_incomplete_checkpoints(self) -> None:
        """Remove incomplete checkpoints, so that they do not displace complete ones. Raises StorageError."""
        with storage_errors(self.checkpoints):
            for path in self.checkpoints.glob(f"{_CHECKPOINT}*"):
                if not (path / _COMPLETE).exists():
                    shutil.rmtree(path)

    def seal(self, checkpoint: Path) -> None:
        """Make a checkpoint durable and mark it as complete. Raises StorageError."""
        with storage_errors(checkpoint):
            follow_umask(checkpoint)
            _sync_tree(checkpoint)
            write_text(checkpoint / _COMPLETE, "{}\n")

    @contextmanager
    def publishing(self) -> Iterator[Path]:
        """Yield an empty folder, and make it the adapter once it is filled and durable. Raises StorageError."""
        partial = self.folder / _PARTIAL
        with storage_errors(self.adapter):
            shutil.rmtree(partial, ignore_errors=True)  # left by an invocation that was killed here
            partial.mkdir()
            try:
                yield partial
                _sync_tree(partial)
                partial.rename(self.adapter)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)  # free its disk space
                raise
            sync_folder(self.adapter.parent)
            sync_folder(self.folder)


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
        yield Work(adapter, "")
        return
    if fresh and folder.exists():
        with locked(folder, take_over=take_over), storage_errors(folder):
            _move(folder)
    if fresh and adapter.exists():
        with storage_errors(adapter):
            _move(adapter)
    with storage_errors(folder, gone="The adapter folder cannot be created there."):
        make_folder(folder / "checkpoints")
    with locked(folder, take_over=take_over) as lock:
        yield Work(adapter, str(lock.before) if lock.before else "")


def _move(folder: Path) -> Path:
    target = aside(folder)
    folder.rename(target)
    sync_folder(folder.parent)
    return target


def _refuse_others(adapter: Path) -> None:
    """Raise RunError if the output exists and is something else."""
    folder = training_folder(adapter)
    for path in (adapter, folder):
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
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(record.fingerprint, dict) or not isinstance(record.starts, list) or record.format > FORMAT:
            raise ValueError
        return record  # noqa: TRY300  # an `else` would only separate the return from its try
    except FileNotFoundError:
        return None
    except PermissionError:
        raise denied(path) from None
    except (OSError, ValueError, TypeError):
        raise RunError(
            "The record of this training is damaged, or from a later version of gxr-batch.",
            where=str(path.absolute()),
            next_step="update gxr-batch, or add --fresh to start from scratch (the old folder is kept under another "
            "name)",
        ) from None


def _sync_tree(folder: Path) -> None:
    """Sync every file below a folder, then the folders. Raises OSError."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def now() -> str:
    """Return the current time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
