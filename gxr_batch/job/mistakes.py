"""Turns what pydantic finds wrong with a job file into one message for the person who wrote it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gxr_batch.errors import JobFileError
from gxr_batch.job.sections import Job


def explain(error: ValidationError, path: Path, text: str) -> JobFileError:
    """Turn pydantic's errors into one message: the first in full, the others counted."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    first = errors[0]
    keys = [str(part) for part in first["loc"] if not str(part).startswith(("literal", "constrained", "function"))]
    keys = [key for key in keys if key not in {"int", "float", "bool", "[key]"}]
    dotted = ".".join(keys) or "job file"
    if first["type"] == "extra_forbidden":
        known = list(_known_keys(keys[:-1]))
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        what = f"Unknown key: {dotted}."
        step = f"did you mean {'.'.join([*keys[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
    elif first["type"] == "missing":
        what, step = f"The job file lacks {dotted}.", "add it; the README shows a complete job file"
    else:
        what, step = f"{dotted}: {first['msg'].removeprefix('Value error, ')}.", "mend the value"
    if len(errors) > 1:
        step += f" ({len(errors) - 1} more to mend after this)"
    line = _line_of(text, keys)
    return JobFileError(what, where=f"{path}, line {line}" if line else str(path), next_step=step)


def _known_keys(section: Sequence[str]) -> Iterator[str]:
    model: Any = Job
    for name in section:
        field = getattr(model, "model_fields", {}).get(name)
        model = field.annotation if field else None
    yield from getattr(model, "model_fields", {})


def _line_of(text: str, keys: Sequence[str]) -> int | None:
    """Return the line on which a key stands (counted from 1), None where `--set` or a default brought it."""
    section, wanted = "", ".".join(keys[:-1])
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            section = header[1].strip()
            if section == ".".join(keys):
                return number
        elif section == wanted and keys and re.match(rf'\s*"?{re.escape(keys[-1])}"?\s*=', line):
            return number
    return None
