"""Reads a run's invocations from run.json, and finds the one to compare the newest with, in this run or an earlier one.

run.json may come from another version or be edited by hand: values of an unexpected type are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

from gxr_batch.errors import GxrError
from gxr_batch.ledger import Manifest, RunReader, is_run

# Keys in which an engine or the runner records its memory in bytes; the first one found is used.
_MOST = 2**63  # of any number; not a number is not below it
_MEMORY_KEYS = ("peak_memory_bytes", "memory_bytes")


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """One invocation of the run. Values that run.json lacks are None or empty."""

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
    """The invocation to compare the newest with, where it was found, and the settings that changed since."""

    invocation: Invocation
    where: str
    changed: tuple[tuple[str, str, str], ...]


def invocations_of(manifest: Manifest) -> list[Invocation]:
    """Return the invocations of a run, oldest first."""
    return [_invocation(number, entry) for number, entry in enumerate(manifest.invocations, start=1)]


def _invocation(number: int, entry: Mapping[str, Any]) -> Invocation:
    engine = mapping(entry.get("engine"))
    rows, tokens, seconds = _rows(entry), _number(entry.get("new_tokens")), _number(entry.get("streaming_seconds"))
    memory = next((value for place in (entry, engine) for name in _MEMORY_KEYS if (value := place.get(name))), None)
    return Invocation(
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
        device=_text(engine.get("device")),
        dtype=_text(engine.get("quantization") or engine.get("dtype")),
        resumed=bool(_number(entry.get("done_before"))),
        packages=mapping(entry.get("packages")),
        counts=mapping(entry.get("counts")),
    )


def _rows(entry: Mapping[str, Any]) -> float | None:
    """Return the rows of an invocation: its own count, or if it was killed, the rows found on disk since."""
    if (rows := _number(entry.get("done"))) is not None:
        return rows
    counts = [_number(mapping(entry.get("counts")).get(name)) for name in ("ok", "failed", "held")]
    before = _number(entry.get("done_before"))
    if before is None or None in counts:
        return None
    return sum(count or 0.0 for count in counts) - before


def newest_that_generated(found: list[Invocation]) -> Invocation | None:
    """Return the newest invocation that generated a row; others cannot be compared."""
    return next((one for one in reversed(found) if one.rows), None)


def previous(reader: RunReader, found: list[Invocation]) -> Previous | None:
    """Return the previous invocation that generated rows, of this run or else of the job's previous run."""
    newest = newest_that_generated(found)
    if newest is None:
        return None
    earlier = newest_that_generated([one for one in found if one.number < newest.number])
    if earlier is not None:
        where = f"invocation {earlier.number} of this run"
        return Previous(earlier, where, _changes(_settings(newest, {}), _settings(earlier, {})))
    for folder, manifest in _runs_before(reader):
        earlier = newest_that_generated(invocations_of(manifest))
        if earlier is not None:
            changed = _changes(_settings(newest, reader.manifest.job), _settings(earlier, manifest.job))
            return Previous(earlier, f"the run {folder}", changed)
    return None


def _runs_before(reader: RunReader) -> Iterator[tuple[str, Manifest]]:
    """Yield the earlier runs of the same job in the same folder, newest first."""
    own, found = reader.manifest, []
    with suppress(OSError):  # the parent folder may not be readable
        for folder in reader.folder.absolute().parent.iterdir():
            with suppress(GxrError):  # skip runs that cannot be read
                if folder.name != reader.folder.absolute().name and is_run(folder):
                    manifest = RunReader(folder).manifest
                    if manifest.name == own.name and str(manifest.created_at) < str(own.created_at):
                        found.append((folder.name, manifest))
    yield from sorted(found, key=lambda run: str(run[1].created_at), reverse=True)


def _settings(invocation: Invocation, job: Mapping[str, Any]) -> dict[str, str]:
    flat = {
        f"{section}.{key}": _brief(value)
        for section, keys in job.items()
        for key, value in mapping(keys).items()
        if (section, key) != ("prompt", "system")  # the system text is a prompt, not a setting
    }
    machine = {"device": invocation.device, "number format": invocation.dtype, "slots": _brief(invocation.slots)}
    return flat | machine | {name: _brief(version) for name, version in invocation.packages.items()}


def _changes(now: Mapping[str, str], then: Mapping[str, str]) -> tuple[tuple[str, str, str], ...]:
    names = [name for name in now if now[name] != then.get(name, "")]
    return tuple((name, then.get(name, ""), now[name]) for name in names)


def zone_of(manifest: Manifest) -> timezone:
    """Return the time zone of the last invocation."""
    for entry in reversed(manifest.invocations):
        with suppress(TypeError, ValueError):
            offset = datetime.fromisoformat(str(entry.get("started_at"))).utcoffset()
            if offset is not None:
                return timezone(timedelta(seconds=round(offset.total_seconds())))
    return UTC


def mapping(value: object) -> Mapping[str, Any]:
    """Return a section of the manifest, or {} if it is not a table."""
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST
    return float(value) if usable else None  # type: ignore[arg-type]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _brief(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
