"""Tables whose every cell is known: columns as a writer has them, and the prompts that they must become.

Nothing here calls the readers of gxr-batch: the generator knows what it wrote, and how docs/templates.md shows it.
`fuzz_files` writes such tables in every kind of file.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

# docs/templates.md: words for missing values.
NULL_WORDS = {"na", "n/a", ".", "\\n", "-", "nan", "none", "null", "unknown"}
PLAIN_TEXTS = ["opacity", "left effusion", "65", "007", "1.0", "2024-05-31", "TRUE", "F", "it's", "é"]
NASTY_TEXTS = [
    "", " ", "\t", "NA", " nan", "None", "unknown", "-", "\\N", "n.d.", "1,234", "a,b; c|d\te", 'say "x"', '"', "a\nb", "a\r\nb", "a\rb",
    "=1+1", "@x", "漢字", "\U0001f600", "a\u2028b", "\u202eb", "\u00adx", "\x00z", "\x1a", "\x1b[31m", "\x85", "{{ 7*7 }}", "{% if", "{#",
    "<start_of_turn>", "<b>&amp;</b>", "C:\\temp\\", "a\\", " padded ", "a_x0041_b", "x" * 3000, "-0", "1e5", "%s", "#x", "sep=;", "findings",
]  # fmt: skip


class Cell(NamedTuple):
    """A cell as it is written, the text that a prompt shows (None = missing), and whether a condition takes it."""

    value: Any
    text: str | None
    true: bool = True


MISSING = Cell(None, None, False)


@dataclass
class Column:
    """One column of a table. `kind` is its Arrow type; `part` what follows the field in a template, for a struct."""

    name: str
    cells: list[Cell]
    kind: pa.DataType = field(default_factory=pa.string)
    part: str = ""

    def __getitem__(self, rows: slice) -> Column:
        return replace(self, cells=self.cells[rows])


Table = list[Column]


@dataclass
class Wanted:
    """What a run must make of an input.

    `prompts` has the prompt of every row in order, None for a row that must fail with a reason; it is None as a whole
    if nothing is known. `codes` are the exit codes that the run may end with, `named` what its output must have.
    """

    prompts: list[str | None] | None
    codes: frozenset[int] = frozenset({0, 2, 3})
    named: tuple[str, ...] = ()

    def troubles(self, code: int, output: str, run: Path) -> list[str]:
        """Return what is wrong with the exit code, the output and the results of a run."""
        if code not in self.codes:
            return [f"ended {code}, not {sorted(self.codes)}: {output[-600:]}"]
        if code == 2 and 0 in self.codes:  # doubtful input may be refused
            return []
        troubles = [f"{name} is not named: {output[-600:]}" for name in self.named if name not in output]
        return troubles + (self._of_results(run) if code in {0, 3} and self.prompts is not None else [])

    def _of_results(self, run: Path) -> list[str]:
        names = ["gxr_status", "gxr_error", "gxr_prompt_sha256", "gxr_text"]
        results = pq.read_table(run / "results.parquet", columns=names, partitioning=None).to_pylist()
        prompts = self.prompts or []
        if len(results) != len(prompts):
            return [f"{len(prompts)} rows were written, {len(results)} are in the results"]
        troubles = [
            f"row {number}: written as {prompt!r}, but {row['gxr_error'] or row['gxr_text']!r}"
            for number, (prompt, row) in enumerate(zip(prompts, results, strict=True), start=1)
            if not _as_written(prompt, row)
        ]
        return troubles[:1] + [f"and {len(troubles) - 1} more rows"] * (len(troubles) > 1)


def _as_written(prompt: str | None, row: dict[str, Any]) -> bool:
    if prompt is None:
        return row["gxr_status"] == "failed" and bool(row["gxr_error"])
    turns = json.dumps([["user", prompt]], ensure_ascii=False)
    return row["gxr_status"] == "ok" and row["gxr_prompt_sha256"] == hashlib.sha256(turns.encode()).hexdigest()


def text_cell(text: str, nulls: Sequence[str] | str) -> Cell:
    """Return a cell of text under `input.null_values`."""
    word = text in nulls if not isinstance(nulls, str) else nulls == "common" and text.strip().lower() in NULL_WORDS
    return Cell(text, None, False) if word or not text.strip() else Cell(text, text.strip())


def texts(rng: random.Random, rows: int, *, nasty: float, nulls: Sequence[str] | str) -> list[Cell]:
    """Return cells of text, some of them unusual."""
    chosen = [rng.choice(NASTY_TEXTS if rng.random() < nasty else PLAIN_TEXTS) for _ in range(rows)]
    return [text_cell(text, nulls) for text in chosen]


# How a template uses a field `@`: its source, and the text that it makes of a cell (None: the row fails).
FORMS: list[tuple[str, Callable[[Cell], str | None]]] = [
    ("{{ @ }}", lambda cell: cell.text),
    ("{{ @ | default('none') }}", lambda cell: "none" if cell.text is None else cell.text),
    ("{{ @ or 'none' }}", lambda cell: cell.text if cell.true else "none"),
    ("{{ @ if @ else 'none' }}", lambda cell: cell.text if cell.true else "none"),
    ("{% if @ %}{{ @ }}{% endif %}", lambda cell: cell.text if cell.true else ""),
    ("{% for one in [@] if one %}{{ one }}{% endfor %}", lambda cell: cell.text if cell.true else ""),
    ("{% if @ is defined %}{{ @ }}{% else %}none{% endif %}", lambda cell: "none" if cell.text is None else cell.text),
]
NUMBER_TEXTS = {
    "65": "65", "1.0": "1", "-0.50": "-0.5", "+7": "7", "007": "7", "1e3": "1000", " 2.5 ": "2.5", "": None, "NA": "", "-": "",
    "1,234": None, "60 years": None, "x": None,
}  # fmt: skip


def _number(cell: Cell) -> str | None:
    return None if cell.text is None else NUMBER_TEXTS[cell.value]


def _is_65(cell: Cell) -> str | None:
    number = "" if cell.text is None else NUMBER_TEXTS[cell.value]
    return None if number is None else "yes" if number == "65" else "no"


NUMBER_FORMS = [("{{ @ | number }}", _number), ("{% if @ | number == 65 %}yes{% else %}no{% endif %}", _is_65)]


def template(rng: random.Random, table: Table) -> tuple[str, list[str | None]]:
    """Return a template that uses every column of a table, and the prompt of each row, None if the row must fail."""
    pieces, parts = [], []
    for column in table:
        optional = rng.random() < 0.8 or bool(column.part)
        forms = NUMBER_FORMS if column.name == "score" else FORMS[1:] if optional else FORMS
        form, make = rng.choice(forms)
        pieces.append(f"[{form.replace('@', column.name + column.part)}]")
        parts.append([make(cell) for cell in column.cells])
    rows: Iterable[tuple[str | None, ...]] = zip(*parts, strict=True)
    prompts = [None if None in row else "".join(f"[{part}]" for part in row) for row in rows]
    return "".join(pieces), prompts


def text_table(rng: random.Random, nulls: Sequence[str] | str, *, nasty: float) -> Table:
    """Return a table of text columns: case_id, which is never empty, findings, score and others."""
    rows = rng.choice([0, 1, 2, 3, 5, 8, 20, 40])
    table = [Column("case_id", [Cell(f"C{number:03d}", f"C{number:03d}") for number in range(rows)])]
    table += [Column(name, texts(rng, rows, nasty=nasty, nulls=nulls)) for name in ("findings", "history")]
    scores = [rng.choice(list(NUMBER_TEXTS)) for _ in range(rows)]
    if rng.random() < 0.5:
        table.append(Column("score", [text_cell(score, nulls) for score in scores]))
    return table


_TIME = dt.datetime(2024, 5, 31, 7, 30)
_ZONED = _TIME.replace(tzinfo=dt.UTC)
_NAN = Cell(float("nan"), None, False)


def _typed(*pairs: tuple[Any, str]) -> list[Cell]:
    return [Cell(value, text, bool(value)) for value, text in pairs]


_BLANKS = [Cell("", None, False), Cell(" ", None, False)]
_WORDS = [*_typed(("opacity", "opacity"), (" é ", "é"), ("=1", "=1")), *_BLANKS]
_BYTES = [Cell(cell.value.encode(), cell.text, cell.true) for cell in _WORDS]
_WHOLE = _typed((0, "0"), (1, "1"), (-5, "-5"), (65, "65"))
_NATURAL = _typed((0, "0"), (1, "1"), (65, "65"))
_FLOATS = [*_typed((1.2, "1.2"), (0.1, "0.1"), (-2.5, "-2.5"), (65.0, "65"), (0.0, "0")), _NAN]
_TIMES = _typed((_TIME, "2024-05-31 07:30:00"), (dt.datetime(1969, 1, 2), "1969-01-02 00:00:00"))
_DATES = _typed((dt.date(2024, 5, 31), "2024-05-31"), (dt.date(1900, 1, 2), "1900-01-02"))
_LISTS = [
    *_typed((["a", "b"], "a; b"), (["a", None, " ", "b "], "a; b"), (["x; y"], "x; y")),
    Cell([], None, False),
    Cell([None, ""], None, False),
]


def _pairs(pairs: Iterable[Cell]) -> list[Cell]:
    return [
        Cell([cell.value, cell.value], f"{cell.text}; {cell.text}") if cell.text else Cell([cell.value], None, False)
        for cell in pairs
    ]


# Arrow types with cells and their texts in a prompt, and what a template writes after the field.
TYPES: list[tuple[pa.DataType, list[Cell], str]] = [
    *((kind, _WORDS, "") for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, _BYTES, "") for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(8), _typed((b"opacity\0", "opacity"), (b"12345678", "12345678")), ""),
    *((pa.dictionary(index, pa.string()), _WORDS, "") for index in (pa.int8(), pa.int32(), pa.uint16())),
    (pa.dictionary(pa.int32(), pa.binary()), _BYTES, ""),
    *((kind, _WHOLE, "") for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
    *((kind, _NATURAL, "") for kind in (pa.uint8(), pa.uint16(), pa.uint32())),
    (pa.int64(), _typed((2**63 - 1, "9223372036854775807"), (-(2**53) - 1, "-9007199254740993")), ""),
    (pa.uint64(), _typed((2**64 - 1, "18446744073709551615"), (7, "7")), ""),
    *((kind, _FLOATS, "") for kind in (pa.float16(), pa.float32(), pa.float64())),
    (pa.float32(), _typed((16777216.0, "16777216"), (3.4e-5, "3.4e-05")), ""),
    (pa.bool_(), _typed((True, "True"), (False, "False")), ""),
    (pa.decimal128(20, 4), _typed((Decimal("1.5000"), "1.5000"), (Decimal("2.0000"), "2"), (Decimal("0.0001"), "0.0001")), ""),
    (pa.decimal128(38, 0), _typed((Decimal(10) ** 37, "1" + "0" * 37)), ""),
    (pa.decimal256(60, 2), _typed((Decimal("-0.50"), "-0.50")), ""),
    *((pa.timestamp(unit), _TIMES, "") for unit in ("s", "ms", "us", "ns")),
    (pa.timestamp("ms", "UTC"), _typed((_ZONED, "2024-05-31 07:30:00+00:00")), ""),
    (pa.timestamp("us", "+05:30"), _typed((_ZONED, "2024-05-31 13:00:00+05:30")), ""),
    *((kind, _DATES, "") for kind in (pa.date32(), pa.date64())),
    *((kind, _typed((dt.time(7, 5), "07:05:00")), "") for kind in (pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"))),
    *((pa.duration(unit), _typed((dt.timedelta(days=1, hours=2), "1 day, 2:00:00")), "") for unit in ("s", "ns")),
    (pa.null(), [MISSING], ""),
    *((kind, _LISTS, "") for kind in (pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.string_view()))),
    (pa.list_(pa.string(), 2), _typed((["a", "b"], "a; b"), ([None, "b"], "b")), ""),
    (pa.list_(pa.dictionary(pa.int32(), pa.string())), _LISTS, ""),
    *((pa.list_(kind), _pairs(cells), "") for kind, cells in ((pa.int16(), _WHOLE), (pa.float32(), _FLOATS), (pa.date32(), _DATES))),
    (pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))]), _typed(({"a": "x"}, "x")), ".a"),
    (pa.list_(pa.list_(pa.string())), _typed(([["a", "b"], ["c"]], "a; b; c")), ""),
    (pa.struct([("a", pa.string_view()), ("b", pa.int8())]), _typed(({"a": "x", "b": 1}, "x"), ({"a": "y", "b": None}, "y")), ".a"),
    (pa.struct([("b c", pa.float32())]), _typed(({"b c": 1.2}, "1.2")), "['b c']"),
    (pa.map_(pa.string(), pa.string()), _typed(([("k", "x"), ("j", "y")], "x")), "['k']"),
    (pa.uuid(), _typed((UUID(int=1).bytes, str(UUID(int=1)))), ""),
]  # fmt: skip


def typed_column(
    rng: random.Random, name: str, rows: int, kinds: Sequence[tuple[pa.DataType, list[Cell], str]]
) -> Column:
    """Return a column of one of the types, with some cells missing."""
    kind, cells, part = rng.choice(kinds)
    chosen = [rng.choice([*cells, MISSING]) for _ in range(rows)]
    if pa.types.is_nested(kind) and rows:
        chosen[0] = cells[0]  # Arrow cannot write an empty dictionary inside another type
    return Column(name, chosen, kind, part)
