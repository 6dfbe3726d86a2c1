"""Checks everything in a job without loading the model: job, templates, table, prompt lengths, adapter, disk space.

It uses the same code as `run`, in a temporary folder, so it finds what a run would find.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

from gxr_batch.disk import temporary_folder, writable_by_others
from gxr_batch.engines import create, resolve_worker
from gxr_batch.engines.slots import KIND, why_no_gpu_kernels
from gxr_batch.engines.slots.backend import PREFIX_SLOTS
from gxr_batch.engines.slots.slot_schedule import slots_for_memory
from gxr_batch.errors import RowError, StorageError
from gxr_batch.job import Job, Screening
from gxr_batch.ledger import Manifest, is_run
from gxr_batch.ledger.manifest import known_manifest, refuse_later_files, refuse_links
from gxr_batch.models.device_memory import gib
from gxr_batch.models.placement import no_kernels
from gxr_batch.models.weights_hash import cache_home
from gxr_batch.records import Identity, Messages
from gxr_batch.rows.ingest import ingest
from gxr_batch.rows.table_reader import read_rows
from gxr_batch.run.fingerprint import fingerprint, follow, refuse_other_texts
from gxr_batch.run.output_folder import output_folder
from gxr_batch.run.pipeline import TRUNCATED, Fitter
from gxr_batch.run.planning import disk_needed
from gxr_batch.run.prepare import Prepared, notices_of, prepare, refuse_emptied
from gxr_batch.text_checks.screening import Screen

_SHOWN = 3
# The guide's two lengths.
_LENGTHS = (2048, 4096)
_LOCAL_ENGINES = ("transformers", "generate")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The number of rows of a length that fit in memory with the model; `slots` is 0 if not even one does."""

    max_seq_length: int
    slots: int


@dataclass(kw_only=True)
class CheckResult:
    """The findings of `check`. `reasons` counts unusable rows by reason, `lengths` are token counts of usable prompts,
    empty if the engine cannot count.

    `cut` counts prompts shortened by prompt.too_long = "truncate". `identifiers` counts usable rows by the rule of
    identifier screening that hits them, `identified` lists their ids. `device` describes where the model would run, and
    `fits` what fits there; both are empty for engines without a local model.
    """

    rows: int = 0
    folder: Path
    resumes: bool = False
    notices: list[str] = field(default_factory=list)
    templates: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    unusable: list[str] = field(default_factory=list)
    cut: int = 0
    screening: Screening = "off"
    identifiers: Counter[str] = field(default_factory=Counter)
    identified: list[str] = field(default_factory=list)
    unscreened: list[str] = field(default_factory=list)
    shown: list[tuple[str, Messages]] = field(default_factory=list)
    bytes_needed: int = 0
    bytes_free: int = 0
    device: str = ""
    fits: list[Fit] = field(default_factory=list)

    @property
    def usable(self) -> int:
        """The number of rows that can become prompts."""
        return self.templates.total()


def check(job: Job, *, limit: int | None, say: Callable[[str], None]) -> CheckResult:
    """Go through a job like `run`, except for loading the model's weights. Raises GxrError if `run` could not start."""
    prepared = prepare(job)
    job = prepared.job
    folder = output_folder(job, date.today())
    refuse_links(folder)
    manifest = known_manifest(folder)
    refuse_later_files(folder)
    job = follow(job, manifest)
    _compare(prepared, job, manifest, folder)
    screen = Screen(prepared.templates, prepared.fields.templates, job)
    notices = [*job.warnings(), *notices_of(prepared, manifest), *screen.notices()]
    found = CheckResult(folder=folder, resumes=is_run(folder), notices=notices, screening=screen.mode)
    if screen.mode != "off":
        used = {job.input.id_column, *prepared.fields.needed_columns()}
        found.unscreened = [name for name in prepared.survey.schema.names if name not in used]
    encoder = create(job).encoder()
    if job.generator in {*_LOCAL_ENGINES, "vllm"}:  # only now, when the encoder has read these files and found no fault
        from gxr_batch.models.load_weights import files_sha256

        _compare(prepared, job, manifest, folder, files_sha256(job.model))
    with temporary_folder("gxr-batch-check") as scratch:
        table = scratch / "input.parquet"
        taken = ingest(prepared.survey, prepared.fields, table, id_column=job.input.id_column, prior=None, limit=limit)
        found.rows = taken.rows
        refuse_emptied(taken.rows, manifest, job)
        found.notices += taken.notices
        _try_rows(found, prepared, Fitter(prepared.templates, prepared.job, encoder), screen, table)
        _measure_disk(found, job, table.stat().st_size)
    four_bit = job.model.load_in_4bit is True
    if job.engine.kind in _LOCAL_ENGINES:
        four_bit = _measure_memory(found, job)
    elif job.engine.kind == "vllm":
        from gxr_batch.engines.vllm import require_vllm

        require_vllm()
    elif job.engine.kind == "ray":
        from gxr_batch.engines.ray.cluster import load_ray

        load_ray()
    _check_weights(job, four_bit=four_bit)
    found.notices += _shared_places(folder)
    for sentence in found.notices:
        say(sentence)
    return found


def _shared_places(output: Path) -> list[str]:
    """Say who else can write where a run writes and reads, and what follows."""
    notices = []
    if who := writable_by_others(output):
        notices.append(
            f"The output folder can be written by {who}: they can change, replace or delete this run's results."
        )
    with suppress(StorageError):  # no home folder
        if who := writable_by_others(cache_home()):
            notices.append(
                f"The cache folder can be written by {who}: they can replace models in it and known hashes of weights. "
                "Compiled code is kept apart from them, and the demo model is verified."
            )
    return notices


def _try_rows(found: CheckResult, prepared: Prepared, fitter: Fitter, screen: Screen, table: Path) -> None:
    for row in read_rows(table, prepared.fields, None):
        try:
            fitted = fitter.fit(row)
        except RowError as error:
            found.reasons[_without_counts(error.what)] += 1
            found.unusable.append(row.row_id)
            continue
        found.templates[row.template] += 1
        if fitted.encoded.length is not None:
            found.lengths.append(fitted.encoded.length)
        found.cut += TRUNCATED in fitted.flags
        if screen.mode != "off" and (hits := screen.of_row(row, fitted.messages)):
            found.identifiers.update(hits)
            found.identified.append(row.row_id)
        if len(found.shown) < _SHOWN:
            found.shown.append((row.row_id, fitted.messages))


def _without_counts(reason: str) -> str:
    """Remove the part of a reason that differs between rows, so that rows can be counted by reason."""
    return reason.partition(":")[0] if reason.startswith("the prompt is too long") else reason


def _compare(prepared: Prepared, job: Job, manifest: Manifest | None, folder: Path, files: str | None = None) -> None:
    """Refuse what `run` would refuse, as far as it is known without the weights. Raises FingerprintError.

    `files` is the hash of the model's files besides the weights, None if it is not known.
    """
    if manifest is not None:
        identity = Identity(kind=job.engine.kind, model=job.model.path, files_sha256=files)
        wanted = fingerprint(prepared, job, identity)
        unsettled = {"model weights", "model adapter", *(key for key, value in wanted.items() if value == "auto")}
        refuse_other_texts(manifest.fingerprint, wanted, open_keys=frozenset(unsettled), where=str(folder.absolute()))


def _measure_disk(found: CheckResult, job: Job, table_bytes: int) -> None:
    """Estimate the disk space that the run needs at most, and measure how much is free."""
    keys = found.rows * job.sampling.samples_per_row
    found.bytes_needed = disk_needed(keys, job.sampling.settings().max_new_tokens, table_bytes)
    for path in (found.folder, *found.folder.absolute().parents):
        with suppress(OSError):  # does not exist yet
            found.bytes_free = shutil.disk_usage(path).free
            return


def _measure_memory(found: CheckResult, job: Job) -> bool:
    """Report which lengths, and how many rows of each, fit in free memory; return whether the model is in 4 bits.

    Raises ModelUnavailable.
    """
    from gxr_batch.engines.slots import most_slots
    from gxr_batch.models.what_fits import measure

    kernels = partial(why_no_gpu_kernels, job) if job.engine.kind == KIND else no_kernels
    seen = measure(job.model, job.engine, kernels)
    placement = seen.placement
    in_four_bits = " in 4 bits" if placement.four_bit else ""
    found.device = (
        f"{placement.device}, {gib(seen.free_bytes)} free, {gib(placement.weight_bytes)} of weights{in_four_bits}"
    )
    found.notices += placement.notices
    most = most_slots(job, placement.device, placement.dtype)
    for length in sorted({*_LENGTHS, job.model.max_seq_length}):
        a_row = length * seen.bytes_a_token
        left = seen.cache_bytes - PREFIX_SLOTS * a_row
        if not seen.longest or length <= seen.longest:
            slots = slots_for_memory(left, seen.bytes_a_token, length, most) if left >= a_row else 0
            found.fits.append(Fit(max_seq_length=length, slots=slots))
            fit = max(left, 0) // a_row
            if length == job.model.max_seq_length and job.engine.slots != "auto" and job.engine.slots > fit:
                found.notices.append(
                    f"engine.slots = {job.engine.slots}, but only {fit} rows of {length} tokens fit in free memory."
                )
    return placement.four_bit


def _check_weights(job: Job, *, four_bit: bool) -> None:
    """Refuse weights and an adapter that `run` would refuse, without loading the model. Raises ModelUnavailable."""
    kind = resolve_worker(job) if job.engine.kind == "ray" else job.engine.kind
    if kind not in {*_LOCAL_ENGINES, "vllm"}:
        return
    from gxr_batch.engines.vllm.engine_args import fit_vllm
    from gxr_batch.models.check_adapter import check_weights

    fitting = check_weights(job.model, four_bit=four_bit and kind != "vllm", own_kernels=kind == KIND)
    if fitting is not None and kind == "vllm":
        fit_vllm(fitting)


def quantiles(lengths: Sequence[int]) -> tuple[int, int, int]:
    """Return the smallest, the median and the largest length; zeros for none."""
    ordered = sorted(lengths) or [0]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
