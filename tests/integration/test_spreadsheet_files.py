"""Reviewed files as spreadsheets really save them: changed ids, lost letters, other containers, columns out of step."""

from __future__ import annotations

import csv
import re
import shutil
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import openpyxl
import pyarrow as pa
import pytest
from running import Workplace

from gxr_batch.errors import TableError
from gxr_batch.export import Choice, export
from gxr_batch.ledger import RunReader
from gxr_batch.records import Key
from gxr_batch.review.import_reviews import Imported, import_reviews
from gxr_batch.review.match_rows import Elsewhere, may_show
from gxr_batch.review.parse_row import lost_letters
from gxr_batch.review.row_text import InvalidRow

FINDINGS = {
    "0007": "Effusion ≤ 2 cm, “small”",
    "7": "A tube, well placed",
    "0021": "Heart ↑ in size, 12 cm",
    "0300": "Clear lungs",
    "00300": "Clear lungs",
    "1-2": "Old fracture",
    "1234567890123456": "Nodule",
    "plain": "No change",
}
Row = dict[str, str]


class Desk:
    """A finished run and its CSV for Excel."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "outputs/j"
        with export(RunReader(self.run), "csv", None, Choice()).path.open(newline="", encoding="utf-8-sig") as file:
            self.rows: list[Row] = list(csv.DictReader(file))

    def save(self, rows: list[Row], encoding: str = "utf-8-sig") -> Path:
        path = self.folder / "saved.csv"
        with path.open("w", newline="", encoding=encoding, errors="replace") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
        return path

    def approved(self, *ids: str, **cells: str) -> list[Row]:
        """Return the rows, with those of these ids approved (all if none is named)."""
        filled = {"gxr_review_status": "approved", "gxr_reviewer": "Dr A", **cells}
        return [row | filled if not ids or row["gxr_row_id"] in ids else dict(row) for row in self.rows]

    def take(self, path: Path) -> Imported:
        return import_reviews(RunReader(self.run), [path], "")

    def reviewed(self) -> set[str]:
        reviews = RunReader(self.run).reviews
        return {review.key.row_id for review in reviews.all}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    work = Workplace(tmp_path_factory.mktemp("spreadsheet"))
    work.table(list(FINDINGS.items()))
    work.job("[prompt]\ntemplate = 'basic'\n[engine]\nkind = 'echo'\n")
    work.run()
    return work.folder


@pytest.fixture
def desk(tmp_path: Path, finished: Path) -> Desk:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return Desk(tmp_path)


def without_zeros(row: Row) -> Row:
    return {name: str(int(cell)) if cell.isdigit() and len(cell) < 12 else cell for name, cell in row.items()}


def test_ids_that_lost_their_zeros_are_matched_by_hash_and_text(desk):
    rows = [without_zeros(row) for row in desk.approved("0007", "7", "0021")]
    assert [row["gxr_row_id"] for row in rows[:3]] == ["7", "7", "21"]
    done = desk.take(desk.save(rows))
    assert (done.taken, done.refused) == (3, [])
    assert desk.reviewed() == {"0007", "7", "0021"}, "7 is the id of another row, and each is found"
    assert done.notices == [
        "saved.csv: a spreadsheet changed gxr_row_id of 2 rows, e.g. by removing leading zeros; matched by "
        "gxr_prompt_sha256 and gxr_text"
    ]
    again = desk.take(desk.save(rows))
    assert (again.taken, again.unchanged) == (0, 3)


def test_an_id_that_was_rounded_is_matched_by_hash_and_text(desk):
    rows = [row | {"gxr_row_id": row["gxr_row_id"].replace("1234567890123456", "1,23457E+15")} for row in desk.rows]
    rows[6] |= {"gxr_review_status": "approved", "gxr_reviewer": "Dr A"}
    assert desk.take(desk.save(rows)).taken == 1
    assert desk.reviewed() == {"1234567890123456"}


def test_rows_of_one_text_whose_ids_became_the_same_are_refused():
    table = pa.table(
        {
            "gxr_row_id": ["0300", "00300"],
            "gxr_sample": pa.array([1, 1], pa.int32()),
            "gxr_status": ["ok", "ok"],
            "gxr_text": ["clear", "clear"],
            "gxr_prompt_sha256": ["a", "a"],
            "gxr_attempt": [1, 1],
        }
    )
    cells = {"gxr_text": "clear", "gxr_prompt_sha256": "a"}
    elsewhere = Elsewhere([table], [cells])
    with pytest.raises(InvalidRow, match="several rows have this text"):
        elsewhere.place(Key("300", 1), None, cells)
    assert elsewhere.place(Key("300", 2), None, cells) is None, "another sample"


def test_an_id_that_became_a_date_is_named(desk):
    rows = desk.approved("1-2")
    rows[5]["gxr_row_id"] = "02. Jan"
    (refused,) = desk.take(desk.save(rows)).refused
    assert "a spreadsheet changed the id, e.g. into a date" in refused.why
    assert refused.row_id == "", "an unknown id may be any text"


def test_an_id_without_its_text_is_matched_to_nothing(desk):
    rows = desk.approved("0021")
    rows[2] |= {"gxr_row_id": "21", "gxr_text": "something else"}
    (refused,) = desk.take(desk.save(rows)).refused
    assert "no such row" in refused.why


@pytest.mark.parametrize(
    ("shown", "row_id", "expected"),
    [
        ("1", "0001", True),
        ("1", "1", False),
        ("12", "0001", False),
        ("1,00E+05", "1E5", True),
        ("1.23457E+15", "1234567890123456", True),
        ("1234567890123450", "1234567890123456", True),
        ("1.2E+3", "1234", False),
        ("1.5", "01.50", True),
        ("x", "0x", False),
        ("nan", "NaN", False),
        ("inf", "Infinity", False),
    ],
)
def test_what_a_spreadsheet_may_make_of_an_id(shown, row_id, expected):
    assert may_show(shown, row_id) is expected


def test_letters_that_the_file_lost_are_named_as_the_reason(desk):
    done = desk.take(desk.save(desk.approved("0007", "0021", "plain"), "cp1252"))
    assert done.taken == 1
    assert {one.row_id for one in done.refused} == {"0007", "0021"}
    assert all("letters of the generated text were lost" in one.why for one in done.refused)
    assert all("CSV UTF-8" in one.why for one in done.refused)


def test_a_comment_that_may_have_lost_letters_is_refused_with_them(desk):
    done = desk.take(desk.save(desk.approved("0007", "plain", gxr_review_comment="size ≥ 3 cm"), "cp1252"))
    assert done.taken == 0
    assert {one.row_id: "what the reviewer wrote has a ?" in one.why for one in done.refused} == {
        "0007": False,
        "plain": True,
    }


def test_a_comment_in_another_encoding_than_utf_8_comes_with_a_notice(desk):
    done = desk.take(desk.save(desk.approved("7", gxr_review_comment="größer"), "cp1252"))
    assert (done.taken, done.refused) == (1, [])
    assert done.notices == [
        "saved.csv: not UTF-8, read as Western European Windows; check the letters of 1 row, or save it again as CSV "
        "UTF-8"
    ]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("size ? 3 cm, ??", True),
        ("size â‰¥ 3 cm, ðŸ«\x81", True),
        ("size = 3 cm, ?", True),
        ("size ≥ 3 cm, 🫁", True),
        ("size ? 4 cm, ??", False),
        ("size  3 cm, ??", False),
        ("", False),
        (None, False),
    ],
)
def test_which_texts_count_as_having_lost_letters(shown, expected):
    assert lost_letters("size ≥ 3 cm, 🫁", shown) is expected
    assert not lost_letters("only ASCII", "only ?????")


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ("gxr_row_id", "gxr_row_id is that of"),
        ("gxr_text", "gxr_text is"),
        ("gxr_prompt_sha256", "gxr_prompt_sha256 is"),
    ],
)
def test_a_column_that_was_sorted_alone_is_recognised(desk, column, named):
    rows = desk.approved("0021", "0300", "1-2", "plain")
    moved = {2: 3, 3: 5, 5: 2}
    cells = [row[column] for row in rows]
    for to, place in moved.items():
        rows[to][column] = cells[place]
    done = desk.take(desk.save(rows))
    assert desk.reviewed() == {"plain"}, "the row that is still in its place"
    assert len(done.refused) == 3
    for one in done.refused:
        assert one.why.startswith(named)
        assert "sorted alone" in one.why


def rewritten(path: Path, target: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in more.items():
            new.writestr(name, data)
    return target


@pytest.fixture
def workbook(desk: Desk) -> Path:
    book = openpyxl.load_workbook(export(RunReader(desk.run), "xlsx", None, Choice()).path)
    sheet = book["Cases"]
    places = {cell.value: cell.column for cell in sheet[3]}
    for line in range(4, 12):
        sheet.cell(line, places["gxr_review_status"], "approved")
        sheet.cell(line, places["gxr_reviewer"], "Dr A")
        sheet.cell(line, places["gxr_reviewed_at"], date(2026, 1, 31))
        sheet.cell(line, places["gxr_review_comment"], 'see "http://purl.oclc.org/ooxml/x/"')
    book.iso_dates = True  # as in Strict Open XML
    path = desk.folder / "filled.xlsx"
    book.save(path)
    return path


def as_strict(name: str, data: bytes) -> bytes:
    """Return a member as Excel's "Strict Open XML Spreadsheet" has it."""
    usual = re.compile(rb"http://schemas\.openxmlformats\.org/(spreadsheetml|officeDocument|drawingml)/2006/")
    data = usual.sub(rb"http://purl.oclc.org/ooxml/\1/", data)
    if name == "xl/workbook.xml":
        data = data.replace(b"<workbook ", b'<workbook conformance="strict" ')
    return data


def test_a_strict_open_xml_workbook_is_read(desk, workbook):
    done = desk.take(rewritten(workbook, desk.folder / "strict.xlsx", as_strict))
    assert (done.taken, done.refused) == (len(FINDINGS), [])
    reviews = RunReader(desk.run).reviews.all
    assert {review.reviewed_at for review in reviews} == {date(2026, 1, 31)}
    comments = {review.comment for review in reviews}
    assert comments == {'see "http://purl.oclc.org/ooxml/x/"'}, "cells are left as they are"


def test_a_sensitivity_label_without_encryption_changes_nothing(desk, workbook):
    label = {"docMetadata/LabelInfo.xml": b"<labelList/>"}
    assert desk.take(rewritten(workbook, desk.folder / "l.xlsx", lambda name, data: data, **label)).taken == len(
        FINDINGS
    )


def test_warnings_of_the_library_never_reach_the_user(desk, workbook):
    def without_styles(name: str, data: bytes) -> bytes:
        return re.sub(rb"<cellStyles.*?</cellStyles>", b"", data) if name == "xl/styles.xml" else data

    odd = rewritten(workbook, desk.folder / "odd.xlsx", without_styles)
    with pytest.warns(UserWarning, match="default style"):
        openpyxl.load_workbook(odd)
    assert desk.take(odd).taken == len(FINDINGS)  # warnings are errors in tests


def test_a_workbook_is_recognised_by_its_content(desk, workbook):
    assert desk.take(workbook.rename(desk.folder / "filled.csv")).taken == len(FINDINGS)


OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(2**20 - 30)


@pytest.mark.parametrize(
    ("streams", "what"),
    [
        (["EncryptedPackage", "EncryptionInfo", "StrongEncryptionDataSpace"], "encrypted with a password"),
        (["EncryptedPackage", "DRMEncryptedDataSpace"], "encrypted by a sensitivity label"),
        (["Workbook"], "format of Excel 97"),
    ],
)
@pytest.mark.parametrize("name", ["a.xlsx", "a.csv"])
def test_an_encrypted_or_old_workbook_is_named(desk, streams, what, name):
    path = desk.folder / name
    path.write_bytes(OLE + b"".join(stream.encode("utf-16-le") for stream in streams))
    with pytest.raises(TableError, match=what) as caught:
        desk.take(path)
    assert caught.value.where == str(path)
    assert caught.value.next_step


def test_the_mark_of_an_open_workbook_is_named(desk):
    path = desk.folder / "~$results.xlsx"
    path.write_bytes(b"\x06Dr A")
    with pytest.raises(TableError, match="marks a workbook as open"):
        desk.take(path)


def test_a_strict_open_xml_workbook_is_a_table_too(tmp_path):
    import openpyxl

    from gxr_batch.job import InputSection
    from gxr_batch.rows.survey import survey

    book = openpyxl.Workbook()
    book.active.append(["case_id", "findings"])
    book.active.append(["C1", "clear lungs"])
    book.save(tmp_path / "usual.xlsx")
    strict = rewritten(tmp_path / "usual.xlsx", tmp_path / "strict.xlsx", as_strict)
    seen = survey(InputSection(path=str(strict)))
    (table,) = seen.files[0].batches((), print)
    assert table.to_pylist() == [{"case_id": "C1", "findings": "clear lungs"}]
