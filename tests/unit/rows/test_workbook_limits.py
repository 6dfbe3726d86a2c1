"""What a workbook may cost: a small file that holds too much is refused, as a table and as a reviewed sheet alike."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from tables import take

from gxr_batch.errors import TableError
from gxr_batch.review.read_sheets import read_sheets
from gxr_batch.rows import workbook_container
from gxr_batch.rows.number_formats import shown_number

_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_NAMES = ("gxr_row_id", "findings", "gxr_text", "gxr_review_status")


def cell(place: str, text: str) -> str:
    return f'<c r="{place}" t="inlineStr"><is><t>{text}</t></is></c>'


def row(number: int, *cells: str) -> str:
    return f'<row r="{number}">{"".join(cells)}</row>'


HEADER = row(1, *(cell(f"{column}1", name) for column, name in zip("ABCD", _NAMES, strict=True)))


def write(path: Path, rows: Iterable[str], *, strings: str = "", sheets: int = 1, styles: bytes = b"") -> Path:
    """Write a workbook from XML, so that it can be one that no library writes."""
    kinds = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    parts = {"workbook": "sheet.main"} | ({"sharedStrings": "sharedStrings"} if strings else {})
    override = "".join(
        f'<Override PartName="/xl/{n}.xml" ContentType="{kinds}.{kind}+xml"/>' for n, kind in parts.items()
    )
    listed = "".join(f'<sheet name="S{n}" sheetId="{n}" r:id="r1"/>' for n in range(1, sheets + 1))
    main = f'<Relationship Id="r1" Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/>'
    sheet = f'<Relationship Id="r1" Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{_PACKAGE}/content-types">{override}'
            '<Default Extension="xml" ContentType="application/xml"/></Types>',
        )
        book.writestr("_rels/.rels", f'<Relationships xmlns="{_PACKAGE}/relationships">{main}</Relationships>')
        book.writestr(
            "xl/workbook.xml", f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}"><sheets>{listed}</sheets></workbook>'
        )
        book.writestr(
            "xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{_PACKAGE}/relationships">{sheet}</Relationships>'
        )
        if strings:
            book.writestr("xl/sharedStrings.xml", f'<sst xmlns="{_MAIN}">{strings}</sst>')
        if styles:
            book.writestr("xl/styles.xml", styles)
        with book.open("xl/worksheets/sheet1.xml", "w") as target:
            target.write(f'<worksheet xmlns="{_MAIN}"><sheetData>'.encode())
            for one in rows:
                target.write(one.encode())
            target.write(b"</sheetData></worksheet>")
    return path


def as_table(path: Path) -> list[str | None]:
    table, _ = take(path)
    return table["findings"].to_pylist()


def as_reviews(path: Path) -> list[object]:
    return list(read_sheets(path))


def wide(rows: int) -> Iterator[str]:
    yield HEADER.replace("</row>", cell("XFD1", "last") + "</row>")
    yield from (row(number, cell(f"A{number}", "C1"), cell(f"XFD{number}", "x")) for number in range(2, rows))


@pytest.fixture(params=["table", "reviews"])
def read(request):
    return {"table": as_table, "reviews": as_reviews}[request.param]


@pytest.mark.parametrize("last", ["99999999999", "1048577", "1e300"])
def test_a_row_that_excel_lacks_is_refused(tmp_path, read, last):
    path = write(tmp_path / "t.xlsx", [HEADER, row(2, cell("A2", "C1")), f'<row r="{last}">{cell("A9", "x")}</row>'])
    with pytest.raises(TableError, match=r"outside the 1,048,576 rows and 16,384 columns") as caught:
        read(path)
    assert caught.value.where == str(path)
    assert "CSV UTF-8" in caught.value.next_step


def test_a_column_that_excel_lacks_is_refused(tmp_path, read):
    with pytest.raises(TableError, match="outside the"):
        read(write(tmp_path / "t.xlsx", [HEADER, row(2, cell("A2", "C1"), cell("XFE2", "x"))]))


def test_cells_are_counted_up_to_the_last_one_of_each_row(tmp_path, read, monkeypatch):
    monkeypatch.setattr(workbook_container, "_MOST_CELLS", 2**18)
    path = write(tmp_path / "t.xlsx", wide(100))
    with pytest.raises(TableError, match=r"has more than 3\d\d,\d+ cells in the sheet S1"):
        read(path)


def test_a_workbook_may_unpack_to_a_size_in_proportion(tmp_path, read, monkeypatch):
    monkeypatch.setattr(workbook_container, "_MOST_BYTES", 2**20)
    path = write(tmp_path / "t.xlsx", [HEADER, row(2, cell("A2", "C1"), cell("B2", "A" * 2**23))])
    with pytest.raises(TableError, match=r"would unpack to"):
        read(path)


def test_a_cell_without_end_is_refused_before_it_is_read(tmp_path, read, monkeypatch):
    monkeypatch.setattr(workbook_container, "_LARGE", 2**20)
    text = "A" * (2**24 + 1)
    with pytest.raises(TableError, match=r"has a cell of more than 16 MiB"):
        read(write(tmp_path / "t.xlsx", [HEADER, row(2, cell("A2", "C1"), cell("B2", text))]))
    read(
        write(
            tmp_path / "u.xlsx",
            [HEADER, row(2, cell("A2", "C1"), cell("B2", text[: 2**23]), cell("C2", text[: 2**23]))],
        )
    )


def test_settings_are_bounded(tmp_path, read, monkeypatch):
    monkeypatch.setattr(workbook_container, "_LARGE", 2**20)
    with pytest.raises(TableError, match=r"has settings of more than 1 MiB"):
        read(write(tmp_path / "t.xlsx", [HEADER], styles=b"<styleSheet>" + b" " * 2**21))


def test_a_row_may_not_repeat_a_long_shared_string_without_end(tmp_path, read):
    cells = '<c t="s"><v>0</v></c>' * 600
    path = write(tmp_path / "t.xlsx", [HEADER, f'<row r="2">{cells}</row>'], strings=f"<si><t>{'A' * 2**20}</t></si>")
    with pytest.raises(TableError, match="has too much text in row 2 of the sheet S1"):
        read(path)


def test_the_time_to_read_a_workbook_is_in_proportion_to_its_size(tmp_path, read, monkeypatch):
    monkeypatch.setattr(workbook_container, "_MOST_SECONDS", 0.2)
    rows = [HEADER, *(row(number, cell(f"A{number}", "x")) for number in range(2, 2000))]
    began = time.thread_time()
    with pytest.raises(TableError, match="takes far longer to read than its size explains"):
        read(write(tmp_path / "t.xlsx", rows, sheets=500))
    assert time.thread_time() - began < 10


def test_half_a_character_loses_only_its_own_cell(tmp_path):
    rows = [
        HEADER,
        row(2, cell("A2", "C1"), cell("B2", "a _xD800_ b")),
        row(3, cell("A3", "C2"), cell("B3", "_xD83D__xDE00_")),
    ]
    path = write(tmp_path / "t.xlsx", rows)
    table, taken = take(path)
    assert table["findings"].to_pylist() == ["a \ufffd b", "😀"]
    assert any("1 cell with half a character such as _xD800_" in notice for notice in taken.notices)


def test_a_pattern_over_a_foreign_sheet_costs_one_pass(tmp_path):
    blanks = f'<row r="99"><c><f>1</f>{" " * 10**6}<x/></c></row>'
    rows = [HEADER, *(row(number, cell(f"A{number}", "x")) for number in range(2, 60)), blanks]
    began = time.thread_time()
    as_table(write(tmp_path / "t.xlsx", rows))
    assert time.thread_time() - began < 10


def test_a_number_format_without_end_is_shown_as_general():
    began = time.thread_time()
    assert shown_number(7, "," * 10**6) == "7"
    assert shown_number(7, "0." + "0" * 10**6) == "7"
    assert time.thread_time() - began < 1
