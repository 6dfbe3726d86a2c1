"""The invocations of a run as run.json records them, and the one to compare the newest with, of this run or an earlier.

run.json may come from another version or be edited by hand: a value of an unexpected kind is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

from gxr_batch.errors import GxrError
from gxr_batch.ledger import Manifest, RunReader, is_run

# Where an engine or the runner writes down how much memory it took, in bytes; the first that is there counts.
_MEMORY_KEYS = ("peak_memory_bytes", "memory_bytes")


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the run. What run.json does not say is None or empty."""

    number: int
    began: str
    ended: str
    outcome: str
    rows: float | None
    rejected: float | None
    rows_a_minute: float | None
    tokens_a_second: float | None
    tokens_a_row: float | None
    load_seconds: float | None
    slots: float | None
    splits: float | None
    workers_lost: float | None
    cut: float | None
    memory_bytes: float | None
    device: str
    dtype: str
    resumed: bool
    packages: Mapping[str, Any]
    counts: Mapping[str, Any]


class Previous(NamedTuple):
    """A start to compare the newest with, where it stands, and the settings that were others then."""

    start: Start
    where: str
    changed: tuple[tuple[str, str, str], ...]


def starts(manifest: Manifest) -> list[Start]:
    """Return the starts of a run, oldest first."""
    return [_start(number, entry) for number, entry in enumerate(manifest.invocations, start=1)]


def _start(number: int, entry: Mapping[str, Any]) -> Start:
    engine = mapping(entry.get("engine"))
    rows, tokens, seconds = _rows(entry), _number(entry.get("new_tokens")), _number(entry.get("streaming_seconds"))
    memory = next((value for place in (entry, engine) for name in _MEMORY_KEYS if (value := place.get(name))), None)
    return Start(
        number=number,
        began=str(entry.get("started_at") or ""),
        ended=str(entry.get("finished_at") or ""),
        outcome=str(entry.get("outcome") or "no end recorded"),
        rows=rows,
        rejected=_number(entry.get("rejected")),
        rows_a_minute=rows / seconds * 60 if rows and seconds else None,
        tokens_a_second=tokens / seconds if tokens and seconds else None,
        tokens_a_row=tokens / rows if tokens and rows else None,
        load_seconds=_number(engine.get("load_seconds")),
        slots=_number(engine.get("slots")),
        splits=_number(entry.get("splits")),
        workers_lost=_number(mapping(entry.get("workers")).get("lost")),
        cut=_number(entry.get("cut")),
        memory_bytes=_number(memory),
        device=_said(engine.get("device")),
        dtype=_said(engine.get("quantization") or engine.get("dtype")),
        resumed=bool(_number(entry.get("done_before"))),
        packages=mapping(entry.get("packages")),
        counts=mapping(entry.get("counts")),
    )


def _rows(entry: Mapping[str, Any]) -> float | None:
    """Return the rows of a start: as it counted them, else, where it was broken off, as they lay on the disk."""
    if (rows := _number(entry.get("done"))) is not None:
        return rows
    counts = [_number(mapping(entry.get("counts")).get(name)) for name in ("ok", "failed", "held")]
    before = _number(entry.get("done_before"))
    if before is None or None in counts:
        return None
    return sum(count or 0.0 for count in counts) - before


def newest_that_generated(found: list[Start]) -> Start | None:
    """Return the newest start that generated a row; others are of no use for a comparison."""
    return next((start for start in reversed(found) if start.rows), None)


def previous(reader: RunReader, found: list[Start]) -> Previous | None:
    """Return the start before the newest that generated: of this run, else of the job's run before this one."""
    newest = newest_that_generated(found)
    if newest is None:
        return None
    earlier = newest_that_generated([start for start in found if start.number < newest.number])
    if earlier is not None:
        where = f"start {earlier.number} of this run"
        return Previous(earlier, where, _changes(_settings(newest, {}), _settings(earlier, {})))
    for folder, manifest in _runs_before(reader):
        earlier = newest_that_generated(starts(manifest))
        if earlier is not None:
            changed = _changes(_settings(newest, reader.manifest.job), _settings(earlier, manifest.job))
            return Previous(earlier, f"the run {folder}", changed)
    return None


def _runs_before(reader: RunReader) -> Iterator[tuple[str, Manifest]]:
    """Yield the runs of the same job that stand beside this one and began before it, the newest first."""
    own, beside = reader.manifest, []
    with suppress(OSError):  # a folder above that may be passed through and not listed
        for folder in reader.folder.absolute().parent.iterdir():
            with suppress(GxrError):  # one that cannot be read has nothing to say here
                if folder.name != reader.folder.absolute().name and is_run(folder):
                    manifest = RunReader(folder).manifest
                    if manifest.name == own.name and str(manifest.created_at) < str(own.created_at):
                        beside.append((folder.name, manifest))
    yield from sorted(beside, key=lambda found: str(found[1].created_at), reverse=True)


def _settings(start: Start, job: Mapping[str, Any]) -> dict[str, str]:
    flat = {
        f"{section}.{key}": _brief(value)
        for section, keys in job.items()
        for key, value in mapping(keys).items()
        if (section, key) != ("prompt", "system")  # a system text is a prompt, and no setting to print
    }
    machine = {"device": start.device, "number format": start.dtype, "slots": _brief(start.slots)}
    return flat | machine | {name: _brief(version) for name, version in start.packages.items()}


def _changes(now: Mapping[str, str], then: Mapping[str, str]) -> tuple[tuple[str, str, str], ...]:
    names = [name for name in now if now[name] != then.get(name, "")]
    return tuple((name, then.get(name, ""), now[name]) for name in names)


def zone_of(manifest: Manifest) -> timezone:
    """Return the time zone in which the run was started last."""
    for entry in reversed(manifest.invocations):
        with suppress(TypeError, ValueError):
            offset = datetime.fromisoformat(str(entry.get("started_at"))).utcoffset()
            if offset is not None:
                return timezone(timedelta(seconds=round(offset.total_seconds())))
    return UTC


def mapping(value: object) -> Mapping[str, Any]:
    """Return a section of the manifest, empty where it is none."""
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _said(value: object) -> str:
    return "" if value is None else str(value)


def _brief(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
