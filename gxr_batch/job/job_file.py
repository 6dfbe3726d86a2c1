"""Reads a job file: TOML, then `section.key=value` overrides, then validation.

Reading is strict: an unknown key is refused with the closest known one, an invalid value with its place in the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gxr_batch.errors import JobFileError
from gxr_batch.files import read_text, why_unreadable
from gxr_batch.job.schema import Job
from gxr_batch.job.section import Section
from gxr_batch.job.validation_errors import explain

_NO_TABLE = {"path": "-"}
_TABLES = {".csv", ".tsv", ".parquet", ".xlsx", ".jsonl", ".gz", ".zst"}
# Keys of earlier versions, which run.json may hold. In a job file they are refused like any unknown key.
RETIRED_KEYS = frozenset(
    {"echo.fail_every", "echo.fail_containing", "echo.crash_after", "echo.kill_containing", "echo.hang_containing"}
)
# Keys added later whose default differs from what earlier versions did, with the value that matches it.
AS_IT_WAS: dict[str, Any] = {"form.version": 1, "prompt.version": 1}


def load_job(
    path: Path, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None, *, table: bool = True
) -> Job:
    """Read a job file and apply `section.key=value` overrides, then `given` values by dotted key.

    Without `table` the file may lack its [input] section, for commands that read no findings table.
    Raises JobFileError if the file or an override cannot be used.
    """
    text = _read(path)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        known = isinstance(error, tomllib.TOMLDecodeError)
        raise JobFileError(
            "The job file is not valid TOML: "
            f"{_fault(error) if known else 'it is nested too deeply or has a huge number'}.",
            where=str(path),
            next_step="fix that line; strings need quotes" if known else "simplify it",
        ) from None
    if not table:
        data.setdefault("input", dict(_NO_TABLE))
    return _validated(data, overrides, given or {}, path, text)


def make_job(name: str, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> Job:
    """Make a job without a job file and without a table, from options alone, for commands that generate no table.

    Raises JobFileError.
    """
    data = {"name": name, "input": dict(_NO_TABLE)}
    return _validated(data, overrides, given or {}, Path("command line"), "")


def recorded_job(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a job recorded by a run, in this version's keys, and the keys that no version so far has known.

    Retired keys are left out; later keys get the value that means "as it was then". Values are not checked.
    """
    known = Job.model_fields
    job: dict[str, Any] = {}
    unknown = [name for name in data if name not in known and not _retired(name)]
    for name, field in known.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            job |= {name: data[name]} if name in data else {}
            continue
        recorded = data.get(name, {})
        if not isinstance(recorded, Mapping):
            job[name] = recorded
            continue
        keys = section.model_fields
        dotted = {key: f"{name}.{key}" for key in (*recorded, *keys)}
        unknown += [dotted[key] for key in recorded if key not in keys and not _retired(dotted[key])]
        then = {} if name == "form" and not recorded.get("sections") else AS_IT_WAS  # no form, no version of it
        later = {key: then.get(dotted[key], one.get_default(call_default_factory=True)) for key, one in keys.items()}
        job[name] = {
            key: recorded.get(key, later[key]) for key in keys if key in recorded or not keys[key].is_required()
        }
    return job, unknown


def _retired(dotted: str) -> bool:
    return any(key == dotted or key.startswith(f"{dotted}.") for key in RETIRED_KEYS)


def _validated(data: dict[str, Any], overrides: Sequence[str], given: Mapping[str, Any], path: Path, text: str) -> Job:
    """Apply overrides to a job file's data and validate the result."""
    options: dict[str, str] = {}
    for override in overrides:
        dotted = _apply(data, override)
        options[dotted] = f"--set {dotted}"
    for dotted, value in given.items():
        options[dotted] = f"--{dotted.rpartition('.')[2].replace('_', '-')}"
        _put(data, dotted.split("."), value, where=options[dotted])
    try:
        return Job.model_validate(data)
    except ValidationError as error:
        raise explain(error, path, text, options) from None


def _read(path: Path) -> str:
    if path.suffix.lower() in _TABLES and path.is_file():
        raise JobFileError(
            "This is a table, not a job file.", where=str(path.absolute()), next_step=f"gxr-batch init {path}"
        )
    try:
        return read_text(path)
    except FileNotFoundError:
        raise JobFileError(
            "There is no such job file.", where=str(path.absolute()), next_step="check the path"
        ) from None
    except IsADirectoryError:
        raise JobFileError(
            "This is a folder, not a job file.",
            where=str(path.absolute()),
            next_step="name the job file, e.g. my.toml; resume a run with its job file",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(
            f"The job file cannot be read: {why_unreadable(error)}.", where=str(path.absolute())
        ) from None


def _apply(data: dict[str, Any], override: str) -> str:
    """Apply one `section.key=value` override to the job file's data and return its dotted key."""
    dotted, equals, raw = override.partition("=")
    keys = dotted_keys(dotted)
    if not equals or not all(keys):
        raise JobFileError(
            "--set takes section.key=value.",
            where=_quoted(f"--set {dotted.split(' ')[0]}"),  # what follows may be a prompt
            next_step="e.g. --set sampling.temperature=0.4",
        )
    try:
        parsed = tomllib.loads(f"value = {raw}")
        value = parsed["value"] if len(parsed) == 1 else raw
    except (ValueError, RecursionError):
        value = raw  # a bare word is text: shells remove the quotes
    _put(data, keys, value, where=f"--set {dotted}")
    return ".".join(keys)


def dotted_keys(dotted: str) -> list[str]:
    """Return the keys of a dotted one, which may be quoted as in TOML: form.section."Key findings".kind."""
    try:
        found: Any = tomllib.loads(f"x = {{{dotted} = 0}}")["x"]  # in one line: nothing but keys can be in it
    except ValueError:
        return [key.strip() for key in dotted.split(".")]
    keys = []
    while isinstance(found, dict):
        [(key, found)] = found.items()
        keys.append(key)
    return keys


def _put(data: dict[str, Any], keys: Sequence[str], value: Any, *, where: str) -> None:
    target = data
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise JobFileError(f"{_quoted(key)} is not a section of the job file.", where=_quoted(where))
    target[keys[-1]] = value


def _quoted(name: str) -> str:
    from gxr_batch.cells import quoted  # imports pyarrow, which takes time

    return quoted(name)


def _fault(error: Exception) -> str:
    """Return what a TOML error says: a key that it names may be long, the line at its end is kept."""
    what, at, place = str(error).rpartition(" (at ")
    return f"{_quoted(what)}{at}{place}" if at else _quoted(place)
