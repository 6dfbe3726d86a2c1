"""What was drawn for reading: one file for each draw, `reviews/audit-NNN.json`, next to the reviews that come back.

It holds all that the figures depend on: frame, strata, weights, seed, and which row went to which reader.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from gxr_batch.audit.draw import By, Drawn
from gxr_batch.cells import is_unicode
from gxr_batch.disk import reading, storage_errors, write_text
from gxr_batch.errors import RunError
from gxr_batch.files import read_json
from gxr_batch.ledger.reviews import REVIEWS_NAME
from gxr_batch.ledger.run_format import later_version
from gxr_batch.records import Key

# Grows with every change to the file.
_FORMAT = 1
_NAME = re.compile(r"audit-([0-9]{3,8})\.json")


class Audit(NamedTuple):
    """One draw: `frame_rows` of each stratum, a digest of the frame, and the drawn rows in reading order."""

    number: int
    created_at: str
    seed: int
    by: By | None
    blind: bool
    readers: int
    overlap: int
    frame_rows: Mapping[str, int]
    frame_sha256: str
    rows: Sequence[Drawn]


def audits_of(folder: Path) -> list[Audit]:
    """Return the draws of a run, oldest first. Raises RunError if a file is damaged, LaterVersion, StorageError."""
    home = folder / REVIEWS_NAME
    with storage_errors(home):
        try:
            names = [path for path in home.iterdir() if _NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []
    found: list[Audit] = []
    drawn: set[tuple[Key, str]] = set()
    for path in sorted(names, key=_number):
        audit = _read(path)
        # Every draw continues the first one.
        drawn |= {(row.key, row.stratum) for row in audit.rows}
        count = Counter(stratum for _, stratum in drawn)
        if _frame(audit) != _frame(found[0] if found else audit) or any(
            count[name] > rows for name, rows in audit.frame_rows.items()
        ):
            raise damaged_record(path)
        found.append(audit)
    return found


def _frame(audit: Audit) -> tuple[object, ...]:
    return audit.by, audit.seed, audit.frame_rows, audit.frame_sha256


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def add_audit(folder: Path, audit: Audit) -> Path:
    """Write a draw, inside `ledger.reviews.one_import`. Raises StorageError."""
    path = folder / REVIEWS_NAME / f"audit-{audit.number:03d}.json"
    drawn = Counter(row.stratum for row in audit.rows)
    total = sum(audit.frame_rows.values())
    content = {
        "format": _FORMAT,
        "created_at": audit.created_at,
        "seed": audit.seed,
        "by": audit.by,
        "blind": audit.blind,
        "readers": audit.readers,
        "overlap": audit.overlap,
        "frame": {"rows": total, "sha256": audit.frame_sha256},
        "strata": [
            {"name": name, "rows": rows, "drawn": drawn[name], "weight": rows / total}
            for name, rows in audit.frame_rows.items()
        ],
        "rows": [
            {
                "row_id": row.key.row_id,
                "sample": row.key.sample,
                "judged_sha256": row.judged_sha256,
                "stratum": row.stratum,
                "readers": row.readers,
            }
            for row in audit.rows
        ],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def damaged_record(path: Path) -> RunError:
    """Return the error for a record that no draw of this run can have written."""
    return RunError(
        "The record of an audit is damaged.",
        where=str(path.absolute()),
        next_step=f"rename it to {path.name}.damaged; the reviews stay, and draw a new audit",
    )


def _read(path: Path) -> Audit:
    damaged = damaged_record(path)
    with reading(path, damaged):
        try:
            content = read_json(path)
            if type(content["format"]) is not int or content["format"] > _FORMAT:
                raise later_version(path, f"format {ascii(content['format'])[:20]}")
            return _audit(_number(path), content)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            raise damaged from None


def _audit(number: int, content: Mapping[str, Any]) -> Audit:
    datetime.fromisoformat(content["created_at"])
    strata = {_text(one["name"]): _count(one["rows"]) for one in content["strata"]}
    if content["by"] not in {None, "flags", "template"}:
        raise ValueError
    rows = []
    for row in content["rows"]:
        readers = tuple(_count(reader) for reader in row["readers"])
        key = Key(_text(row["row_id"]), _count(row["sample"]))
        if row["stratum"] not in strata:
            raise ValueError
        rows.append(Drawn(key, _text(row["judged_sha256"]), row["stratum"], readers))
    drawn = Counter(row.stratum for row in rows)
    if any(drawn[name] > most for name, most in strata.items()) or len({row.key for row in rows}) != len(rows):
        raise ValueError
    return Audit(
        number=number,
        created_at=content["created_at"],
        seed=int(content["seed"]),
        by=content["by"],
        blind=bool(content["blind"]),
        readers=_count(content["readers"]),
        overlap=_count(content["overlap"]),
        frame_rows=strata,
        frame_sha256=_text(content["frame"]["sha256"]),
        rows=rows,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not is_unicode(value):
        raise ValueError
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError
    return value
