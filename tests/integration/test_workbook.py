"""The workbook, read with openpyxl: every text is a text cell, and cells longer than Excel allows are marked."""

from __future__ import annotations

import zipfile
from datetime import UTC, datetime
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import Workplace

from gxr_batch.cells import MOST_LINE_FEEDS, MOST_UNITS, for_workbook
from gxr_batch.export import workbook
from gxr_batch.export.workbook_layout import layout, row_height
from gxr_batch.records import DISCLAIMER

HEADER = 3  # below the banner and the captions
TRAPS = {
    "formula": "=1+1",
    "plus": "+49 30 123",
    "minus": "-5",
    "at": "@SUM(A1)",
    "tab": "\t=1+1",
    "carriage": "a\rb\r\nc",
    "link": "https://example.org/x?y=1",
    "mail": "mailto:a@example.org",
    "control": "a\x00b\x07c\x1b[0m",
    "nonchar": "a\ufffeb\uffffc",
    "escape": "_x000D_ and _x0041_",
    "rich": "<r><t>bold</t></r>",
    "markup": "<b>&amp;</b> \"quoted\" 'single'",
    "number": "00123",
    "date": "1-2",
    "boolean": "TRUE",
    "rtl": "التهاب رئوي في الفص السفلي",
    "emoji": "🫁 lung 👩‍⚕️",
    "blanks": "  leading and trailing  ",
    "lines": "\n".join(f"line {number}" for number in range(400)),
    "long": "word 🫁 " * 6000,
}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The export's output, and the path and content of the workbook, of a run over TRAPS."""
    work = Workplace(tmp_path_factory.mktemp("xlsx"))
    table = pa.table(
        {
            "case_id": list(TRAPS),
            "findings": list(TRAPS.values()),
            "age": pa.array(range(len(TRAPS)), pa.int32()),
            "seen": pa.array([datetime(2026, 1, 2, tzinfo=UTC)] * len(TRAPS)),
        }
    )
    pq.write_table(table, work.folder / "f.parquet")
    work.job(
        "[engine]\nkind = 'echo'\n[model]\nmax_seq_length = 100000\n",
        head="path = 'f.parquet'\nid_column = 'case_id'\n",
    )
    work.run()
    done = work.gxr("export", "outputs/j")
    path = work.folder / "outputs/j/results.xlsx"
    loaded = openpyxl.load_workbook(path)
    yield done.stdout, path, loaded
    loaded.close()


def cases(loaded) -> dict[str, dict[str, object]]:
    sheet = loaded["Cases"]
    names = [cell.value for cell in sheet[HEADER]]
    rows = sheet.iter_rows(min_row=HEADER + 1)
    return {row[0].value: dict(zip(names, row, strict=True)) for row in rows}


def test_the_readme_sheet_comes_first_and_describes_the_workbook(book):
    _, _, loaded = book
    assert loaded.sheetnames == ["README", "Cases"]
    text = " ".join(str(cell.value) for row in loaded["README"].iter_rows() for cell in row if cell.value)
    for part in (DISCLAIMER, "echo", "clinical_case", f"{len(TRAPS)} generated, 0 failed", "approved_with_edits"):
        assert part in text
    assert loaded.properties.category == "AI-generated"
    assert DISCLAIMER in loaded.properties.description


@pytest.mark.parametrize("name", [name for name in TRAPS if name not in {"lines", "long"}])
def test_every_text_is_a_text_cell(book, name):
    cell = cases(book[2])[name]["findings"]
    expected = TRAPS[name].replace("\r\n", "\n").replace("\r", "\n")
    for sign in "\x00\x07\x1b\ufffe\uffff":
        expected = expected.replace(sign, "\ufffd")
    # _x005F_ escapes an underscore, so that a text with _x000D_ stays as it is in Excel; openpyxl does not unescape it.
    assert cell.value.replace("_x005F_", "_") == (f" {expected}" if name == "rich" else expected)
    assert cell.data_type in {"s", "inlineStr"}
    assert cell.number_format == "@"
    assert cell.hyperlink is None
    assert cell.quotePrefix


def test_the_file_has_no_formula_and_no_link(book):
    with zipfile.ZipFile(book[1]) as content:
        sheet = content.read("xl/worksheets/sheet2.xml")
    assert b"<f>" not in sheet
    assert b"hyperlink" not in sheet


@pytest.mark.parametrize("name", ["lines", "long"])
def test_cells_longer_than_excel_allows_are_marked_and_flagged(book, name):
    stdout, _, loaded = book
    row = cases(loaded)[name]
    text = row["findings"].value
    assert text.count("\n") <= MOST_LINE_FEEDS
    assert len(text.encode("utf-16-le")) // 2 <= MOST_UNITS
    assert "shortened_for_excel" in row["gxr_flags"].value
    assert "results.parquet has the full text" in stdout
    if name == "lines":
        assert "line 399" in text, "only line feeds are removed"
    else:
        assert text.endswith("results.parquet]")


def test_columns_are_in_the_order_of_a_teaching_file(book):
    names = [cell.value for cell in book[2]["Cases"][HEADER]]
    order = [
        "gxr_row_id",
        "gxr_review_status",
        "findings",
        "gxr_text",
        "gxr_review_quality",
        "gxr_reviewer",
        "gxr_flags",
    ]
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    assert names[-1].startswith("gxr_")
    assert len(set(names)) == len(names)
    assert {f"gxr_review_wrong_location_{weight}" for weight in ("significant", "insignificant")} <= set(names)


def test_the_sheet_is_ready_to_review(book):
    sheet = book[2]["Cases"]
    assert sheet.freeze_panes == "B4"
    assert sheet.auto_filter.ref.startswith("A3:")
    assert DISCLAIMER in sheet["A1"].value
    rules = {str(rule.sqref): rule for rule in sheet.data_validations.dataValidation}
    status = next(rule for rule in rules.values() if rule.type == "list" and "approved_with_edits" in rule.formula1)
    assert "rejected" in status.formula1
    assert sum(rule.type == "whole" for rule in rules.values()) == 12
    row = cases(book[2])["formula"]
    assert row["gxr_review_status"].value == "unreviewed"
    assert row["gxr_ai_generated"].value == "TRUE"
    assert row["age"].value == 0
    assert row["seen"].value == "2026-01-02 00:00:00.000+00:00"
    assert row["gxr_reviewer"].value is None
    assert row["gxr_reviewed_at"].number_format == "yyyy-mm-dd"
    assert row["gxr_review_quality"].number_format == "0", "a text cell would fail the validation for whole numbers"


def test_every_column_has_a_readable_caption(book):
    sheet = book[2]["Cases"]
    captions = {name.value: above.value for above, name in zip(sheet[HEADER - 1], sheet[HEADER], strict=True)}
    assert captions["gxr_review_missing_finding_significant"] == "Missing finding, significant"
    assert captions["gxr_review_text"] == "Corrected text"
    assert captions["gxr_prompt_tokens"] == "Prompt tokens"
    assert captions["findings"] == "findings"
    assert len(set(captions.values())) == len(captions)


def test_the_sample_column_is_hidden_unless_rows_have_several_samples(tmp_path):
    for samples in (1, 2):
        folder = tmp_path / str(samples)
        folder.mkdir()
        work = Workplace(folder)
        work.job(f"[engine]\nkind = 'echo'\n[sampling]\nsamples_per_row = {samples}\n")
        work.run()
        work.gxr("export", "outputs/j")
        sheet = openpyxl.load_workbook(work.folder / "outputs/j/results.xlsx")["Cases"]
        assert sheet.cell(HEADER, 2).value == "gxr_sample"
        assert sheet.column_dimensions["B"].hidden == (samples == 1)


def test_measured_times_show_two_decimals_and_the_users_numbers_all(book):
    row = cases(book[2])["formula"]
    assert row["gxr_seconds_generating"].number_format == "0.00"
    assert row["gxr_new_tokens"].number_format == row["age"].number_format == "General"


def test_column_widths_fit_their_texts_on_a_few_lines():
    own = {"history": 60, "findings": 400, "sex": 6}
    found = {column.name: column for column in layout([*own, "gxr_row_id", "gxr_text"], own)}
    assert [found[name].width for name in own] == [24, 42, 8]
    shown = [found["findings"], found["gxr_text"]]
    assert row_height(shown, ["word " * 20, "word " * 68]) == 60  # 4 lines of 80 digits, 3 of 42
    assert row_height(shown, [None, "\n" * 100]) == 360


def test_a_lone_surrogate_is_replaced():
    assert for_workbook("a\ud800b").text == "a\ufffdb"


def test_a_cut_never_splits_a_character():
    text = for_workbook("🫁" * 20_000).text
    assert len(text.encode("utf-16-le")) // 2 <= MOST_UNITS
    assert text.startswith("🫁")
    text.encode("utf-8")


def test_rows_beyond_the_limit_of_a_sheet_go_into_further_sheets(monkeypatch, tmp_path):
    monkeypatch.setattr(workbook, "ROWS_A_SHEET", 25)
    work = Workplace(tmp_path)
    work.run()
    from gxr_batch.export import Choice, export
    from gxr_batch.ledger import RunReader

    done = export(RunReader(tmp_path / "outputs/j"), "xlsx", None, Choice())
    assert done.rows == 60
    loaded = openpyxl.load_workbook(done.path)
    assert loaded.sheetnames == ["README", "Cases", "Cases 2", "Cases 3"]
    assert [loaded[name].max_row - HEADER for name in loaded.sheetnames[1:]] == [25, 25, 10]


def test_a_run_without_rows_gives_an_empty_sheet(tmp_path: Path):
    work = Workplace(tmp_path)
    work.table([])
    work.run()
    work.gxr("export", "outputs/j")
    assert openpyxl.load_workbook(tmp_path / "outputs/j/results.xlsx")["Cases"].max_row == HEADER
