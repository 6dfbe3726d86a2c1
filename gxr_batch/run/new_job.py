"""A job file for a table nobody has described yet: which column is which, guessed from names and content, with reasons.

Every guess is a line of the job file with its reason as a comment. Nothing here writes a file or calls a model.
"""

from __future__ import annotations

import glob
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gxr_batch.cells import for_terminal, is_bytes
from gxr_batch.errors import TableError, UserError
from gxr_batch.job import COMMON, InputSection, PromptSection
from gxr_batch.prompts import Templates
from gxr_batch.rows.columns import FieldMap, listed, plausible
from gxr_batch.rows.ingest import ingest
from gxr_batch.rows.null_words import words_in
from gxr_batch.rows.parquet_tables import is_text
from gxr_batch.rows.survey import Survey, survey

# Template field -> column names that mean it, the most telling first; blanks, case and punctuation do not matter.
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
    "patient id", "subject id",
)  # fmt: skip
_LONGEST_ID = 100
_LEAST_PROSE = 20  # characters on average, below which a column is not taken for findings by its content alone
_ROWS_LOOKED_AT = 100_000  # for lengths and words; ids are compared over the whole table


@dataclass(frozen=True)
class Guess:
    """A value of the job file and why it was chosen."""

    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What was found in a table. `columns` maps template fields to columns; `unused` are the other columns."""

    name: str
    table: str
    rows: int
    template: Guess
    columns: Mapping[str, Guess]
    unused: tuple[str, ...]
    id_column: Guess
    delimiter: Guess | None
    encoding: Guess | None
    null_values: Mapping[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """Return the job file."""
        return "\n".join([*_input_lines(self), *_prompt_lines(self), *_MODEL_LINES]) + "\n"


def guess_job(table: str, chosen: Mapping[str, str]) -> NewJob:
    """Look at a table and return the job for it; `chosen` maps fields to columns and overrides the guesses.

    `table` is a path or a glob. Reads the whole table once. Raises TableError if the table cannot be read, UserError if
    no column can be the findings.
    """
    seen = survey(InputSection(path=table))
    names = seen.schema.names
    if not plausible(names):
        raise TableError(
            "The table seems to have no header line.",
            where=table,
            next_step=f"{listed(names)} add a line with the column names",
        )
    with tempfile.TemporaryDirectory(prefix="gxr-batch-init-") as scratch:
        copy = Path(scratch) / "input.parquet"
        unmapped = FieldMap(templates={"basic": ()}, default="basic", columns={})
        rows = ingest(seen, unmapped, copy, id_column="", prior=None, limit=None).rows
        guessed = _fields(seen, copy, chosen, table)
        template, fields = _template(guessed)
        columns = {name: guess for name, guess in guessed.items() if name in fields or name in chosen}
        id_column = _id_column(copy, names, {guess.value for guess in columns.values()})
        nulls = _null_words(copy, [guess.value for guess in columns.values()])
    taken = {id_column.value, *(guess.value for guess in columns.values())}
    return NewJob(
        name=_job_name(table),
        table=table,
        rows=rows,
        template=template,
        columns=columns,
        unused=tuple(name for name in names if name not in taken),
        id_column=id_column,
        delimiter=_delimiter(seen),
        encoding=_encoding(seen),
        null_values=nulls,
    )


def _plain(name: str) -> str:
    """Return a column name as words in lower case: "Finding_Labels" and "findingLabels" are "finding labels"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(re.findall(r"[^\W_]+", spaced.lower()))


def _fields(seen: Survey, copy: Path, chosen: Mapping[str, str], table: str) -> dict[str, Guess]:
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
        match = next((plain[word] for word in meanings if word in plain and plain[word] not in taken), None)
        if name not in found and match is not None:
            found[name] = Guess(match, "same name" if match == name else "by its name")
    if not {"findings", "topic"} & found.keys() and not {"condition_a", "condition_b"} <= found.keys():
        found["findings"] = _longest_text(seen, copy, {guess.value for guess in found.values()}, table)
    return {name: found[name] for name in _NAMES if name in found}


def _longest_text(seen: Survey, copy: Path, taken: set[str], table: str) -> Guess:
    """Return the free column with the longest texts. Raises UserError if none looks like prose."""
    lengths: dict[str, float] = {}
    for column in seen.schema:
        if column.name in taken or not (is_text(column.type) or is_bytes(column.type)):
            continue
        with suppress(pa.ArrowInvalid):  # bytes that are no text
            cells = _column(copy, column.name).slice(0, _ROWS_LOOKED_AT).cast(pa.large_string())
            lengths[column.name] = pc.mean(pc.utf8_length(cells)).as_py() or 0.0
    longest = max(lengths, key=lengths.__getitem__, default="")
    if lengths.get(longest, 0) < _LEAST_PROSE:
        raise UserError(
            "No column looks like the findings.",
            where=table,
            next_step=f"name it: --column findings=COLUMN; {listed(seen.schema.names)}",
        )
    return Guess(longest, f"the longest texts of the table, {lengths[longest]:,.0f} characters on average")


def _column(copy: Path, name: str) -> pa.ChunkedArray:
    return pq.read_table(copy, columns=[name], partitioning=None)[name]


def _id_column(copy: Path, names: Sequence[str], fields: set[str]) -> Guess:
    """Return the column whose cells name the rows, "" if none does."""
    plain = {_plain(name): name for name in reversed(names)}
    by_name = [plain[word] for word in _ID_NAMES if word in plain]
    candidates = [name for name in dict.fromkeys([*by_name, names[0]]) if name not in fields]
    repeated = ""
    for name in candidates:
        cells = _column(copy, name)
        if pa.types.is_nested(cells.type) or pa.types.is_floating(cells.type) or not len(cells):
            continue
        try:
            texts = cells.cast(pa.string(), safe=False) if not is_text(cells.type) else cells
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # bytes that are no text, and types without a text form
            continue
        longest = pc.max(pc.utf8_length(texts)).as_py() or 0
        whole = not texts.null_count and longest <= _LONGEST_ID and not pc.any(pc.equal(texts, "")).as_py()
        distinct = pc.count_distinct(texts).as_py()
        if whole and distinct == len(texts):
            return Guess(name, "every cell is different, so a row is found again after the table was sorted")
        if name in by_name and not repeated:
            repeated = f"{_comment(name)} names {distinct:,} of {len(texts):,} rows; "
    return Guess("", f"{repeated}no column names every row, so ids come from the row's content")


def _null_words(copy: Path, columns: Sequence[str]) -> dict[str, int]:
    """Count the cells that hold only a word for a missing value."""
    found: Counter[str] = Counter()
    for name in dict.fromkeys(columns):
        found.update(words_in(_column(copy, name).slice(0, _ROWS_LOOKED_AT)))
    return dict(found)


def _template(columns: Mapping[str, Guess]) -> tuple[Guess, tuple[str, ...]]:
    """Return the built-in template that uses most of the columns, and its fields."""
    templates = Templates(PromptSection())
    fits = {name: templates.get(name) for name in ("clinical_case", "comparative", "educational", "basic")}
    usable = [name for name, template in fits.items() if set(template.required) <= columns.keys()]
    best = max(usable, key=lambda name: len(set(fits[name].fields) & columns.keys()))
    used = [name for name in columns if name in fits[best].fields]
    if used == ["findings"]:
        best = "basic"
    reason = f"uses {', '.join(used)}; see `gxr-batch templates list`"
    return Guess(best, reason), tuple(fits[best].fields)


def _delimiter(seen: Survey) -> Guess | None:
    found = {file.delimiter for file in seen.files}
    if len(found) > 1:
        return Guess("auto", "the files have different ones")
    return Guess(found.pop(), "as found in the file") if found != {""} else None


def _encoding(seen: Survey) -> Guess | None:
    found = {file.encoding for file in seen.files} - {""}
    if len(found) == 1 and found != {"utf-8"}:
        return Guess(found.pop(), "as found in the file; change it if letters look wrong in the prompts")
    return Guess("auto", "UTF-8, or a byte order mark says otherwise") if found else None


def _job_name(table: str) -> str:
    path = Path(table)
    stem = path.parent.name if glob.has_magic(path.name) else path.name.split(".")[0]
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "", re.sub(r"\s+", "-", stem))[:80] or "job"


def _toml(value: str) -> str:
    """Return a TOML string."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    """Return a text that stays within a comment's line."""
    return for_terminal(text).replace("\n", " ").replace("\t", " ")


def _lines_up(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Return `key = value   # comment` lines with their comments below each other."""
    width = min(48, max((len(entry) for entry, _ in entries), default=0))
    return [f"{entry:<{width}}   # {comment}" if comment else entry for entry, comment in entries]


def _input_lines(job: NewJob) -> list[str]:
    entries = [(f"path = {_toml(job.table)}", f"{job.rows:,} rows when this file was written; a glob works too")]
    entries.append((f"id_column = {_toml(job.id_column.value)}", job.id_column.reason))
    entries += [
        (f"{key} = {_toml(guess.value)}", guess.reason)
        for key, guess in (("delimiter", job.delimiter), ("encoding", job.encoding))
        if guess is not None
    ]
    if job.null_values:
        counted = ", ".join(f"{word} {count:,}" for word, count in job.null_values.items())
        entries.append(
            (f"null_values = {_toml(COMMON)}", f"cells with only a word for a missing value are missing: {counted}")
        )
    columns = [(f"{name} = {_toml(guess.value)}", guess.reason) for name, guess in job.columns.items()]
    unused = ["# Not used in prompts, but kept in the results: " + ", ".join(map(_comment, job.unused))]
    return [
        "# Written by `gxr-batch init`: every guess has its reason behind it. Change what is wrong, then run",
        "# `gxr-batch check` again. jobs/nightly_teaching_cases.toml lists every key.",
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
    *_lines_up([('output = "outputs/{name}"', "the run folder; with {date} in it every day starts a new run")]),
    "",
    "[export]",
    *_lines_up([('formats = ["xlsx", "report"]', "a workbook for reviewers, an HTML report to read")]),
)
