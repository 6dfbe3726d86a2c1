"""Sentences that an invocation says of itself: what changed since the last one, what may go wrong, why it stops."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gxr_batch.engines.base import EngineInfo
from gxr_batch.job import Job
from gxr_batch.ledger import Manifest
from gxr_batch.records import Key
from gxr_batch.run.planning import disk_needed
from gxr_batch.run.stop import StopReason


def of_kind(asked: Job, settled: Job) -> list[str]:
    """Say so where the automatic engine is not the fast one."""
    if asked.generator != "auto" or settled.generator != "generate":
        return []
    return [f'{asked.generator_key} = "auto" took generate, since the transformers engine cannot drive this model.']


def of_versions(manifest: Manifest | None, now: Mapping[str, str]) -> list[str]:
    """Name the packages that are not what they were at the last start: a warning, since the settings are the same."""
    before = _within(manifest.invocations[-1], "packages") if manifest and manifest.invocations else {}
    changed = [f"{name} {old} -> {now.get(name, 'gone')}" for name, old in before.items() if now.get(name) != old]
    if not changed:
        return []
    return [
        f"Other package versions than at the last start: {', '.join(changed)}. New rows may come out in other words "
        "than they would have then; rows that are done stay as they are."
    ]


def of_forward(manifest: Manifest | None, info: EngineInfo) -> list[str]:
    """Say so where other code computes the model than at the last start that loaded it, as on another processor."""
    loaded = [entry for entry in (manifest.invocations if manifest else ()) if "engine" in entry]
    before = _within(loaded[-1], "engine", "versions").get("forward") if loaded else None
    now = info.versions.get("forward")
    if before is None or now is None or before == now:
        return []
    return [
        f"Other code computes the model than at the last start: {before} -> {now}. New rows may come out in other "
        "words than they would have then; rows that are done stay as they are."
    ]


def _within(entry: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return the mapping under these names; an empty one where run.json, which anybody may edit, has none there."""
    for name in names:
        found = entry.get(name)
        entry = found if isinstance(found, dict) else {}
    return entry


def of_room(folder: Path, max_new_tokens: int, keys: int) -> list[str]:
    """Say so where the disk may fill up before the run ends."""
    needed = disk_needed(keys, max_new_tokens, (folder / "input.parquet").stat().st_size)
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return []
    return [
        f"The disk has {free / 2**20:,.0f} MiB free, and this run may need up to {needed / 2**20:,.0f} MiB: it may "
        "fill up. A run that finds it full stops with every sealed row safe."
    ]


def of_suspects(count: int) -> list[str]:
    """Say that rows were in the engine when an earlier start died."""
    if not count:
        return []
    return [
        f"An earlier start ended without a word while {count:,} of the rows still to do were in the engine. They are "
        "generated last and one at a time, so that a row that kills the process is found."
    ]


def of_condemned(keys: Collection[Key]) -> list[str]:
    """Name rows that killed the process twice."""
    if not keys:
        return []
    names = sorted({key.row_id for key in keys})
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return [f"The process died over {', '.join(names[:5])}{more} twice: set aside as failed, crashed the process."]


def of_release(rows: int, by: str) -> str:
    """Say that rows that were held are generated now, and who is on record for it."""
    which = "1 held row is" if rows == 1 else f"{rows:,} held rows are"
    return f"{which} released by {by}, as run.json records: identifier screening only flags what it finds in them."


def of_stop(reason: StopReason, in_flight: int, grace_seconds: float) -> str:
    """Say that the run is about to stop, and what becomes of the rows in the engine."""
    why = {
        "interrupt": "Stopping, as Ctrl-C asks",
        "terminate": "Stopping, as a signal asks",
        "stop_by": "Stopping, as the stop-by time comes near",
        "time_limit": "Stopping, as the time limit comes near",
        "max_failed": "Stopping, as more rows failed than run.max_failed allows",
        "api_outage": "Stopping, as the server is gone: rows that it was asked for are still to do",
    }[reason]
    if reason in {"max_failed", "api_outage"}:
        return f"{why}."
    within = f"within {grace_seconds:g} s" if reason in {"interrupt", "terminate"} else "until then"
    again = "; Ctrl-C again stops at once" if reason == "interrupt" else ""
    return f"{why}: no more rows are taken, {in_flight:,} in the engine may end {within}{again}."
