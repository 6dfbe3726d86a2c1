"""Inspects the table before anything is copied: sources, headers, types. It keeps no row."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from gxr_batch.cells import quoted
from gxr_batch.errors import TableError
from gxr_batch.job import COMMON, PROMPT_VERSION, InputSection
from gxr_batch.rows.columns import clean, counted, label, require_column, visible
from gxr_batch.rows.input_files import find, folder_columns
from gxr_batch.rows.source_files import Constant, Kind, Look, NothingInside, Source, SourceFile, kind_of, stat_file
from gxr_batch.rows.type_unions import union

# kind -> the module whose `look` inspects such a file; only those needed are imported
_READERS: dict[Kind, str] = {
    "delimited": "csv_tables",
    "jsonl": "jsonl_tables",
    "parquet": "parquet_tables",
    "workbook": "workbook_tables",
}
# Keys of [input] that only some kinds of files, or only runs, obey.
_KEYS_OF: dict[str, tuple[Kind | Literal["run"], ...]] = {
    "column_names": ("delimited", "workbook"),
    "skip_lines": ("delimited", "workbook"),
    "escape": ("delimited",),
    "sheet": ("workbook",),
    "only": ("run",),
}
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The sources of the input, in order, and the columns of the table that they form.

    `schema` has the user's columns in order of first appearance, under their final names. `sha256` covers the contents
    of all files in order and how they are read, not their names. `notices` are sentences for the user. `common_nulls`:
    cells that hold a usual word for a missing value are null, besides those that hold one of `null_values`.
    """

    files: tuple[Source, ...]
    schema: pa.Schema
    sha256: str
    notices: tuple[str, ...]
    null_values: tuple[str, ...] = ()
    common_nulls: bool = False


def survey(section: InputSection, sources: Sequence[Source] = (), *, version: int = PROMPT_VERSION) -> Survey:
    """Inspect the files of the input path, or the `sources` that the caller reads instead.

    `version` is of the rules by which prompts are made of cells (`prompt.version`): a run that has begun keeps its own.
    Raises TableError if one cannot be used, StorageError if the disk fails.
    """
    notices: dict[str, list[Path]] = {}
    said: list[str] = []
    files = tuple(sources) or _files(section, notices, said, version)
    schema = _union(files)
    require_column(section.id_column, schema.names, key="input.id_column")
    marks = "\n".join(file.mark for file in files)
    said += [_notice(text, paths) for text, paths in notices.items()]
    return Survey(
        files=files,
        schema=schema,
        sha256=hashlib.sha256(marks.encode()).hexdigest(),
        notices=(*said, *_gaps(files, schema), *_copies(files)),
        null_values=section.null_values if isinstance(section.null_values, tuple) else (),
        common_nulls=section.null_values == COMMON,
    )


def _files(
    section: InputSection, notices: dict[str, list[Path]], said: list[str], version: int
) -> tuple[SourceFile, ...]:
    """Inspect every file of the input path; files with nothing in them are passed over if others have something."""
    found = find(section.path)
    said += found.notices
    files: list[SourceFile] = []
    empty: dict[Path, NothingInside] = {}
    for path in found.paths:
        try:
            files.append(_look(path, section, notices, version))
        except NothingInside as error:
            empty[path] = error
    if not files:
        raise next(iter(empty.values())) from None
    if empty:
        names = ", ".join(map(quoted, list(empty)[:_NAMED])) + (", ..." if len(empty) > _NAMED else "")
        said.append(f"{counted(len(empty), 'empty file')} passed over: {names}")
    refuse_keys_without_effect(section, {file.path: file.kind for file in files})
    return tuple(files)


def _look(path: Path, section: InputSection, notices: dict[str, list[Path]], version: int) -> SourceFile:
    kind = kind_of(path)
    seen = stat_file(path)
    rules = (version,) if kind == "jsonl" else ()  # the other kinds are read by the same rules in every version
    found: Look = importlib.import_module(f"gxr_batch.rows.{_READERS[kind]}").look(path, section, *rules)
    own = {visible(name) for name in found.names}
    folders = folder_columns(path)
    added = [name for name in folders if visible(name) not in own]
    cleaned = clean([*found.names, *added], {section.id_column, *section.columns.values()})
    of_folders = [place >= len(found.names) for place in cleaned.places]
    fields = [
        pa.field(name, pa.string() if of_folder else found.types[place])
        for name, place, of_folder in zip(cleaned.names, cleaned.places, of_folders, strict=True)
    ]
    if not fields:
        raise TableError("This file has no usable column.", where=str(path), next_step="; ".join(cleaned.notices))
    constants = [
        Constant(name, folders[added[place - len(found.names)]])
        for name, place, of_folder in zip(cleaned.names, cleaned.places, of_folders, strict=True)
        if of_folder
    ]
    extra = []
    if constants:
        names = ", ".join(quoted(constant.name) for constant in constants)
        extra = [f"{'columns' if len(constants) > 1 else 'column'} {names} from the names of folders"]
    both = [name for name in folders if name not in added]
    extra += [f"the column {quoted(name)} is the file's, not the one in the name of its folder" for name in both]
    for notice in (*found.notices, *cleaned.notices, *extra):
        notices.setdefault(notice, []).append(path)
    return found.file(
        path=path,
        kind=kind,
        sha256=found.sha256,
        size=seen.st_size,
        mtime_ns=seen.st_mtime_ns,
        schema=pa.schema(fields),
        places=tuple(place for place in cleaned.places if place < len(found.names)),
        width=len(found.names),
        constants=tuple(constants),
        **found.fields,  # type: ignore[arg-type]  # the fields of `found.file`
    )


def refuse_keys_without_effect(section: InputSection, kinds: Mapping[Path, Kind | Literal["run"]]) -> None:
    """Raise TableError if a key of [input] has no effect on one of these sources."""
    given = {
        "column_names": bool(section.column_names),
        "skip_lines": section.skip_lines not in {"auto", 0},
        "escape": section.escape not in {"auto", ""},
        "sheet": bool(section.sheet),
        "only": bool(section.only),
    }
    for key, obeying in _KEYS_OF.items():
        other = next((path for path, kind in kinds.items() if kind not in obeying), None)
        if given[key] and other is not None:
            raise TableError(
                f"input.{key} has no effect on this {'run' if kinds[other] == 'run' else 'file'}.",
                where=f"{other}, input.{key}",
                next_step=f"remove input.{key}, or read this {'run' if kinds[other] == 'run' else 'file'} with a job "
                "that does not set it",
            )


def _union(files: Sequence[Source]) -> pa.Schema:
    """Return all columns in order of first appearance, each with a type that holds the values of all files.

    Raises TableError if there is no such type.
    """
    known: dict[str, tuple[pa.DataType, Source]] = {}
    for file in files:
        for field in file.schema:
            kind, first = known.setdefault(field.name, (field.type, file))
            both = union(kind, field.type)
            if both is None:
                called = label(file.schema.get_field_index(field.name), file.schema.names)
                raise TableError(
                    f"The column {called} has two types: {quoted(kind)} in {quoted(first.path)}, "
                    f"{quoted(field.type)} in {quoted(file.path)}.",
                    next_step="save the files with one type, or run them as separate jobs",
                )
            known[field.name] = (both, file if both == field.type and both != kind else first)
    return pa.schema([pa.field(name, kind) for name, (kind, _) in known.items()])


def _gaps(files: Sequence[Source], schema: pa.Schema) -> list[str]:
    """Return a notice about columns that only some of the files have."""
    notices = []
    for name in schema.names:
        without = [file.path for file in files if name not in file.schema.names]
        if without:
            called = label(schema.names.index(name), schema.names)
            notices.append(_notice(f"no column {called}; its cells are empty there", without))
    return notices


def _copies(files: Sequence[Source]) -> list[str]:
    """Return a notice about files with the same content."""
    first: dict[str, Path] = {}
    twice = [(file.path, first[file.mark]) for file in files if first.setdefault(file.mark, file.path) != file.path]
    return [
        f"{quoted(path)}: the same content as {quoted(other)}; its rows are read again" for path, other in twice[:1]
    ]


def _notice(text: str, paths: list[Path]) -> str:
    more = (
        f" and {len(paths) - 1:,} more files"
        if len(paths) > 2
        else f" and {quoted(paths[1])}"
        if len(paths) == 2
        else ""
    )
    return f"{quoted(paths[0])}{more}: {text}"
