"""Guess the job file for a table: which column is which, from names and content, each guess with its reason.

Every guess is a line of the job file with its reason as a comment. Nothing here writes a file or calls a model.
"""

from __future__ import annotations

import glob
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from gxr_batch.cells import NotText, for_terminal, is_bytes, is_text, prompt_values_of
from gxr_batch.disk import expanded, temporary_folder
from gxr_batch.errors import TableError, UserError
from gxr_batch.job import COMMON, InputSection, PromptSection
from gxr_batch.ledger import is_run
from gxr_batch.prompts import Templates
from gxr_batch.rows.columns import FieldMap, counted, listed, plausible
from gxr_batch.rows.compression import EXTENSIONS
from gxr_batch.rows.csv_layout import ROW_NAMES
from gxr_batch.rows.csv_tables import DelimitedFile
from gxr_batch.rows.ingest import ingest
from gxr_batch.rows.null_words import words_in
from gxr_batch.rows.source_files import TABLES, SourceFile
from gxr_batch.rows.survey import Survey, survey
from gxr_batch.rows.workbook_tables import WorkbookSheet

# Template field -> column names for it, the most specific first; spaces, case and punctuation do not matter.
_NAMES: dict[str, tuple[str, ...]] = {
    "findings": ("findings", "finding", "finding labels", "report findings", "observations", "report", "report text",
                 "radiology report", "impression", "description", "caption", "labels", "text"),
    "age": ("age", "patient age", "age years", "age in years", "age at study"),
    "sex": ("sex", "gender", "patient sex", "patient gender"),
    "history": ("history", "medical history", "clinical history", "past medical history", "risk factors"),
    "presentation": ("presentation", "presenting complaint", "chief complaint", "complaint", "symptoms", "indication",
                     "reason for exam", "reason for examination", "clinical information"),
    "comparison": ("comparison", "prior", "prior study", "prior findings", "previous", "previous findings"),
    "condition_a": ("condition a", "condition 1", "condition1"),
    "condition_b": ("condition b", "condition 2", "condition2"),
    "topic": ("topic", "question"),
}  # fmt: skip
_ID_NAMES = (
    "case id", "id", "row id", "study id", "study", "exam id", "report id", "image id", "image index", "uid", "uuid",
    "study instance uid", "accession", "accession number", "filename", "file name", "path", "key", "number", "no", "nr",
    "case", "film", "film id", "film no", "case no", "study no", "patient id", "subject id",
)  # fmt: skip
_LONGEST_ID = 100
_EXAMPLE_NAMES = ("findings", "age", "sex")
_MOST = 0.5
_LEAST_FILLED = 0.1
_LEAST_WORDS = 3  # on average; a column with fewer is not taken for findings by its content alone
_NOT_TEXT = ("skip_lines", "column_names")
_KNOWN_SEXES = ("m", "male", "man", "boy", "f", "female", "woman", "girl")
_ROWS_LOOKED_AT = 100_000  # for text lengths and missing-value words; ids are compared over the whole table


@dataclass(frozen=True)
class Guess:
    """A value of the job file and why it was chosen."""

    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """The guesses for a table. `columns` maps template fields to columns; `unused` are the other columns."""

    name: str
    table: str
    rows: int
    template: Guess
    columns: Mapping[str, Guess]
    unused: tuple[str, ...]
    id_column: Guess
    delimiter: Guess | None
    encoding: Guess | None
    layout: Mapping[str, Guess] = field(default_factory=dict)
    null_values: Mapping[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """Return the job file."""
        return "\n".join([*_input_lines(self), *_prompt_lines(self), *_MODEL_LINES]) + "\n"


def guess_job(table: str, chosen: Mapping[str, str], name: str = "", column_names: Sequence[str] = ()) -> NewJob:
    """Guess the job for a table; `chosen` maps fields to columns and overrides the guesses.

    `table` is a file, a folder or a glob, `name` the name of the job, by default that of the table, `column_names` the
    names of a table without a header line. Reads the whole table once. Raises TableError if the table cannot be read,
    UserError if no column can be the findings.
    """
    try:
        section = InputSection(path=table, columns=dict(chosen), column_names=tuple(column_names))
    except ValidationError:  # empty, too long, or bytes that are not text
        raise UserError("This cannot be the path of a table.", where="TABLE", next_step="name a file") from None
    if is_run(expanded(table)):
        raise UserError(
            "This is the folder of a run; init writes jobs for tables.",
            where=table,
            next_step=f"copy the job file of that run and set input.path = {_toml(table)}; docs/second-jobs.md shows a "
            "job that reads a run",
        )
    seen = survey(section)
    names = seen.schema.names
    if not plausible(names) and not chosen:
        raise TableError(
            "The table seems to have no header line.",
            where=table,
            next_step=f"name its {counted(len(names), 'column')} with --names {','.join(_EXAMPLE_NAMES[: len(names)])}"
            f"{',...' if len(names) > len(_EXAMPLE_NAMES) else ''}; if the first line is the header, confirm it with "
            "--column findings=COLUMN",
        )
    with temporary_folder("gxr-batch-init") as scratch:
        target = scratch / "input.parquet"
        unmapped = FieldMap(templates={"basic": ()}, default="basic", columns={})
        rows = ingest(seen, unmapped, target, id_column="", prior=None, limit=None).rows
        with pq.ParquetFile(target) as copy:
            guessed = _fields(seen, copy, chosen, table)
            template, fields = _template(guessed, chosen)
            columns = {field: guess for field, guess in guessed.items() if field in fields}
            id_column = _id_column(copy, names, {guess.value for guess in columns.values()})
            nulls = _null_words(copy, [guess.value for guess in columns.values()])
    taken = {id_column.value, *(guess.value for guess in columns.values())}
    return NewJob(
        name=_job_name(name or _stem(table)),
        table=table,
        rows=rows,
        template=template,
        columns=columns,
        unused=tuple(column for column in names if column not in taken),
        id_column=id_column,
        delimiter=_delimiter(seen),
        encoding=_encoding(seen),
        layout=_layout(seen, column_names),
        null_values=nulls,
    )


def _plain(name: str) -> str:
    """Return a column name as words in lower case: "Finding_Labels" and "findingLabels" are "finding labels"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(re.findall(r"[^\W_]+", spaced.lower()))


def _fields(seen: Survey, copy: pq.ParquetFile, chosen: Mapping[str, str], table: str) -> dict[str, Guess]:
    names = seen.schema.names
    found = {name: Guess(column, "chosen with --column") for name, column in chosen.items()}
    unknown = [column for column in chosen.values() if column not in names]
    unknown_fields = [name for name in chosen if name not in _NAMES]
    if unknown or unknown_fields:
        raise UserError(
            f"The table has no column {', '.join(unknown)}."
            if unknown
            else f"No built-in template has a field {', '.join(unknown_fields)}.",
            where="--column",
            next_step=listed(names) if unknown else f"the fields are {', '.join(_NAMES)}",
        )
    plain = {_plain(name): name for name in reversed(names)}
    for name, meanings in _NAMES.items():
        taken = {guess.value for guess in found.values()}
        named = [plain[word] for word in meanings if word in plain and plain[word] not in taken]
        filled = [column for column in named if _filled(_column(copy, column))]
        if name == "topic":
            filled = [column for column in filled if not _asks(_column(copy, column))]
        if name not in found and filled:
            others = f"; {', '.join(map(_comment, filled[1:]))} would fit too" if filled[1:] else ""
            found[name] = Guess(filled[0], ("same name" if filled[0] == name else "by its name") + others)
    if not {"findings", "topic"} & found.keys() and not {"condition_a", "condition_b"} <= found.keys():
        found["findings"] = _longest_text(seen, copy, {guess.value for guess in found.values()}, table)
    return {name: _warned(name, found[name], copy) for name in _NAMES if name in found}


def _warned(name: str, guess: Guess, copy: pq.ParquetFile) -> Guess:
    """Return the guess with what its cells lack: rows without findings fail, and codes for a sex say nothing."""
    cells = _column(copy, guess.value)
    empty = len(cells) - _filled(cells)
    if name == "findings" and empty:
        return Guess(guess.value, f"{guess.reason}; {counted(empty, 'empty cell')}, whose rows will fail")
    if name == "sex":
        texts = _texts(cells)
        known = None if texts is None else pc.is_in(pc.utf8_lower(pc.utf8_trim_whitespace(texts)), value_set=_sexes())
        if known is None or not pc.any(known).as_py():
            return Guess(guess.value, f"{guess.reason}; no cell is M, F, male or female, so check the prompts")
    return guess


def _sexes() -> pa.Array:
    return pa.array(_KNOWN_SEXES, pa.string())


def _longest_text(seen: Survey, copy: pq.ParquetFile, taken: set[str], table: str) -> Guess:
    """Return the free column with most text. Raises UserError if none looks like prose."""
    found: dict[str, tuple[float, float]] = {}  # words in all rows, words of a filled cell
    for column in seen.schema:
        if column.name in taken:
            continue
        cells = _column(copy, column.name).slice(0, _ROWS_LOOKED_AT)
        if is_text(cells.type) and not _asks(cells) and _mean_count(cells, r"\pL{2,}") >= _LEAST_WORDS:
            words = _mean_count(cells, r"\S\s+\S") + 1
            filled = _filled(cells) / len(cells)
            if words >= _LEAST_WORDS and filled >= _LEAST_FILLED:
                found[column.name] = (words * filled, words)
    if not found:
        raise UserError(
            "No column looks like the findings.",
            where=table,
            next_step=f"name it: --column findings=COLUMN; {listed(seen.schema.names)}; if several columns hold them, "
            "name one, and change the template in the job file (docs/templates.md)",
        )
    longest = max(found, key=found.__getitem__)
    return Guess(longest, f"the longest texts of the table, {found[longest][1]:,.0f} words on average")


def _mean_count(cells: pa.ChunkedArray, pattern: str) -> float:
    return float(pc.mean(pc.count_substring_regex(cells, pattern)).as_py() or 0.0)


def _asks(cells: pa.ChunkedArray) -> bool:
    """Return whether most texts are questions, which are neither findings nor the topic of a sentence."""
    return is_text(cells.type) and _mean_count(cells, r"[?\x{ff1f}]\s*$") > _MOST


def _filled(cells: pa.ChunkedArray) -> int:
    """Return how many cells are not blank."""
    if not is_text(cells.type):
        return int(len(cells) - cells.null_count)
    return int(pc.sum(pc.not_equal(pc.utf8_trim_whitespace(cells), "")).as_py() or 0)


def _texts(cells: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Return cells as text, None if their type has none that could name a row."""
    if is_text(cells.type):
        return cells.cast(pa.string())
    if pa.types.is_integer(cells.type):
        return cells.cast(pa.string(), safe=False)
    return None


def _column(copy: pq.ParquetFile, name: str) -> pa.ChunkedArray:
    """Return a column; categories as their values, and bytes as text if they are text."""
    cells = copy.read(columns=[name])[name]
    if pa.types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    if is_bytes(cells.type):
        with suppress(NotText):
            return pa.chunked_array([pa.array(prompt_values_of(cells), pa.string())])
    return cells


def _id_column(copy: pq.ParquetFile, names: Sequence[str], fields: set[str]) -> Guess:
    """Return the first likely id column with a different value in every row, "" if there is none."""
    plain = {_plain(name): name for name in reversed(names)}
    by_name = [plain[word] for word in _ID_NAMES if word in plain]
    repeated = ""
    for name in dict.fromkeys([*by_name, *names]):
        texts = None if name in {*fields, ROW_NAMES} else _texts(_column(copy, name))
        if texts is None or not len(texts):
            continue
        longest = pc.max(pc.utf8_length(texts)).as_py() or 0
        whole = not texts.null_count and longest <= _LONGEST_ID and not pc.any(pc.equal(texts, "")).as_py()
        distinct = pc.count_distinct(texts).as_py()
        if whole and distinct == len(texts):
            return Guess(name, "every value is different, so rows keep their ids when the table is sorted")
        if name in by_name and not repeated:
            repeated = f"{_comment(name)} repeats: {counted(distinct, 'value')} in {len(texts):,} rows; "
    return Guess("", f"{repeated}no column has a different value in every row, so ids come from the row's content")


def _null_words(copy: pq.ParquetFile, columns: Sequence[str]) -> dict[str, int]:
    """Count the cells that hold only a word for a missing value."""
    found: Counter[str] = Counter()
    for name in dict.fromkeys(columns):
        found.update(words_in(_column(copy, name).slice(0, _ROWS_LOOKED_AT)))
    return dict(found)


def _template(columns: Mapping[str, Guess], chosen: Mapping[str, str]) -> tuple[Guess, tuple[str, ...]]:
    """Return the built-in template that uses the chosen columns and most of the others, and its fields.

    Raises UserError if no template uses all chosen fields.
    """
    templates = Templates(PromptSection())
    fits = {name: templates.get(name) for name in ("clinical_case", "comparative", "educational", "basic")}
    usable = [
        name
        for name, template in fits.items()
        if set(template.required) <= columns.keys() and chosen.keys() <= set(template.fields)
    ]
    if not usable:
        raise UserError(
            f"No built-in template uses {', '.join(chosen)} and has all the fields that it requires.",
            where="--column",
            next_step="gxr-batch templates list",
        )
    best = max(usable, key=lambda name: len(set(fits[name].fields) & columns.keys()))
    used = [name for name in columns if name in fits[best].fields]
    if used == ["findings"] and "basic" in usable:
        best = "basic"
    reason = f"uses {', '.join(used)}; see `gxr-batch templates list`"
    return Guess(best, reason), tuple(fits[best].fields)


def _files(seen: Survey) -> list[SourceFile]:
    return [file for file in seen.files if isinstance(file, SourceFile)]


def _delimiter(seen: Survey) -> Guess | None:
    found = {file.delimiter for file in _files(seen)}
    if len(found) > 1:
        return Guess("auto", "the files have different delimiters")
    return Guess(found.pop(), "as found in the file") if found != {""} else None


def _encoding(seen: Survey) -> Guess | None:
    found = {file.encoding for file in _files(seen)} - {""}
    if len(found) == 1 and found != {"utf-8"}:
        return Guess(found.pop(), "as found in the file; change it if letters look wrong in the prompts")
    return Guess("auto", "UTF-8, unless a byte order mark names another encoding") if found else None


def _layout(seen: Survey, column_names: Sequence[str]) -> dict[str, Guess]:
    """Return the other keys that say how the files are read, if all files are read in the same way."""
    files = _files(seen)
    sheets = {file.sheet if isinstance(file, WorkbookSheet) else "" for file in files}
    layouts = {file.layout[1:3] if isinstance(file, DelimitedFile) else ("", 0) for file in files}
    found: dict[str, Guess] = {}
    if len(sheets) == 1 and (sheet := sheets.pop()):
        found["sheet"] = Guess(sheet, "the first sheet of the workbook")
    if len(layouts) == 1:
        escape, skip = layouts.pop()
        if escape:
            found["escape"] = Guess(escape, "the character before quotes inside cells")
        if skip:
            found["skip_lines"] = Guess(str(skip), "lines above the header")
    if column_names:
        found["column_names"] = Guess(f"[{', '.join(map(_toml, column_names))}]", "the table has no header line")
    return found


def _stem(table: str) -> str:
    """Return the name of a table without its endings; of a glob the name of its folder, except `key=value` folders."""
    if not glob.has_magic(table) and not Path(table).is_dir():
        endings = "|".join(map(re.escape, TABLES))
        packed = "|".join(map(re.escape, EXTENSIONS))
        return re.sub(rf"({endings})?({packed})?$", "", Path(table).name, flags=re.IGNORECASE)
    named = [part for part in Path(os.path.abspath(table)).parts if not glob.has_magic(part) and "=" not in part]
    return named[-1]


def _job_name(stem: str) -> str:
    plain = unicodedata.normalize("NFKD", re.sub(r"\s+", "-", stem))  # letters without their accents
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "", plain)[:80] or "job"


def _toml(value: str) -> str:
    """Return a TOML string."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    """Return a text that fits into a one-line comment."""
    return for_terminal(text).replace("\n", " ").replace("\t", " ")


def _lines_up(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Return `key = value   # comment` lines with aligned comments."""
    width = min(48, max((len(entry) for entry, _ in entries), default=0))
    return [f"{entry:<{width}}   # {comment}" if comment else entry for entry, comment in entries]


def _input_lines(job: NewJob) -> list[str]:
    entries = [
        (
            f"path = {_toml(job.table)}",
            f"{counted(job.rows, 'row')} when this file was written; a folder or a glob works too",
        )
    ]
    entries.append((f"id_column = {_toml(job.id_column.value)}", job.id_column.reason))
    entries += [
        (f"{key} = {_toml(guess.value)}", guess.reason)
        for key, guess in (("delimiter", job.delimiter), ("encoding", job.encoding))
        if guess is not None
    ]
    entries += [
        (f"{key} = {guess.value if key in _NOT_TEXT else _toml(guess.value)}", guess.reason)
        for key, guess in job.layout.items()
    ]
    if job.null_values:
        found = ", ".join(f"{word} {count:,}" for word, count in job.null_values.items())
        reason = f"cells with only a word for a missing value count as missing; found: {found}"
        entries.append((f"null_values = {_toml(COMMON)}", reason))
    columns = [(f"{name} = {_toml(guess.value)}", guess.reason) for name, guess in job.columns.items()]
    unused = ["# Not used in prompts, but kept in the results: " + ", ".join(map(_comment, job.unused))]
    return [
        "# Written by `gxr-batch init`; each guess is followed by its reason. Correct wrong guesses, then run",
        "# `gxr-batch check` again. docs/job-file.md of gxr-batch lists every key.",
        f"name = {_toml(job.name)}",
        "",
        "[input]",
        *_lines_up(entries),
        "",
        "[input.columns]   # field of the template = column of the table",
        *_lines_up(columns),
        *(unused if job.unused else []),
        "",
    ]


def _prompt_lines(job: NewJob) -> list[str]:
    return ["[prompt]", *_lines_up([(f"template = {_toml(job.template.value)}", job.template.reason)]), ""]


_MODEL_LINES = (
    "[model]",
    *_lines_up([('path = "demo"', "the small demo model; for real cases the hub id or folder of your model")]),
    "",
    "[sampling]",
    *_lines_up(
        [
            ("temperature = 0.3", "suits the demo model; remove both lines for the 4B model (0.7 and 1.1)"),
            ("repetition_penalty = 1.0", ""),
        ]
    ),
    "",
    "[run]",
    *_lines_up([('output = "outputs/{name}"', "the run folder; with {date} in it, each day starts a new run")]),
    "",
    "[export]",
    *_lines_up([('formats = ["xlsx", "report"]', "a workbook for reviewers, an HTML report to read")]),
)
