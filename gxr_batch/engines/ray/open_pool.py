"""Opens a pool: places the workers, waits until each has loaded its model, and combines what they report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gxr_batch.engines.base import Create, Say, require_time
from gxr_batch.engines.ray.cluster import Placing, connected, load_ray
from gxr_batch.engines.ray.pool import Lost, Pool, joined, start
from gxr_batch.engines.ray.session import Patience, RaySession
from gxr_batch.engines.ray.worker import Worker
from gxr_batch.engines.ray.worker_messages import Order, Report
from gxr_batch.errors import ModelUnavailable
from gxr_batch.job import Job
from gxr_batch.job.units import parse_duration

_LOOK_SECONDS = 0.1
_CALL_SECONDS = 0.5
_ON_CARDS = ("transformers", "generate", "vllm")


@contextmanager
def open_session(job: Job, create: Create, say: Say, until: float) -> Iterator[RaySession]:
    """Open a job's workers for the block; `job.engine.kind` is the engine in each of them.

    Raises ModelUnavailable if Ray is missing, the workers do not fit the cluster, or a worker cannot open its engine,
    OutOfTime if one is not open at `until` (time.monotonic seconds).
    """
    began = time.monotonic()
    on_gpu = job.engine.kind in _ON_CARDS and job.model.device_map != "cpu"
    with connected(job.ray, on_gpu=on_gpu) as placing:
        ray = load_ray()
        if not placing.gpus and not job.engine.threads:
            job = job.with_values({"engine.threads": placing.cpus})
        pool = start(
            ray,
            placing.workers,
            Worker,
            (job, create, os.getcwd()),
            num_cpus=placing.cpus,
            num_gpus=placing.gpus,
            max_restarts=job.ray.max_restarts,
        )
        try:
            patience = Patience(parse_duration(job.ray.give_up_after) or 0.0, parse_duration(job.ray.hung_after) or 0.0)
            _wait(pool, placing, patience.give_up_seconds, say, until)
            info = joined(pool.members, time.monotonic() - began, {"ray": ray.__version__})
            yield RaySession(info, pool, patience, say)
        finally:
            pool.close()


def _wait(pool: Pool, placing: Placing, patience: float, say: Say, until: float) -> None:
    """Wait until every worker is open. Raises ModelUnavailable, OutOfTime, or what a worker's engine raised."""
    began, warned, said = time.monotonic(), False, set[str]()
    while any(member.info is None for member in pool.members):
        require_time(until)
        # Workers that are open are not called again: they would answer at once, over and over, while others load.
        for member in pool.idle:
            if member.info is None:
                pool.call(member, Order(0, patience=_CALL_SECONDS, greet=True))
        came = pool.next(_LOOK_SECONDS)
        if came is not None:
            member, report = came
            if isinstance(report, Lost):
                _check_loss(member.name, report)
                continue
            for sentence in report.said:
                if sentence not in said:
                    said.add(sentence)
                    say(sentence)
            _check(report, member.name)
            member.info = report.info or member.info
            member.hand.slots = member.info.slots if member.info else 0
        waited = time.monotonic() - began
        unplaced = sum(not member.host for member in pool.members)
        if unplaced and waited >= patience:
            raise ModelUnavailable(
                f"{unplaced} of {placing.workers} workers did not fit the cluster within {waited:,.0f} s; each "
                f"requests {placing.gpus} GPUs and {placing.cpus} CPUs.",
                where="ray.workers, ray.cpus_per_worker",
                next_step="lower one of them, or add hosts; ray.give_up_after sets how long to wait",
            )
        if unplaced and waited >= patience / 10 and not warned:
            warned = True
            say(f"{unplaced} of {placing.workers} workers have not started yet; they may not fit the cluster.")


def _check(report: Report, name: str) -> None:
    if report.failure is not None:
        raise report.failure.error(name)


def _check_loss(name: str, lost: Lost) -> None:
    if lost.final:
        raise ModelUnavailable(
            f"{name.capitalize()} ended repeatedly before its engine was open.",
            where="ray.max_restarts",
            next_step="check that every host has this version of gxr-batch, memory for the model, and disk space; "
            "`ray logs` on the cluster shows more",
        )
