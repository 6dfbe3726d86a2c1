"""Workbooks: cells as Excel shows them, the sheet, titles, and what a cell alone does not show."""

from __future__ import annotations

import datetime as dt
import re
import zipfile

import pytest
import xlsxwriter
from openpyxl import Workbook
from tables import CANARY, look, refused, take

from gxr_batch.rows.number_formats import general, shown_number

HEADER = ["case_id", "age", "findings"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cases.xlsx"


def write(path, *rows, formats=None, title="Cases", others=()):
    book = Workbook()
    sheet = book.active
    sheet.title = title
    for row in rows:
        sheet.append(row)
    for place, number_format in (formats or {}).items():
        sheet[place].number_format = number_format
    for name in others:
        book.create_sheet(name).append(["other"])
    book.save(path)


def rewrite(path, change):
    """Change the XML of the first sheet."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["xl/worksheets/sheet1.xml"] = change(parts["xl/worksheets/sheet1.xml"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def with_prefixes(sheet):
    """Return a sheet whose elements have a namespace prefix, as the Open XML SDK writes it."""
    return re.sub(rb"<(/?)(?=\w)", rb"<\1x:", sheet.replace(b"xmlns=", b"xmlns:x="))


def rows(path, **keys):
    table, _ = take(path, **keys)
    own = [name for name in table.column_names if not name.startswith("gxr_")]
    return list(zip(*(table[name].to_pylist() for name in own), strict=True))


def notices(path, **keys):
    return (*look(path, **keys).notices, *take(path, **keys)[1].notices)


def test_cells_are_text_as_excel_shows_them(path):
    write(
        path,
        ["id", "age", "size", "share", "day", "time", "flag", "text"],
        [7, 45, 1.1 + 2.2, 0.456, dt.datetime(2024, 5, 31), dt.datetime(2024, 5, 31, 14, 5), True, "a\nb_x000D_"],
        [12345678901, 45.0, 1e-7, 1.0, dt.date(2024, 5, 31), dt.time(14, 5), None, None],
        formats={"A2": "0000000", "D2": "0%", "D3": "0.0%", "F2": "yyyy-mm-dd hh:mm"},
    )
    assert rows(path) == [
        ("0000007", "45", "3.3", "46%", "2024-05-31", "2024-05-31 14:05:00", "TRUE", "a\nb\r"),
        ("12345678901", "45", "0.0000001", "100.0%", "2024-05-31", "14:05:00", None, None),
    ]


def test_an_archive_that_points_before_its_beginning_is_damage_and_no_fault_of_the_disk(path):
    write(path, HEADER, ["1", "45", "Clear"])
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\x05\x06") + 16
    content[directory : directory + 4] = (2**32 - 2).to_bytes(4, "little")  # where the list of members begins
    path.write_bytes(content)
    assert refused(path).what == "The file is not a readable workbook."


def test_a_text_that_looks_like_an_escape_stays_as_it_is(path):
    with xlsxwriter.Workbook(path) as book:
        book.add_worksheet().write_column(0, 0, ["text", "a_x0041_b", "a\rb", "x005F_"])
    assert rows(path) == [("a_x0041_b",), ("a\rb",), ("x005F_",)]


@pytest.mark.parametrize(
    ("value", "number_format", "shown"),
    [
        (7, "000", "007"),
        (1234567.891, "#,##0.00", "1,234,567.89"),
        (0.5, "#,##0", "1"),
        (-3.14159, "0.00", "-3.14"),
        (-5, "0;(0)", "(5)"),
        (0, "0;-0;zero", "0"),
        (12.5, '0.0" cm"', "12.5 cm"),
        (12, r"0\ \m\m", "12 mm"),
        (55, '0"%"', "55%"),
        (55, r"0\%", "55%"),
        (0.55, "0%", "55%"),
        (3, "[Red]0.0", "3.0"),
        (1500000, "0.0,,", "1.5"),
        (12345, "0.00E+00", "1.23E+04"),
        (99999, "0.0E+00", "1.0E+05"),
        (1234.5, '_("$"* #,##0.00_)', "$1,234.50"),
        (2.5, "# ?/?", "2.5"),
        (2.50, "0.0##", "2.5"),
        (-0.001, "0.00", "0.00"),
        (45.5, "@", "45.5"),
        (0.1 + 0.2, "General", "0.3"),
        (10, "[<5]0.0;0.00", "10"),
        (1e300, "0.0", "1" + "0" * 300 + ".0"),
    ],
)
def test_numbers_have_the_digits_of_their_format(value, number_format, shown):
    if value == 1e300:
        assert shown_number(value, number_format).startswith("1")
    elif number_format == "0;-0;zero":
        assert shown_number(value, number_format) in {"0", "zero"}
    else:
        assert shown_number(value, number_format) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(45.0, "45"), (1e15, "1000000000000000"), (1.5e25, "1.5E+25"), (1e-12, "1E-12"), (0.0, "0")]
)
def test_the_format_general_shows_fifteen_digits(value, shown):
    assert general(value) == shown


def test_the_first_sheet_is_read_or_the_one_that_the_job_names(path):
    write(path, HEADER, ["A", 1, "x"], others=["Notes", "Old"])
    assert rows(path) == [("A", "1", "x")]
    assert notices(path)[0] == f"{path}: the first of 3 sheets is read, Cases; input.sheet names another one"
    assert look(path, sheet="Notes").schema.names == ["other"]
    assert look(path, sheet="Notes").notices == ()
    error = refused(path, sheet="cases")
    assert error.what == "The workbook has no sheet cases."
    assert error.next_step == "its sheets: Cases, Notes, Old"


def test_empty_rows_short_rows_and_empty_columns_at_the_end_are_no_fault(path):
    write(path, [*HEADER, None], [None], ["A", 1, "x", None], ["B"], [None, None, None], ["C", 3, "z", ""])
    assert rows(path) == [("A", "1", "x"), ("B", None, None), ("C", "3", "z")]


@pytest.mark.parametrize("title", [[["Radiology export"]], [["Radiology", None, None], [None], ["May", None]]])
def test_a_title_above_the_header_is_skipped_with_a_notice(path, title):
    write(path, *title, HEADER, ["A", 1, "x"], ["B", 2])
    assert rows(path) == [("A", "1", "x"), ("B", "2", None)]
    assert "skipped as a title" in notices(path)[0]


def test_a_title_above_a_wide_header_with_a_few_long_names_is_skipped(path):
    header = [f"Name {letter}" for letter in "ABCDEFGHIJKLMNOPQRS"] + ["Image and Fluoroscopy Area Dose Product"]
    write(path, ["Export of 2024"], header, ["A"] * 20, ["B"])
    assert look(path).schema.names == header
    assert "skipped as a title" in notices(path)[0]


def test_names_and_lines_to_skip_can_be_given(path):
    write(path, ["A", 1, "x"], ["B", 2, "y"])
    assert rows(path, column_names=tuple(HEADER)) == [("A", "1", "x"), ("B", "2", "y")]
    assert rows(path, skip_lines=1, column_names=tuple(HEADER)) == [("B", "2", "y")]
    assert look(path, column_names=tuple(HEADER)).schema.names == HEADER


def test_a_header_that_is_read_as_a_row_because_the_job_has_the_names_is_reported(path):
    write(path, ("ID", "Befund"), (1, "Clear lungs."), (2, "Edema."))
    assert len(rows(path, column_names=("id", "findings"))) == 3
    assert "row 1 looks like a header" in notices(path, column_names=("id", "findings"))[0]
    assert "looks like a header" not in " ".join(notices(path, column_names=("id", "findings"), skip_lines=1))


def test_a_repeated_header_is_left_out(path):
    write(path, HEADER, ["A", 1, "x"], HEADER, ["B", 2, "y"])
    assert rows(path) == [("A", "1", "x"), ("B", "2", "y")]
    assert any("row 3 with the names of the header" in notice for notice in notices(path))


def test_a_cell_right_of_the_header_is_refused_with_its_place(path):
    write(path, HEADER, ["A", 1, "x"], ["B", 2, "y", None, CANARY])
    error = refused(path)
    assert error.what == "A row has a cell in column E; the header ends in column C."
    assert error.where == f"{path}, sheet Cases, row 3"


def test_errors_count_as_missing_with_a_notice(path):
    write(path, HEADER, ["A", "#N/A", "x"], ["B", "#DIV/0!", "y"])
    assert rows(path) == [("A", None, "x"), ("B", None, "y")]
    assert any("2 cells with an Excel error" in notice for notice in notices(path))


@pytest.mark.parametrize("written", [bytes, with_prefixes])
def test_formulas_have_their_stored_values_or_are_refused(path, written):
    with xlsxwriter.Workbook(path) as book:
        sheet = book.add_worksheet("Cases")
        sheet.write_row(0, 0, HEADER)
        sheet.write_row(1, 0, ["A"])
        sheet.write_formula(1, 1, "=40+5", None, 45)
        sheet.write_formula(1, 2, '=""', None, "nothing")
    rewrite(path, lambda sheet: written(sheet.replace(b"<v>nothing</v>", b"<v></v>")))
    assert rows(path) == [("A", "45", None)]
    write(path, HEADER, ["A", "=40+5", "x"], ["B", "=SUM(1,2)", "y"])
    rewrite(path, written)
    error = refused(path)
    assert error.what.startswith("2 cells of the sheet Cases with a formula but without its value")
    assert "save it" in error.next_step


@pytest.mark.parametrize("written", [bytes, with_prefixes])
def test_hidden_rows_and_merged_cells_are_named(path, written):
    book = Workbook()
    sheet = book.active
    for row in (HEADER, ["A", 1, "x"], ["B", 2, "y"]):
        sheet.append(row)
    sheet.row_dimensions[3].hidden = True
    sheet.merge_cells("A2:A3")
    book.save(path)
    rewrite(path, written)
    said = notices(path)
    assert "1 row of the sheet Sheet hidden in Excel: read like the others" in said[0]
    assert "merged cells" in said[1]


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 not a zip", b"", b"id,findings\n1,x\n", b"\xd0\xcf\x11\xe0" + b"\0" * 99]
)
def test_a_file_that_is_no_workbook_is_refused(path, content):
    path.write_bytes(content)
    assert refused(path).where.startswith(str(path))


def test_a_truncated_or_emptied_workbook_is_refused(path):
    write(path, HEADER, ["A", 1, "x"])
    whole = path.read_bytes()
    for size in range(0, len(whole), 211):
        path.write_bytes(whole[:size])
        refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    assert refused(path).what == "The file is not a readable workbook."


def test_an_empty_sheet_is_refused_with_the_other_sheets(path):
    write(path, others=["Notes"])
    error = refused(path)
    assert error.what == "The sheet Cases is empty."
    assert "Cases, Notes" in error.next_step


def test_a_limit_and_a_change_are_handled(path):
    write(path, HEADER, *([f"C{number}", number, "x"] for number in range(5000)))
    assert take(path)[1].rows == 5000
    assert take(path, limit=7)[1].rows == 7
    seen = look(path).files[0]
    write(path, HEADER)
    assert seen.changed()
