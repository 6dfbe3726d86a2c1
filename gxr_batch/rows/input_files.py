"""Which files the input path names: one file, a glob, or the tables in a folder as Spark, pandas and people leave them.

Markers of other programs, hidden files and files of other kinds are passed over. A table of a lake (Delta, Hudi,
Iceberg) is refused: its files hold rows that the table no longer has.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from gxr_batch.cells import quoted
from gxr_batch.disk import expanded
from gxr_batch.errors import TableError
from gxr_batch.rows.columns import counted
from gxr_batch.rows.compression import EXTENSIONS
from gxr_batch.rows.source_files import TABLES, reading

# What Hadoop and Spark write next to their data.
_MARKERS = ("_SUCCESS", "_metadata", "_common_metadata", "_committed_", "_started_", "_temporary", "_spark_metadata")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_LISTED = 3
# What a run folder has: see gxr_batch.ledger.
_RUN = {"run.json", "parts"}


class Found(NamedTuple):
    """The files of an input path, in path order, and notices about what was passed over."""

    paths: tuple[Path, ...]
    notices: tuple[str, ...] = ()


def find(pattern: str) -> Found:
    """Return the files that a path, a folder or a glob names. Raises TableError if there are none."""
    path = expanded(pattern)
    if path.is_dir():
        found = _in_folder(path)
    elif os.path.lexists(path):  # a name that contains [ or * is taken literally first
        found = Found((path,))
    else:
        found = _in_glob(pattern, path)
    _refuse_lakes(found.paths)
    _refuse_files_of_a_run(found.paths)
    _refuse_twins(found.paths)
    return found


def folder_columns(path: Path) -> dict[str, str | None]:
    """Return the columns that the `key=value` folders of a path mean, None for Hive's word for a missing value."""
    columns: dict[str, str | None] = {}
    for part in path.parts[:-1]:
        key, equals, value = part.partition("=")
        if equals and key.strip():
            columns[unquote(key)] = None if value in {_NO_VALUE, ""} else unquote(value)
    return columns


def ending_of(path: Path) -> str:
    """Return the extension that says what a file holds, in lower case: .csv of cases.CSV.gz."""
    inner = path.with_suffix("") if path.suffix.lower() in EXTENSIONS else path
    return inner.suffix.lower()


def _in_folder(folder: Path) -> Found:
    tables: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in sorted(_walk(folder, set()), key=str):
        ending = ending_of(path)
        if any(map(_is_hidden, path.relative_to(folder).parts)) or ending not in TABLES:
            others += [] if _is_marker(path.name) else [path]
        else:
            tables.setdefault(ending, []).append(path)
    for ending in (".txt", ".json"):  # a licence, checksums, a description of the data
        others += tables.pop(ending, []) if len(tables) > 1 else []
    if len(tables) > 1:
        kinds = ", ".join(f"{len(paths):,} {ending}" for ending, paths in sorted(tables.items()))
        raise TableError(
            f"The folder has tables of several kinds: {kinds}.",
            where=str(folder.absolute()),
            next_step=f'choose one with a glob: input.path = "{str(folder).rstrip("/")}/**/*{min(tables)}"',
        )
    if not tables:
        raise TableError(
            "The folder has no table.",
            where=str(folder.absolute()),
            next_step=f"a table is a file that ends in one of {', '.join(TABLES)}",
        )
    (paths,) = tables.values()
    return Found(tuple(paths), tuple(_passed_over(folder, others)))


def _passed_over(folder: Path, others: list[Path]) -> Iterator[str]:
    if others:
        names = ", ".join(quoted(path.relative_to(folder)) for path in sorted(others)[:_LISTED])
        more = ", ..." if len(others) > _LISTED else ""
        yield f"{quoted(folder)}: {counted(len(others), 'file')} passed over: {names}{more}"


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the files below a folder, except in hidden ones. Raises TableError, StorageError."""
    with reading(folder):
        status = folder.stat()
        entries = sorted(folder.iterdir())
    if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
        return
    seen.add((status.st_dev, status.st_ino))
    _refuse_lake(folder)
    _refuse_run(folder, entries)
    for entry in entries:
        if not entry.is_dir():
            yield entry
        elif not (entry.name.startswith(".") or _is_marker(entry.name)):
            yield from _walk(entry, seen)


def _is_marker(name: str) -> bool:
    return name.startswith((".", "~$", *_MARKERS)) or name.endswith(".crc")


def _is_hidden(name: str) -> bool:
    """Return whether Hadoop's tools pass over a file or folder: its name begins with a dot or an underscore."""
    return _is_marker(name) or (name.startswith("_") and "=" not in name)


def _in_glob(pattern: str, path: Path) -> Found:
    matched = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files: list[Path] = []
    notices: list[str] = []
    for one in matched:
        # What a failed job of Spark left in _temporary is below a folder that ** matches.
        if any(map(_is_marker, [one.name, *({*one.parts[:-1]} - {*path.parts})])):
            continue
        if not one.is_dir():
            files.append(one)
        # Spark writes a folder for every table, and Hive one for every value of a column.
        elif (ending_of(one) in TABLES or "=" in one.name) and any(_walk(one, set())):
            inside = _in_folder(one)
            files += inside.paths
            notices += inside.notices
    files = sorted(dict.fromkeys(files), key=str)
    if not files:
        only_markers = any(not one.is_dir() for one in matched)
        what = "No file matches the input path." if glob.has_magic(pattern) else "There is no such input file."
        raise TableError(
            "The input path matches no table, only files that other programs leave." if only_markers else what,
            where=str(path.absolute()),
            next_step="check input.path; relative paths start at the current directory",
        )
    return Found(tuple(files), tuple(notices))


def _refuse_run(folder: Path, entries: Iterable[Path]) -> None:
    if {entry.name for entry in entries} >= _RUN:
        raise TableError(
            "The input path names the folder of a run among others.",
            where=str(folder.absolute()),
            next_step=f'to read the run, set input.path = "{folder}"; to read the tables next to it, name them with a '
            'glob such as "inputs/*.csv"',
        )


def _refuse_files_of_a_run(paths: Iterable[Path]) -> None:
    """Raise TableError if two files are of one run: each has the run's rows, which would be read twice."""
    seen: dict[Path, Path] = {}
    for path in paths:
        folder = path.absolute().parent
        if seen.setdefault(folder, path) != path and all((folder / name).exists() for name in _RUN):
            raise TableError(
                "The input path names several files of a run, which hold the same rows.",
                where=f"{seen[folder]}, {path}",
                next_step=f'a job reads a run by its folder: input.path = "{path.parent}"',
            )


def _refuse_lakes(paths: Iterable[Path]) -> None:
    """Raise TableError if a file is inside a lake."""
    for folder in dict.fromkeys(folder for path in paths for folder in path.absolute().parents):
        _refuse_lake(folder)


def _refuse_lake(folder: Path) -> None:
    """Raise TableError if a folder is a lake: which rows of its files are valid is written elsewhere."""
    if lake := _lake(folder):
        raise TableError(
            f"The files belong to a table in {lake} format; they also hold rows that were deleted or replaced.",
            where=str(folder.absolute()),
            next_step=f"export the table's present rows to Parquet or CSV with the tool that reads {lake}, then set "
            "input.path to that file",
        )


def _lake(folder: Path) -> str:
    """Return the lake format of a folder's table, "" if it is none."""
    if (folder / "_delta_log").is_dir():
        return "Delta Lake"
    if (folder / ".hoodie").is_dir():
        return "Hudi"
    metadata = folder / "metadata"
    if any(metadata.glob("*.metadata.json")) or (metadata / "version-hint.text").exists():
        return "Iceberg"
    return ""


def _refuse_twins(paths: Iterable[Path]) -> None:
    """Raise TableError if a file lies next to its compressed copy: its rows would be read twice."""
    plain: dict[str, Path] = {}
    for path in paths:
        name = str(path.with_suffix("") if path.suffix.lower() in EXTENSIONS else path)
        other = plain.setdefault(name, path)
        if other != path:
            raise TableError(
                "The input path names a table and its compressed copy.",
                where=f"{other}, {path}",
                next_step="set input.path to one of them, or to a glob that matches only one of each",
            )
