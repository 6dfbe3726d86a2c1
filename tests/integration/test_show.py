"""`gxr-batch show`: one case in the terminal."""

from __future__ import annotations

import pytest
from running import Workplace

from gxr_batch.records import DISCLAIMER


@pytest.fixture
def work(tmp_path):
    work = Workplace(tmp_path)
    work.job("[engine]\nkind = 'echo'\n[sampling]\nsamples_per_row = 2\n[privacy]\nidentifiers = 'hold'\n")
    rows = [("C1", "Patient: John Smith", "1"), ("C2", "clear \x1b[31mlungs\u202e " * 20, ""), ("C3", "effusion", "3")]
    work.table(rows, header=("case_id", "findings", "ward"))
    work.gxr("run", "j.toml", expect=3)
    return work


def test_the_first_generated_case_is_shown_cells_first_with_its_mark(work):
    shown = work.gxr("show", "outputs/j").stdout
    assert (
        shown.index("Row C2, sample 1") < shown.index("  findings  clear") < shown.index("[AI-generated, unreviewed]")
    )
    assert "ward" not in shown  # an empty cell
    assert " ".join(shown.split()).endswith(DISCLAIMER)
    assert max(map(len, shown.splitlines())) <= 80


def test_control_characters_reach_no_terminal(work):
    shown = work.gxr("show", "outputs/j", "--row", "C2").stdout
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert r"\x1b[31mlungs\u202e" in shown


def test_a_named_row_is_shown_with_all_its_samples(work):
    shown = work.gxr("show", "outputs/j", "--row", "C3").stdout
    assert [line for line in shown.splitlines() if line.startswith("Row")] == ["Row C3, sample 1", "Row C3, sample 2"]


def test_a_held_row_shows_its_reason_and_no_cell(work):
    shown = work.gxr("show", "outputs/j", "--row", "C1").stdout
    assert "John Smith" not in shown
    assert "No text: held, " in shown


def test_a_random_case_is_one_that_was_generated(work):
    for _ in range(3):
        assert "Row C2" in (shown := work.gxr("show", "outputs/j", "--random").stdout) or "Row C3" in shown


def test_a_missing_row_is_one_message_with_the_next_command(work):
    done = work.gxr("show", "outputs/j", "--row", "nope", expect=2)
    assert done.stderr == (
        "Error: This run has no finished row 'nope'.\n  where: outputs/j\n"
        "  next:  gxr-batch show outputs/j --random shows a row that is finished\n"
    )


def test_a_run_without_a_generated_text_is_one_message(tmp_path):
    work = Workplace(tmp_path)
    work.job("[engine]\nkind = 'echo'\n[privacy]\nidentifiers = 'hold'\n")
    work.table([("C1", "Patient: John Smith")])
    work.gxr("run", "j.toml", expect=3)
    assert "This run has no generated text yet." in work.gxr("show", "outputs/j", expect=2).stderr


def test_a_reviewed_case_names_its_reviewer_and_shows_the_edited_text(work):
    import openpyxl

    work.gxr("export", "outputs/j")
    path = work.folder / "outputs/j/results.xlsx"
    book = openpyxl.load_workbook(path)
    sheet = book["Cases"]
    names = {cell.value: cell.column for line in sheet["1:3"] for cell in line}
    row = next(number for number in range(3, 12) if sheet.cell(number, names["case_id"]).value == "C3")
    for name, value in (
        ("gxr_review_status", "approved_with_edits"), ("gxr_review_text", "A better text."), ("gxr_reviewer", "R. One"),
    ):  # fmt: skip
        sheet.cell(row, names[name]).value = value
    book.save(path)
    work.gxr("review", "import", "outputs/j", str(path))
    shown = work.gxr("show", "outputs/j", "--row", "C3").stdout
    assert "[AI-generated, approved with edits by R. One on 20" in shown
    assert "A better text." in shown
    assert "reviewed by R. One" in shown


def test_a_job_file_names_its_run(work):
    assert work.gxr("show", "j.toml").stdout == work.gxr("show", "outputs/j").stdout
