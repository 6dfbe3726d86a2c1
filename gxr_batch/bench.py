"""Measures this machine with one model: load time, time for 256 tokens, memory, rows per minute by slot count.

Uses the engine of `run` on typical prompts. `benchmarks/engines.py` compares our engine with others.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from gxr_batch.engines import create
from gxr_batch.engines.base import EngineInfo, Pulse, Say, Session, StopRequest
from gxr_batch.errors import EngineFailed
from gxr_batch.job import FormSection, Job, PromptSection
from gxr_batch.prompts import Templates
from gxr_batch.prompts.render import render
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt
from gxr_batch.run.fingerprint import follow
from gxr_batch.run.planning import row_seed

GUIDE_TOKENS = 256
_WARM_UP_TOKENS = 8
_FINDINGS = (
    "a moderate left pleural effusion with a meniscus and compressive change at the left base",
    "clear lungs, a normal cardiac silhouette and sharp costophrenic angles",
    "a right apical pneumothorax of 2 cm without shift of the mediastinum",
    "dense consolidation of the right middle lobe that obscures the right heart border",
    "enlargement of the heart, upper zone vessel prominence and small bilateral effusions",
    "a rounded nodule of 14 mm in the left upper zone with a smooth margin",
    "reticular change at both bases with reduced lung volumes",
    "an endotracheal tube whose tip lies in the right main bronchus, and collapse of the left lung",
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The figures of one slot count. `seconds_for_256`: one row's time for 256 tokens with all slots busy.

    `memory_bytes`: GPU memory; without a GPU, this process's peak so far plus the memory of its child processes, in
    which vLLM and Ray hold the model.
    """

    slots: int
    rows: int
    rows_a_minute: float
    tokens_a_second: float
    seconds_for_256: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The figures of one model on one machine, in seconds and bytes."""

    machine: str
    model: str
    engine: str
    device: str
    dtype: str | None
    quantization: str | None
    load_seconds: float
    max_new_tokens: int
    measurements: tuple[Measurement, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def bench(job: Job, slots: Sequence[int], rows_a_slot: int, say: Say) -> Bench:
    """Measure each slot count, lowest first, loading the model each time. Raises ModelUnavailable, EngineFailed."""
    found, loads = [], []
    info: EngineInfo | None = None
    for count in sorted(set(slots)):
        settled = follow(job, None).with_values({"engine.slots": count}).model_copy(update={"form": FormSection()})
        engine = create(settled, say)
        encoder = engine.encoder()
        began = time.perf_counter()
        with engine.open() as session:
            loads.append(time.perf_counter() - began)
            info = session.info
            # With Ray, each worker has this many slots.
            prompts = _prompts(settled, encoder.encode, info.slots * rows_a_slot)
            _run(session, [prompt._replace(max_new_tokens=_WARM_UP_TOKENS) for prompt in prompts[: info.slots]])
            found.append(_measure(session, prompts))
        say(f"{count} slots: {found[-1].rows_a_minute:,.1f} rows/min")
    assert info is not None, "at least one slot count"
    return Bench(
        machine=machine(info.device),
        model=info.identity.model,
        engine=info.identity.kind,
        device=info.device,
        dtype=info.dtype,
        quantization=info.quantization,
        load_seconds=min(loads),
        max_new_tokens=job.sampling.settings().max_new_tokens,
        measurements=tuple(found),
    )


def _prompts(job: Job, encode: Callable[[Messages], Encoded], count: int) -> list[Prompt]:
    template = Templates(PromptSection(template="basic")).default
    made = []
    for number in range(count):
        row_id = f"bench-{number}"
        messages = render(template, {"findings": _FINDINGS[number % len(_FINDINGS)]}, system=job.prompt.system)
        seed = row_seed(0, row_id, 1, 1)
        most = job.sampling.settings().max_new_tokens
        made.append(Prompt(Key(row_id, 1), messages, encode(messages), seed, most))
    return made


def _measure(session: Session, prompts: Sequence[Prompt]) -> Measurement:
    began = time.perf_counter()
    done, device_bytes = _run(session, prompts)
    seconds = time.perf_counter() - began
    tokens = sum(one.new_tokens or 0 for one in done)
    a_token = sum(one.seconds_generating for one in done) / max(tokens, 1)
    return Measurement(
        slots=session.info.slots,
        rows=len(done),
        rows_a_minute=len(done) / seconds * 60,
        tokens_a_second=tokens / seconds,
        seconds_for_256=GUIDE_TOKENS * a_token,
        memory_bytes=device_bytes or _peak_bytes(),
    )


def _run(session: Session, prompts: Sequence[Prompt]) -> tuple[list[Completion], int]:
    """Generate for all prompts; return the completions and the highest device memory that a pulse reported."""
    done, device_bytes = [], 0
    for event in session.stream(iter(prompts), StopRequest()):
        if isinstance(event, Pulse):
            device_bytes = max(device_bytes, event.memory_bytes)
        elif event.error is not None:
            raise EngineFailed(f"A row of the benchmark failed: {event.error}.")
        else:
            done.append(event)
    return done, device_bytes


def _peak_bytes() -> int:
    import psutil

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    held = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # the process has ended
            held += process.memory_info().rss
    return peak + held


def machine(device: str) -> str:
    """Return the name of the GPU, or of the CPU with its usable core count."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device.split(",", maxsplit=1)[0]))
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def table(found: Bench) -> str:
    """Return the guide's benchmark table for this machine, and rows per minute by slot count, as Markdown."""
    weights = found.quantization or found.dtype or "no weights"
    lines = [
        f"{found.model} ({weights}), engine {found.engine}, up to {found.max_new_tokens} new tokens per row",
        "",
        "| Hardware | Loading time | Inference time (256 tokens) | Memory usage |",
        "|---|---|---|---|",
    ]
    first = found.measurements[0]
    lines.append(
        f"| {found.machine} | {found.load_seconds:.1f} s | {first.seconds_for_256:.1f} s ({first.slots} "
        f"slot{'s' * (first.slots > 1)}) | {_gib(first.memory_bytes)} |"
    )
    lines += ["", "| Slots | Rows/min | Tokens/s | Time per row (256 tokens) | Memory |"]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {one.slots} | {one.rows_a_minute:,.1f} | {one.tokens_a_second:,.1f} | {one.seconds_for_256:.1f} s | "
        f"{_gib(one.memory_bytes)} |"
        for one in found.measurements
    ]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
