"""A run with a form is shown, exported and corrected by section."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import openpyxl
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from form_runs import CONTENTS, FORM, TEXT, run_with_form

from gxr_batch import read_results
from gxr_batch.cli import main
from gxr_batch.export import Choice, export
from gxr_batch.export.audit_workbooks import AuditChoice, export_audit
from gxr_batch.forms import Form, Part
from gxr_batch.forms.library import form_source
from gxr_batch.ledger import RunReader
from gxr_batch.review.import_reviews import Imported, import_reviews
from gxr_batch.review.parse_sections import corrected

CAPTIONS, HEADER, FIRST = 2, 3, 4
BULLETS = "- Consolidation\n- =no effusion"
SHOWN = ["Right basal consolidation.", BULLETS, "It is pneumonia", "easy", 3.5]
NAMES = list(FORM.columns)
REVIEW = [part.review_column for part in FORM.parts]


@pytest.fixture
def run(tmp_path):
    return run_with_form(tmp_path / "run")


def exported(run: Path, kind: str) -> Path:
    return export(RunReader(run), kind, None, Choice()).path


def header(sheet) -> dict[str, int]:
    return {cell.value: cell.column for cell in sheet[HEADER]}


def filled(run: Path, edits: dict[str, dict[str, object]], name: str = "edited.xlsx") -> Path:
    book = openpyxl.load_workbook(exported(run, "xlsx"))
    sheet = book["Cases"]
    places = header(sheet)
    for row in range(FIRST, sheet.max_row + 1):
        for column, value in edits.get(sheet.cell(row, 1).value, {}).items():
            sheet.cell(row, places[column]).value = value
    book.save(run.parent / name)
    return run.parent / name


def taken(run: Path, *sheets: Path) -> Imported:
    return import_reviews(RunReader(run), sheets, "Dr A")


def edited(**sections: object) -> dict[str, object]:
    return {"gxr_review_status": "approved_with_edits"} | {
        f"gxr_review_section_{name}": value for name, value in sections.items()
    }


def review_of(run: Path, row: str = "a"):
    return read_results(run).set_index("gxr_row_id").loc[row]


def test_the_workbook_has_a_column_for_each_section_and_one_to_correct_it(run):
    sheet = openpyxl.load_workbook(exported(run, "xlsx"))["Cases"]
    places = header(sheet)
    order = sorted(places, key=places.get)
    at = order.index(NAMES[0])
    assert order[at : at + len(NAMES) + 1] == [*NAMES, "gxr_text"]
    captions = {name: sheet.cell(CAPTIONS, place).value for name, place in places.items()}
    assert captions["gxr_section_key_findings"] == "Key findings (AI)"
    assert captions["gxr_review_section_key_findings"] == "Corrected: Key findings"
    cells = [sheet.cell(FIRST, places[name]) for name in NAMES]
    assert [cell.value for cell in cells] == SHOWN
    assert cells[1].data_type == "s", "text, no formula"
    assert cells[4].data_type == "n"
    assert cells[4].number_format == "General"
    assert sheet.cell(FIRST, places["gxr_text"]).value == TEXT
    assert [sheet.cell(FIRST, places[name]).value for name in REVIEW] == [None] * len(REVIEW)
    assert "gxr_review_text" not in places
    lists = {str(rule.sqref): rule.formula1 for rule in sheet.data_validations.dataValidation if rule.type == "list"}
    letter = sheet.cell(FIRST, places["gxr_review_section_difficulty"]).column_letter
    assert lists[f"{letter}4:{letter}6"] == '"easy,moderate,hard"'


def test_the_readme_says_how_sections_are_corrected(run):
    sheet = openpyxl.load_workbook(exported(run, "xlsx"))["README"]
    text = "\n".join(str(cell.value) for row in sheet for cell in row if cell.value)
    assert "a column for each section" in text
    assert "good with the corrections in the columns Corrected" in text


def test_a_blind_audit_shows_the_sections(run):
    drew = export_audit(RunReader(run), AuditChoice(rows=2, blind=True))
    sheet = openpyxl.load_workbook(drew.workbooks[0].path)["Cases"]
    assert set(NAMES) <= set(header(sheet))


@pytest.mark.parametrize("kind", ["csv", "csv-plain"])
def test_csv_has_lists_as_lines(run, kind):
    done = export(RunReader(run), kind, None, Choice())
    with done.path.open(encoding="utf-8-sig", newline="") as file:
        row = next(csv.DictReader(file))
    guard = "'" if kind == "csv" else ""
    assert [row[name] for name in NAMES] == [SHOWN[0], guard + BULLETS, *SHOWN[2:4], "3.5"]
    assert any("gxr_section_key_findings" in note for note in done.notes) == (kind == "csv")


def test_other_formats_have_lists_and_numbers(run):
    lines = exported(run, "jsonl").read_text().splitlines()
    assert [json.loads(lines[0])[name] for name in NAMES] == CONTENTS
    table = pq.read_table(exported(run, "parquet"))
    assert [table[name][0].as_py() for name in NAMES] == CONTENTS


def test_corrected_sections_become_the_whole_text(run):
    sheet = filled(run, {"a": edited(key_findings="- Effusion\n\nsecond item", difficulty="Hard", grade="4,0")})
    assert taken(run, sheet).taken == 1
    row = review_of(run)
    expected = TEXT.replace(BULLETS, "- Effusion\n- second item").replace(": easy", ": hard").replace(": 3.5", ": 4")
    assert row["gxr_review_text"] == expected
    assert row["gxr_text"] == TEXT
    assert row["gxr_review_status"] == "approved_with_edits"


def test_the_next_workbook_shows_the_corrected_sections_and_imports_unchanged(run):
    taken(run, filled(run, {"a": edited(grade=7, impression="Left basal\nconsolidation.")}))
    again = exported(run, "xlsx")
    sheet = openpyxl.load_workbook(again)["Cases"]
    places = header(sheet)
    cells = [sheet.cell(FIRST, places[name]).value for name in REVIEW]
    assert cells == ["Left basal\nconsolidation.", None, None, None, "7"]
    done = taken(run, again)
    assert (done.taken, done.unchanged, done.refused) == (0, 1, [])


def test_a_section_typed_as_it_was_generated_is_no_edit(run):
    same = dict(zip(REVIEW, SHOWN, strict=True))
    sheet = filled(run, {"a": {"gxr_review_status": "approved", **same}})
    assert taken(run, sheet).refused == []
    assert review_of(run)["gxr_review_status"] == "approved"
    assert read_results(run)["gxr_review_text"].isna().all()
    refused = taken(run, filled(run, {"b": {"gxr_review_status": "approved_with_edits", **same}})).refused
    assert [one.why for one in refused] == [
        "approved_with_edits needs a corrected section in a column gxr_review_section_..."
    ]


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        (edited(difficulty="severe"), "gxr_review_section_difficulty must be one of easy, moderate, hard"),
        (edited(key_findings="-"), "gxr_review_section_key_findings needs at least one line of text"),
        (edited(grade="1,200"), "gxr_review_section_grade has an ambiguous comma"),
        (edited(grade="high"), "gxr_review_section_grade must be a number from 0 to 999999"),
        (edited(answer="#NAME?"), "gxr_review_section_answer has a spreadsheet error"),
        ({**edited(answer="x"), "gxr_review_status": "approved"}, "approved, but a column gxr_review_section_..."),
        ({"gxr_section_answer": "y"}, "gxr_section_answer was changed; corrections go into gxr_"),
        ({**edited(answer="x"), "gxr_section_answer": "y"}, "gxr_section_answer was changed; corrections go into gxr_"),
        ({**edited(answer="x"), "gxr_text": "y"}, "corrections go into gxr_review_text or the columns gxr_review_s"),
    ],
)
def test_what_a_section_cannot_hold_is_refused_by_row_and_column(run, cells, why):
    (refused,) = taken(run, filled(run, {"b": cells})).refused
    assert refused.why.startswith(why) or why in refused.why
    assert (refused.row_id, refused.sheet, refused.row) == ("b", "Cases", FIRST + 1)


@pytest.mark.parametrize(("typed", "choice"), [(2.0, "2"), ("2,5", "2.5"), ("3.0", "3.0"), ("Most", "most")])
def test_a_choice_of_digits_that_a_spreadsheet_turned_into_a_number_is_that_choice(typed, choice):
    form = Form((Part("Grade", "gxr_section_grade", "choice", choices=("1", "2", "2.5", "3", "3.0", "most")),))
    assert corrected(form, "Grade: 1", {"gxr_review_section_grade": typed}) == f"Grade: {choice}"
    assert corrected(form, f"Grade: {choice}", {"gxr_review_section_grade": typed}) is None


def csv_with(run: Path, **cells: str) -> Path:
    path = exported(run, "csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0] |= {"gxr_review_status": "approved_with_edits", **cells}
    with (run.parent / "saved.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys([*rows[0], *cells]))
        writer.writeheader()
        writer.writerows(rows)
    return run.parent / "saved.csv"


def test_a_csv_with_a_whole_corrected_text_is_imported_in_the_forms_layout(run):
    loose = TEXT.replace("Right", "Left").replace("\n\n", "\n\n\n")
    assert taken(run, csv_with(run, gxr_review_text=loose)).refused == []
    assert review_of(run)["gxr_review_text"] == TEXT.replace("Right", "Left")


def test_a_csv_with_corrected_sections_loses_only_the_apostrophe(run):
    assert taken(run, csv_with(run, gxr_review_section_key_findings="'- it's\n- 'quoted'")).refused == []
    assert "Key findings:\n- it's\n- 'quoted'\n\n" in review_of(run)["gxr_review_text"]


def test_a_whole_corrected_text_without_the_form_is_refused(run):
    (refused,) = taken(run, csv_with(run, gxr_review_text="Only an impression.")).refused
    assert refused.why == (
        "gxr_review_text needs the sections of this run, each under its heading: "
        "Impression, Key findings, Answer, Difficulty, Grade"
    )


def test_a_whole_text_and_sections_that_differ_are_refused(run):
    both = csv_with(run, gxr_review_text=TEXT.replace("Right", "Left"), gxr_review_section_answer="other")
    (refused,) = taken(run, both).refused
    assert refused.why == "gxr_review_text and the corrected sections differ; clear gxr_review_text"


def test_a_text_without_the_form_is_corrected_in_all_sections(tmp_path):
    run = run_with_form(tmp_path / "run", {"a": "no form", "b": TEXT})
    (refused,) = taken(run, filled(run, {"a": edited(impression="x")})).refused
    assert refused.why.startswith("the generated text lacks its form; fill in every section, also gxr_review_section_k")
    assert taken(run, filled(run, {"a": edited(**dict(zip((n[12:] for n in NAMES), SHOWN, strict=True)))})).taken == 1
    assert review_of(run)["gxr_review_text"] == TEXT


def test_forms_are_listed_and_shown():
    listed = CliRunner().invoke(main, ["forms", "list"])
    assert listed.exit_code == 0
    assert "quiz: A quiz" in listed.output
    assert "  Answer: line, hidden\n" in listed.output
    assert "  Difficulty: choice (easy, moderate, hard)\n" in listed.output
    assert CliRunner().invoke(main, ["forms", "show", "quiz"]).output == form_source("quiz")
    assert CliRunner().invoke(main, ["forms", "show", "quizz"]).exit_code == 2
