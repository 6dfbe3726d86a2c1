"""Writes the tables of `fuzz_tables` as other programs do: odd text, JSON Lines, Parquet, workbooks, folders of parts.

Each `*_case` writes an input, a template and a job into the current folder, and returns what the run must make of them.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_inputs import mutated
from fuzz_tables import (
    MISSING,
    PLAIN_TEXTS,
    TYPES,
    Cell,
    Column,
    Table,
    Wanted,
    template,
    text_cell,
    text_table,
    typed_column,
)

MUST_READ, MUST_REFUSE, MAY_REFUSE = frozenset({0, 3}), frozenset({2}), frozenset({0, 2, 3})
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
CHECKED = {".gz", ".bz2", ".xz", ".xlsx", ".xlsm"}  # formats with checksums: damage is found, or concerns no cell


def write_job(rng: random.Random, path: str, table: Table, nulls: Sequence[str] | str = (), **keys: Any) -> Wanted:
    """Write a job and a template for a table, and return what must come of it if nothing may be refused."""
    source, prompts = template(rng, table)
    Path("own.j2").write_text(source)
    keys |= {"null_values": list(nulls) if not isinstance(nulls, str) else nulls} if nulls else {}
    keys |= {"id_column": "case_id"} if rng.random() < 0.5 and table[0].name == "case_id" else {}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    job = ["name = 'j'", "[input]", f"path = {json.dumps(path)}", *lines]
    job += ["[prompt]", "template = 'own.j2'", "[engine]", "kind = 'echo'", "[run]", "max_failed = 'off'"]
    Path("j.toml").write_text("\n".join([*job, "[privacy]", "identifiers = 'off'", ""]))
    return Wanted(prompts, MUST_READ)


def choose_nulls(rng: random.Random) -> Sequence[str] | str:
    """Return a value of `input.null_values`."""
    return rng.choice([(), (), "common", ("None", "n.d."), (" nan",)])


def damaged(rng: random.Random, path: Path, wanted: Wanted, compression: str | None = None) -> Wanted:
    """Sometimes damage a file, and return what a run must make of it then."""
    content = path.read_bytes()
    if rng.random() > 0.15 or len(content) < 2:
        return wanted
    stored_as = path.suffix if compression is None else compression
    if stored_as in {*COMPRESSIONS, ".xlsx", ".xlsm"} - {""} and rng.random() < 0.5:
        few = rng.randint(1, 8)  # never where one of two compressed streams ends
        path.write_bytes(rng.choice([content[:few], content[:-few]]))
        return Wanted(None, MUST_REFUSE)
    changed = mutated(content, rng)
    path.write_bytes(changed)
    # Without the mark in its first bytes, what is left of a file may be plain text.
    known = stored_as in CHECKED and changed[:6] == content[:6]
    return Wanted(wanted.prompts if known else None, MAY_REFUSE)


_FORMS = ["", "", "", "header again", "row names", "trailing", "title", "lines", "no header", "escape", "sep"]
_PLAIN_FORMS = {"", "header again", "lines", "no header", "sep"}  # readable without a guess


def text_case(rng: random.Random) -> Wanted:
    """A file of delimited text in one of many layouts and encodings, perhaps compressed."""
    nulls, nasty, form = choose_nulls(rng), rng.choice([0.0, 0.0, 0.3]), rng.choice(_FORMS)
    table = text_table(rng, nulls, nasty=nasty)
    if form == "title" and not table[0].cells:
        form = ""  # a title and a header alone could as well be a column and its cell
    delimiter, end = rng.choice(",;\t|"), rng.choice(["\n", "\r\n", "\r"])
    lines, keys = _lines(rng, table, form)
    if form == "escape" and (nasty or rng.random() < 0.5):
        keys["escape"] = "\\"
    if rng.random() < 0.1:
        keys["delimiter"] = delimiter
    escapes = {"escapechar": "\\", "doublequote": False} if form == "escape" else {}
    sink = io.StringIO(newline="")
    csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL, **escapes).writerows(lines)
    text = sink.getvalue()
    quoted = nasty or form == "row names" or any(delimiter in cell for line in lines for cell in line)
    if not quoted and rng.random() < 0.5:
        text = text.replace('"', "")
    if not nasty and rng.random() < 0.1:
        text = text.replace(end, end * 2)
    text = _above(rng, form, delimiter, end, keys) + (text.removesuffix(end) if rng.random() < 0.1 else text)
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32" if nasty else "cp1252"])
    compression = rng.choice(["", *COMPRESSIONS])
    named = compression if rng.random() < 0.95 else rng.choice([*COMPRESSIONS][1:])  # as programs rename files
    path = Path(f"f{rng.choice(['.csv', '.txt', '.tsv' if delimiter == chr(9) else '.csv'])}{named}")
    path.write_bytes(_compressed(rng, text.encode(encoding), compression))
    wanted = write_job(rng, path.name, table, nulls, **keys)
    if nasty or form not in _PLAIN_FORMS or len(table[0].cells) < 3 or (compression and not named):
        wanted.codes = MAY_REFUSE
    if form == "header again":
        wanted.named = ("the header: left out",)
    return damaged(rng, path, wanted, compression)


def _lines(rng: random.Random, table: Table, form: str) -> tuple[list[list[str]], dict[str, Any]]:
    """Return header and rows in a layout, and the keys of [input] that it needs."""
    names = [column.name for column in table]
    rows = [list(row) for row in zip(*map(_values, table), strict=True)]
    if form == "no header":
        return rows, {"column_names": names}
    if rng.random() < 0.15:
        names[1] = rng.choice([f" {names[1]} ", f"\u00ad{names[1]}", f"{names[1]}\xa0"])
    if form == "header again":
        for _ in range(rng.randint(1, 3)):
            rows.insert(rng.randint(0, len(rows)), list(names))
    elif form == "row names":
        rows = [[str(number), *row] for number, row in enumerate(rows, start=1)]
    elif form == "trailing":
        rows = [[*row, ""] for row in rows]
        names += [""] * (rng.random() < 0.5)
    return [names, *rows], {}


def _above(rng: random.Random, form: str, delimiter: str, end: str, keys: dict[str, Any]) -> str:
    """Return the lines above the header."""
    if form == "title":
        return f"Export of 2024-05-31{end}{end * rng.randint(0, 1)}"
    if form == "lines":
        keys["skip_lines"] = rng.randint(1, 4)
        return "".join(rng.choice(["", "#", 'a "b', "x,y;z", "1|2"]) + end for _ in range(keys["skip_lines"]))
    return f"sep={delimiter}{end}" if form == "sep" else ""


def _compressed(rng: random.Random, content: bytes, compression: str) -> bytes:
    """Return compressed bytes, sometimes as two streams one after the other."""
    compress = COMPRESSIONS[compression]
    middle = rng.randint(0, len(content))
    return compress(content[:middle]) + compress(content[middle:]) if rng.random() < 0.2 else compress(content)


def jsonl_case(rng: random.Random) -> Wanted:
    """A file of JSON Lines with columns of one kind or several, perhaps compressed."""
    nulls = choose_nulls(rng)
    table = text_table(rng, nulls, nasty=0.3)
    rows = len(table[0].cells)
    table += [_json_column(rng, f"n{number}", rows, nulls) for number in range(rng.randint(0, 3))]
    records = [dict(zip((c.name for c in table), row, strict=True)) for row in zip(*map(_values, table), strict=True)]
    for record in records:
        for name in [name for name, value in record.items() if value is None]:
            if rng.random() < 0.5:
                del record[name]
    spaces = rng.choice([(",", ":"), (", ", ": ")])
    lines = [json.dumps(record, ensure_ascii=rng.random() < 0.5, separators=spaces) for record in records]
    if rng.random() < 0.1:
        lines.insert(rng.randint(0, len(lines)), "")
    end = rng.choice(["\n", "\r\n"])
    content = (end.join(lines) + rng.choice(["", end])).encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    compression = rng.choice(["", *COMPRESSIONS])
    path = Path(f"f{rng.choice(['.jsonl', '.ndjson', '.json'])}{compression}")
    path.write_bytes(_compressed(rng, content, compression))
    wanted = write_job(rng, path.name, table, nulls)
    found = {name for record in records for name in record}
    if any(column.name not in found for column in table):  # a required column that no object has
        wanted.codes = MAY_REFUSE
    return damaged(rng, path, wanted)


def _values(column: Column) -> list[Any]:
    return [cell.value for cell in column.cells]


_NAN = [float("nan")]
_JSON_VALUES: list[list[Any]] = [
    [0, 1, -5, 2**53 + 1, 2**63 - 1], [10**25, 7], [1.5, 65.0, 0.0, 1e-7, *_NAN], [1, 2.5, -3], [True, False],
    [True, "x", 5, 1.0, " "], [["a", "b"], ["c", None], []], [[1, 2], [3]], [["a"], "x"], [{"a": "x"}, {"a": "y", "b": 1}],
]  # fmt: skip


def _json_column(rng: random.Random, name: str, rows: int, nulls: Sequence[str] | str) -> Column:
    values = [rng.choice([*rng.choice(_JSON_VALUES[:-1]), None]) for _ in range(rows)]
    if rng.random() < 0.8:
        kind = rng.choice(_JSON_VALUES)
        values = [rng.choice([*kind, None]) for _ in range(rows)]
    known = [value for value in values if value is not None and value not in _NAN]  # NaN means null
    kinds = set(map(type, known))
    if kinds == {dict}:
        cells = [MISSING if value is None else Cell(value, value["a"]) for value in values]
        return Column(name, cells, part=".a")
    mixed = len(kinds) > 1 and (kinds != {int, float} or any(abs(v) > 2**53 for v in known if isinstance(v, int)))
    return Column(name, [_json_cell(value, mixed, nulls) for value in values])


def _json_cell(value: Any, mixed: bool, nulls: Sequence[str] | str) -> Cell:
    if value is None or value in _NAN:
        return Cell(value, None, False)
    if mixed or isinstance(value, str):
        text = value if isinstance(value, str) else json.dumps(value)
        return text_cell(text, nulls)._replace(value=value)
    if isinstance(value, list):
        text = "; ".join(str(item) for item in value if item is not None)
        return Cell(value, text or None, bool(text))
    whole = isinstance(value, float) and value.is_integer()
    return Cell(value, str(int(value)) if whole else str(value), bool(value))


def types_case(rng: random.Random) -> Wanted:
    """A Parquet file with columns of any Arrow type."""
    rows = rng.choice([0, 1, 7, 30])
    table = [Column("case_id", [Cell(number, str(number), bool(number)) for number in range(rows)], pa.int32())]
    table += [typed_column(rng, f"c{number}", rows, TYPES) for number in range(rng.randint(1, 6))]
    path = Path("f.parquet")
    write_parquet(rng, path, table)
    return damaged(rng, path, write_job(rng, path.name, table))


def write_parquet(rng: random.Random, path: Path, table: Table) -> None:
    """Write a table with its types."""
    arrays = [pa.array(_values(column), column.kind) for column in table]
    made = pa.Table.from_arrays(arrays, names=[column.name for column in table])
    keys = {"compression": rng.choice(["none", "snappy", "zstd", "gzip"]), "use_dictionary": rng.random() < 0.5}
    keys["data_page_version"] = rng.choice(["1.0", "2.0"])
    try:
        pq.write_table(made, path, row_group_size=rng.choice([3, 1000]), **keys)
    except pa.ArrowException:  # it cannot write slices of views, nor of empty dictionaries
        pq.write_table(made, path, **keys)


# The XML of a cell of a workbook below `<c r="A1"`, and its text.
_FORMATS = {"000": 164, "yyyy\\-mm\\-dd": 165, '0.0" cm"': 166, "yyyy\\-mm\\-dd hh:mm": 167}
_STYLES = [0, 9, 4, 14, *_FORMATS.values()]
_SHEET_CELLS: list[tuple[str, str | None]] = [
    ("><v>65</v>", "65"), ("><v>1.5</v>", "1.5"), ("><v>0.30000000000000004</v>", "0.3"), ("><v>-2</v>", "-2"), ("><v>1E-3</v>", "0.001"),
    (' s="1"><v>0.45</v>', "45%"), (' s="2"><v>1234.5</v>', "1,234.50"), (' s="4"><v>7</v>', "007"), (' s="6"><v>1.24</v>', "1.2 cm"),
    (' s="3"><v>45443</v>', "2024-05-31"), (' s="5"><v>45443</v>', "2024-05-31"), (' s="7"><v>45443.3125</v>', "2024-05-31 07:30:00"),
    (' t="d" s="5"><v>2024-05-31</v>', "2024-05-31"), (' t="b"><v>1</v>', "TRUE"), (' t="b"><v>0</v>', "FALSE"), (' t="e"><v>#N/A</v>', None),
    ("><f>1+1</f><v>2</v>", "2"), (' t="str"><f>A1&amp;""</f><v>opacity</v>', "opacity"), (' t="str"><f>""</f><v></v>', None),
    (' t="inlineStr"><is><t>left</t></is>', "left"), (' t="inlineStr"><is><r><t xml:space="preserve">a </t></r><r><t>b</t></r></is>', "a b"),
    (' s="4"/', None),
]  # fmt: skip


def workbook_case(rng: random.Random) -> Wanted:
    """A workbook with shared and inline texts, numbers as formatted, dates, formulas, other sheets."""
    nulls, keys = choose_nulls(rng), {}
    table = [_without_controls(column, nulls) for column in text_table(rng, nulls, nasty=0.2)]
    rows = len(table[0].cells)
    for number in range(rng.randint(0, 3)):
        pairs = [rng.choice(_SHEET_CELLS) for _ in range(rows)]
        cells = [Cell(("xml", xml), text, text is not None) for xml, text in pairs]
        table.append(Column(f"n{number}", cells))
    sheet = [[column.name for column in table], *zip(*map(_values, table), strict=True)]
    if rng.random() < 0.15:
        keys["skip_lines"] = rng.randint(1, 3)
        sheet[:0] = [["Export", "of", "May"]] * keys["skip_lines"]
    elif rng.random() < 0.15:
        keys["column_names"] = sheet.pop(0)
    other = [["other", "table"], ["x", "y"]]
    sheets = {"Cases": sheet, **({"Codes": other} if rng.random() < 0.3 else {})}
    if rng.random() < 0.2:
        sheets, keys["sheet"] = {"Ä & <b>": other, **sheets}, "Cases"
    path = Path(f"f.xls{rng.choice('xm')}")
    write_workbook(rng, path, sheets)
    wanted = write_job(rng, path.name, table, nulls, **keys)
    if "column_names" in keys and not rows:
        wanted.codes = MAY_REFUSE
    elif rows and rng.random() < 0.05:  # a formula that was never calculated
        write_workbook(rng, path, {"Cases": [*sheet[:-1], [*sheet[-1][:-1], ("xml", "><f>1+1</f>")]]})
        wanted = Wanted(None, MUST_REFUSE)
    return damaged(rng, path, wanted)


def _without_controls(column: Column, nulls: Sequence[str] | str) -> Column:
    """Return a column without the characters that XML lacks or changes."""
    texts = ["".join(sign for sign in cell.value if sign >= " " or sign in "\t\n") for cell in column.cells]
    if column.name in {"case_id", "score"}:
        return column
    return Column(column.name, [text_cell(text, nulls) for text in texts])


def write_workbook(rng: random.Random, path: Path, sheets: dict[str, list[Sequence[Any]]]) -> None:
    """Write a workbook by hand; a cell is a text or ("xml", its XML)."""
    shared: list[str] = []
    relation = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    members = {
        f"xl/worksheets/sheet{number}.xml": f"<worksheet {main}><sheetData>"
        + "".join(_row_xml(rng, place, row, shared) for place, row in enumerate(rows, start=1))
        + "</sheetData></worksheet>"
        for number, rows in enumerate(sheets.values(), start=1)
    }
    numbers = range(1, len(sheets) + 1)
    kinds = {"sharedStrings": "sharedStrings", "styles": "styles"}
    targets = [(f"r{n}", "worksheet", f"worksheets/sheet{n}.xml") for n in numbers]
    targets += [(name, kind, f"{name}.xml") for name, kind in kinds.items()]
    formats = "".join(f'<numFmt numFmtId="{n}" formatCode={quoteattr(code)}/>' for code, n in _FORMATS.items())
    styles = "".join(f'<xf numFmtId="{n}" applyNumberFormat="1"/>' for n in _STYLES)
    members |= {
        "_rels/.rels": _relations([("r1", "officeDocument", "xl/workbook.xml")], relation),
        "xl/_rels/workbook.xml.rels": _relations(targets, relation),
        "xl/workbook.xml": f'<workbook {main} xmlns:r="{relation}"><sheets>'
        + "".join(
            f'<sheet name={quoteattr(t)} sheetId="{n}" r:id="r{n}"/>' for n, t in zip(numbers, sheets, strict=True)
        )
        + "</sheets></workbook>",
        "xl/sharedStrings.xml": f"<sst {main}>" + "".join(f"<si>{text}</si>" for text in shared) + "</sst>",
        "xl/styles.xml": f"<styleSheet {main}><numFmts>{formats}</numFmts><fonts><font/></fonts><fills><fill><patternFill/></fill></fills>"
        f"<borders><border/></borders><cellStyleXfs><xf/></cellStyleXfs><cellXfs>{styles}</cellXfs></styleSheet>",
    }
    overrides = "".join(f'<Override PartName="/{name}" ContentType="{_content_type(name)}"/>' for name in members)
    types = "http://schemas.openxmlformats.org/package/2006/content-types"
    members["[Content_Types].xml"] = (
        f'<Types xmlns="{types}"><Default Extension="rels" '
        f'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>{overrides}</Types>'
    )
    with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, content in members.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8"?>{content}')


def _row_xml(rng: random.Random, number: int, row: Sequence[Any], shared: list[str]) -> str:
    named = rng.random() < 0.9  # some programs write no references
    cells = []
    for place, cell in enumerate(row):
        reference = f' r="{chr(65 + place)}{number}"' if named else ""
        if isinstance(cell, tuple):
            xml = cell[1]
        elif not cell and named:
            continue
        else:
            text = f'<t xml:space="preserve">{escape(cell.replace("_x", "_x005F_x"))}</t>'
            shared.append(text)
            inline = rng.random() < 0.3
            xml = f' t="inlineStr"><is>{text}</is>' if inline else f' t="s"><v>{len(shared) - 1}</v>'
        cells.append(f"<c{reference}{xml}>" if xml.endswith("/") else f"<c{reference}{xml}</c>")
    return f"<row{f' r={chr(34)}{number}{chr(34)}' if named else ''}>{''.join(cells)}</row>"


def _relations(targets: list[tuple[str, str, str]], relation: str) -> str:
    one = "".join(f'<Relationship Id="{i}" Type="{relation}/{kind}" Target="{target}"/>' for i, kind, target in targets)
    return f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{one}</Relationships>'


def _content_type(name: str) -> str:
    if name.endswith(".rels"):
        return "application/vnd.openxmlformats-package.relationships+xml"
    part = {"workbook": "sheet.main", "sharedStrings": "sharedStrings", "styles": "styles"}.get(
        Path(name).stem, "worksheet"
    )
    return f"application/vnd.openxmlformats-officedocument.spreadsheetml.{part}+xml"


def _of(*kinds: pa.DataType) -> list[tuple[pa.DataType, list[Cell], str]]:
    return [one for one in TYPES if one[0] in kinds]


# Types that the parts of one table may mix.
_FAMILIES = {
    "n": _of(pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.float32(), pa.float64(), pa.null()),
    "f": _of(pa.float16(), pa.float32(), pa.float64(), pa.int16(), pa.null()),
    "w": _of(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.null(), *(pa.dictionary(i, pa.string()) for i in (pa.int8(), pa.int32()))),
    "t": _of(*(pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")), pa.null()),
    "d": _of(pa.date32(), pa.date64()),
    "l": _of(pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.string_view())),
}  # fmt: skip
_PARTS = [".csv", ".csv.gz", ".tsv.gz", ".csv.zst", ".jsonl", ".jsonl.gz", ".parquet", ".parquet", ".xlsx"]
_DEBRIS = ["_SUCCESS", ".part-0.crc", "_metadata", ".hidden.csv", "_temporary/0/part-9.csv", "README.md", "notes.html"]
_LAKES = ["_delta_log/0.json", ".hoodie/hoodie.properties", "metadata/v1.metadata.json", "metadata/version-hint.text"]
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def parts_case(rng: random.Random) -> Wanted:
    """A folder of parts as Spark, Hive, pandas and people leave them, named as a folder or by a glob."""
    ending = rng.choice(_PARTS)
    nulls = choose_nulls(rng) if ending != ".parquet" else ()
    folder, keys = Path("d"), rng.sample(["sex", "year", "site"], rng.choice([0, 0, 1, 2]))
    parts: dict[Path, Table] = {}
    for number in range(rng.randint(1, 5)):
        values = [rng.choice(["F", "2024", "a/b c=%", "é", "007", "NA", _NO_VALUE]) for _ in keys]
        inside = folder.joinpath(*(f"{key}={quote(value, safe='')}" for key, value in zip(keys, values, strict=True)))
        path = inside / f"{rng.choice(['', 'x/'])}part-{number:05d}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = _part(rng, number, ending, nulls)
        _write_part(rng, path, table)
        for key, value in zip(keys, values, strict=True):
            cell = MISSING if value == _NO_VALUE else text_cell(value, nulls)
            table.append(Column(key, [cell] * len(table[0].cells)))
        parts[path] = table
    for name in rng.sample(_DEBRIS, rng.randint(0, 3)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.choice([b"", b"case_id,findings\nX,x\n"]))
    if rng.random() < 0.3:
        (folder / f"part-99999{ending}").touch()
    named = rng.choice(["d", "d/", f"d/**/*{ending}", "d/**/part-*"])
    wanted = write_job(rng, named, _whole([parts[path] for path in sorted(parts, key=str)]), nulls)
    if rng.random() < 0.08:
        lake = folder / rng.choice(_LAKES)
        lake.parent.mkdir(parents=True, exist_ok=True)
        lake.write_text("{}")
        return Wanted(None, MUST_REFUSE)
    if rng.random() < 0.1 and ending == ".parquet":
        write_parquet(rng, folder / "part-zzz.parquet", [Column("case_id", [Cell([1], None)], pa.list_(pa.int8()))])
        return Wanted(None, MUST_REFUSE, ("part-zzz.parquet", "case_id"))
    return damaged(rng, rng.choice(list(parts)), wanted)


def _part(rng: random.Random, number: int, ending: str, nulls: Sequence[str] | str) -> Table:
    """Return one part, whose columns have other types than those of the others, or are missing."""
    rows = rng.choice([0, 1, 3, 20]) if ending not in {".jsonl", ".jsonl.gz"} else rng.choice([1, 3])
    ids = [Cell(f"P{number}-{row}", f"P{number}-{row}") for row in range(rows)]
    table = [Column("case_id", ids)]
    if ending == ".parquet":
        names = rng.sample(list(_FAMILIES), rng.randint(1, len(_FAMILIES)))
        return table + [typed_column(rng, name, rows, _FAMILIES[name]) for name in names]
    names = rng.sample(["findings", "history", "comparison"], rng.randint(1, 3))
    return table + [
        Column(name, [text_cell(rng.choice([*PLAIN_TEXTS, "NA", "a, b"]), nulls) for _ in ids]) for name in names
    ]


def _write_part(rng: random.Random, path: Path, table: Table) -> None:
    rows = [[column.name for column in table], *zip(*map(_values, table), strict=True)]
    kind, _, compression = path.name.partition(".")[2].partition(".")
    if kind == "parquet":
        write_parquet(rng, path, table)
    elif kind == "xlsx":
        write_workbook(rng, path, {"Cases": rows})
    else:
        sink = io.StringIO(newline="")
        if kind == "jsonl":
            sink.writelines(json.dumps(dict(zip(rows[0], row, strict=True))) + "\n" for row in rows[1:])
        else:
            csv.writer(sink, delimiter="\t" if kind == "tsv" else rng.choice(",;|")).writerows(rows)
        compression = compression and f".{compression}"
        path.write_bytes(_compressed(rng, sink.getvalue().encode(rng.choice(["utf-8", "utf-8-sig"])), compression))


def _whole(parts: Sequence[Table]) -> Table:
    """Return the table that the parts form: all columns, empty where a part lacks one."""
    names = dict.fromkeys(column.name for part in parts for column in part)
    whole = {name: Column(name, []) for name in names}
    for part in parts:
        own = {column.name: column for column in part}
        for name, column in whole.items():
            column.cells += own[name].cells if name in own else [MISSING] * len(part[0].cells)
    return list(whole.values())
