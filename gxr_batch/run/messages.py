"""Messages of an invocation: what changed since the last one, what may go wrong, why it stops."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gxr_batch.cells import quoted
from gxr_batch.engines.base import EngineInfo
from gxr_batch.job import Job
from gxr_batch.ledger import Manifest
from gxr_batch.records import Key
from gxr_batch.rows.columns import counted
from gxr_batch.run.planning import disk_needed
from gxr_batch.run.stop import StopReason


def of_kind(asked: Job, settled: Job) -> list[str]:
    """Report that the automatic engine is not the fast one."""
    if asked.generator != "auto" or settled.generator != "generate":
        return []
    return [
        f'{asked.generator_key} = "auto" chose "generate", because the transformers engine does not support this model.'
    ]


def of_versions(manifest: Manifest | None, now: Mapping[str, str]) -> list[str]:
    """Warn about package versions that differ from the last invocation."""
    before = _within(manifest.invocations[-1], "packages") if manifest and manifest.invocations else {}
    changed = [
        f"{quoted(name)} {quoted(old)} -> {now.get(name, 'not installed')}"
        for name, old in before.items()
        if now.get(name) != old
    ]
    if not changed:
        return []
    return [
        f"Package versions changed since the last time this ran: {', '.join(changed)}. New rows may be worded "
        "differently; finished rows are not changed."
    ]


def of_forward(manifest: Manifest | None, info: EngineInfo) -> list[str]:
    """Warn if other code computes the model than in the last invocation that loaded it, e.g. on another CPU."""
    loaded = [entry for entry in (manifest.invocations if manifest else ()) if "engine" in entry]
    before = _within(loaded[-1], "engine", "versions").get("forward") if loaded else None
    now = info.versions.get("forward")
    if before is None or now is None or before == now:
        return []
    return [
        f"The code that computes the model changed since the last time this ran: {quoted(before)} -> {quoted(now)}. "
        "New rows may be "
        "worded differently; finished rows are not changed."
    ]


def _within(entry: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return the mapping under these names; an empty one if run.json, which may have been edited, lacks it."""
    for name in names:
        found = entry.get(name)
        entry = found if isinstance(found, dict) else {}
    return entry


def of_disk_space(folder: Path, max_new_tokens: int, keys: int) -> list[str]:
    """Warn that the disk may fill up before the run ends."""
    needed = disk_needed(keys, max_new_tokens, (folder / "input.parquet").stat().st_size)
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return []
    return [
        f"The disk may fill up: {free / 2**20:,.0f} MiB are free, and this run may need up to "
        f"{needed / 2**20:,.0f} MiB. If it does, the run stops, and rows that were saved at a checkpoint are kept."
    ]


def of_suspects(count: int) -> list[str]:
    """Report that rows were in the engine when an earlier invocation died."""
    if not count:
        return []
    return [
        f"The last time this ran, it ended unexpectedly with {counted(count, 'unfinished row')} in the engine. Such "
        "rows are generated last and one at a time, to find a row that kills the process."
    ]


def of_condemned(keys: Collection[Key]) -> list[str]:
    """List rows that killed the process twice."""
    if not keys:
        return []
    names = sorted({key.row_id for key in keys})
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return [
        f"The process died twice while generating {', '.join(map(quoted, names[:5]))}{more}: marked as failed "
        "(crashed the process)."
    ]


def of_lost_hint(reason: str) -> str:
    """Warn that the rows in the engine cannot be recorded."""
    consequence = "if a row kills the process, the next invocation cannot tell which"
    return f"inflight.json cannot be written ({reason}): {consequence}."


def of_release(rows: int, by: str) -> str:
    """Report that held rows are released, and by whom."""
    which = "1 held row is" if rows == 1 else f"{rows:,} held rows are"
    return f"{which} released by {quoted(by)}, as run.json records: identifier screening only flags them."


def of_stop(reason: StopReason, in_flight: int, grace_seconds: float) -> str:
    """Report that the run is about to stop, and what happens to the rows in the engine."""
    why = {
        "interrupt": "Stopping after Ctrl-C",
        "terminate": "Stopping after a signal",
        "stop_by": "Stopping because the stop-by time is near",
        "time_limit": "Stopping because the time limit is near",
        "max_failed": "Stopping because more rows failed than run.max_failed allows",
        "api_outage": "Stopping because the server is not answering; the requested rows are still to do",
    }[reason]
    if reason in {"max_failed", "api_outage"}:
        return f"{why}."
    within = f"within {grace_seconds:g} s" if reason in {"interrupt", "terminate"} else "until then"
    again = "; Ctrl-C again stops at once" if reason == "interrupt" else ""
    return f"{why}: no more rows are started; the {in_flight:,} in the engine may finish {within}{again}."
