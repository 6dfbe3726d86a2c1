"""Inspects the table before anything is copied: files, encodings, headers, types. It keeps no row."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from gxr_batch.errors import TableError
from gxr_batch.job import COMMON, InputSection
from gxr_batch.rows import csv_tables, parquet_tables
from gxr_batch.rows.columns import Cleaned, clean, label, require_column
from gxr_batch.rows.encoding import scan
from gxr_batch.rows.source_files import SourceFile, find, kind_of, sha256_of, stat_file


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The files of the input path, in order, and the columns of the table that they form.

    `schema` has the user's columns in order of first appearance, under their final names. `sha256` covers the contents
    of all files in order and how they are read, not their names. `notices` are sentences for the user. `common_nulls`:
    cells that hold a usual word for a missing value are null, besides those that hold one of `null_values`.
    """

    files: tuple[SourceFile, ...]
    schema: pa.Schema
    sha256: str
    notices: tuple[str, ...]
    null_values: tuple[str, ...] = ()
    common_nulls: bool = False


def survey(section: InputSection) -> Survey:
    """Inspect every file of the input. Raises TableError if one cannot be used, StorageError if the disk fails."""
    notices: dict[str, list[Path]] = {}
    files = tuple(_look(path, section, notices) for path in find(section.path))
    schema = _union(files)
    require_column(section.id_column, schema.names, key="input.id_column")
    marks = "\n".join(f"{file.kind} {file.encoding} {file.delimiter!r} {file.sha256}" for file in files)
    return Survey(
        files=files,
        schema=schema,
        sha256=hashlib.sha256(marks.encode()).hexdigest(),
        notices=tuple(_notice(text, paths) for text, paths in notices.items()),
        null_values=section.null_values if isinstance(section.null_values, tuple) else (),
        common_nulls=section.null_values == COMMON,
    )


def _look(path: Path, section: InputSection, notices: dict[str, list[Path]]) -> SourceFile:
    kind = kind_of(path)
    seen = stat_file(path)
    encoding = delimiter = ""
    if kind == "parquet":
        sha256 = sha256_of(path)
        found = parquet_tables.read_schema(path)
        cleaned = clean(found.names)
        types = [found.field(place).type for place in cleaned.places]
        width = len(found)
    else:
        encoding, sha256, notice = scan(path, section.encoding)
        delimiter = section.delimiter
        if delimiter == "auto":
            delimiter = csv_tables.find_delimiter(path, encoding)
        raw = csv_tables.read_header(path, encoding, delimiter)
        cleaned = clean(raw)
        types = [pa.string()] * len(cleaned.names)
        width = len(raw)
        if notice:
            notices.setdefault(notice, []).append(path)
    for notice in cleaned.notices:
        notices.setdefault(notice, []).append(path)
    return SourceFile(
        path=path,
        kind=kind,
        sha256=sha256,
        size=seen.st_size,
        mtime_ns=seen.st_mtime_ns,
        schema=_schema(path, cleaned, types),
        places=cleaned.places,
        width=width,
        encoding=encoding,
        delimiter=delimiter,
    )


def _schema(path: Path, cleaned: Cleaned, types: list[pa.DataType]) -> pa.Schema:
    if not cleaned.names:
        raise TableError("This file has no usable column.", where=str(path), next_step="; ".join(cleaned.notices))
    return pa.schema([pa.field(name, kind) for name, kind in zip(cleaned.names, types, strict=True)])


def _union(files: tuple[SourceFile, ...]) -> pa.Schema:
    """Return all columns in order of first appearance. Raises TableError if one has two types in different files."""
    first: dict[str, tuple[pa.DataType, Path]] = {}
    for file in files:
        for field in file.schema:
            kind, path = first.setdefault(field.name, (field.type, file.path))
            if kind == field.type or pa.types.is_null(field.type):
                continue
            if not pa.types.is_null(kind):
                called = label(file.schema.get_field_index(field.name), file.schema.names)
                raise TableError(
                    f"The column {called} has two types: {kind} in {path}, {field.type} in {file.path}.",
                    next_step="save the files with one type, or run them as separate jobs",
                )
            first[field.name] = (field.type, file.path)  # an all-null column takes the type of the others
    return pa.schema([pa.field(name, kind) for name, (kind, _) in first.items()])


def _notice(text: str, paths: list[Path]) -> str:
    more = f" and {len(paths) - 1:,} more files" if len(paths) > 2 else f" and {paths[1]}" if len(paths) == 2 else ""
    return f"{paths[0]}{more}: {text}"
