"""Runs `finetune` from job file to adapter folder: read, encode, train or resume, evaluate, write.

Everything that can be refused is refused before the model is loaded. The adapter folder appears once all of it is
written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gxr_batch.cells import quoted
from gxr_batch.errors import JobFileError
from gxr_batch.extras import require
from gxr_batch.files import NoObject, read_json
from gxr_batch.finetune.examples import DataFile, Rows, encode, read_examples, split, steps_of
from gxr_batch.finetune.training_output import Say, Show, quiet
from gxr_batch.finetune.workdir import PACKAGES, Record, Work, now, open_work
from gxr_batch.job import Job
from gxr_batch.models.local_model import LocalModel
from gxr_batch.models.source import find
from gxr_batch.records import Identity
from gxr_batch.rows.columns import counted
from gxr_batch.run.stop import Stopper, StopReason

_KIND = "finetune"
# Settings that do not change the adapter: paths, and how often it logs and evaluates.
_NOT_DECISIVE = {"data", "output", "logging_steps", "eval_steps", "sample_rows", "max_steps", "epochs"}
_PLACES_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options in addition to the job file."""

    fresh: bool = False
    take_over: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of an invocation. `reason` is None if the adapter is finished; `seconds`: of this invocation."""

    adapter: Path
    reason: StopReason | None
    step: int
    steps: int
    rows: Rows
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float = 0.0
    trained_now: bool = False


def finetune(job: Job, options: Options, stopper: Stopper, say: Say, show: Show) -> Outcome:
    """Train the job's adapter until it is finished or `stopper` stops it.

    Raises GxrError; steps up to the last checkpoint are kept.
    """
    require("finetune", *PACKAGES, purpose="Fine-tuning", where="gxr-batch finetune")
    examples, files = read_examples(job)  # first, to report errors before any model is loaded
    job = _without_adapter(job)
    local = LocalModel(job, _KIND)
    encoded, too_long = encode(examples, local.encoder(), job.model.max_seq_length)
    rows = Rows(*split(encoded, job.finetune.held_out, job.finetune.seed), too_long)
    _notify(rows, job, say)
    adapter = _output(job)
    with open_work(adapter, fresh=options.fresh, take_over=options.take_over) as work:
        record = work.begin(_record(job, rows, files, local.identity()))
        if work.finished:
            return _nothing_to_do(work, rows, job)
        with quiet():  # bitsandbytes warns that it lacks a faster kernel
            from gxr_batch.finetune.make_adapter import Tuning

        began = time.monotonic()
        tuning = Tuning(local.job, rows, local, work, say)
        tuning.run(stopper, show)
        return Outcome(
            adapter=work.adapter,
            reason=None if work.finished else stopper.reason,
            step=tuning.step,
            steps=tuning.steps,
            rows=rows,
            loss_before=record.loss_before,
            loss_after=tuning.loss_after,
            seconds=time.monotonic() - began,
            trained_now=True,
        )


def _output(job: Job) -> Path:
    """Return the adapter folder to make. Raises JobFileError if the path has no name, as that of the root folder."""
    path = Path(job.finetune.output.replace("{name}", job.name))
    if path.name in {"", ".."}:
        raise JobFileError(
            "The adapter needs a separate folder.",
            where=f"finetune.output = {quoted(path)}",
            next_step="name a new folder, e.g. outputs/my-adapter",
        )
    return path


def _without_adapter(job: Job) -> Job:
    """Return the job without an adapter. Raises JobFileError if it names one."""
    if job.model.adapter not in {"", "none"}:
        raise JobFileError(
            "Fine-tuning makes a new adapter and cannot start from another one.",
            where="model.adapter",
            next_step="remove it, or merge that adapter into its base and name the merged folder as model.path",
        )
    if find(job.model, weights=False).path.is_adapter:
        raise JobFileError(
            "Fine-tuning makes a new adapter, but model.path is an adapter.",
            where="model.path",
            next_step="name its base model instead, or merge the two and name the merged folder",
        )
    return job.with_values({"model.adapter": "none"})


def _notify(rows: Rows, job: Job, say: Say) -> None:
    if rows.too_long:
        named = "; ".join(rows.too_long[:_PLACES_NAMED])
        more = len(rows.too_long) - _PLACES_NAMED
        named += f" and {more:,} more" if more > 0 else ""
        say(
            f"{counted(len(rows.too_long), 'row')} left out, because prompt and answer are longer than "
            f"model.max_seq_length = {job.model.max_seq_length} tokens: {named}."
        )
    steps = steps_of(job.finetune, len(rows.training))
    if job.finetune.warmup_steps >= steps:
        say(
            f"finetune.warmup_steps = {job.finetune.warmup_steps}, but there are only {steps:,} steps: the learning "
            "rate never reaches finetune.learning_rate."
        )
    if not rows.held_out:
        say("finetune.held_out = 0: the adapter will not be evaluated on unseen rows.")


def _record(job: Job, rows: Rows, files: list[DataFile], identity: Identity) -> Record:
    section = job.finetune.model_dump(mode="json", exclude=_NOT_DECISIVE)
    fingerprint = {
        "data": rows.sha256,
        "model weights": identity.weights_sha256,
        "model.dtype": job.model.dtype,
        "model.load_in_4bit": job.model.load_in_4bit,
        "prompt.format": job.prompt.format,
        "finetune.steps": steps_of(job.finetune, len(rows.training)),
        **{f"finetune.{name}": value for name, value in section.items()},
    }
    data = {
        "sha256": rows.sha256,
        "training_rows": len(rows.training),
        "held_out_rows": len(rows.held_out),
        "too_long_rows": len(rows.too_long),
        # Names only: the record is part of the adapter, which may be published.
        "files": [{"name": file.path.name, "rows": file.rows, "sha256": file.sha256} for file in files],
    }
    chosen = job.model_dump(mode="json", include={"name", "prompt", "model", "sampling", "finetune"})
    return Record(name=job.name, created_at=now(), job=chosen, fingerprint=fingerprint, data=data)


def _nothing_to_do(work: Work, rows: Rows, job: Job) -> Outcome:
    steps = steps_of(job.finetune, len(rows.training))
    evaluation: Mapping[str, Any] = {}
    with suppress(OSError, NoObject):  # the file is informative only
        evaluation = read_json(work.adapter / "evaluation.json")
    before, after = (
        loss if isinstance(loss := evaluation.get(name), float) else None for name in ("loss_before", "loss_after")
    )
    return Outcome(
        adapter=work.adapter,
        reason=None,
        step=steps,
        steps=steps,
        rows=rows,
        loss_before=before,
        loss_after=after,
    )
