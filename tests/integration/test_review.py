"""Reviewed sheets are imported by row id, however they were rearranged; refused rows are listed and change nothing."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path

import openpyxl
import pytest
from other_user import shared_folder, unprivileged
from running import Workplace

from gxr_batch import read_results
from gxr_batch.cli.finetune import export_approved
from gxr_batch.errors import RunError, RunLocked, StorageError
from gxr_batch.export import Choice, export
from gxr_batch.finetune.examples import read_examples
from gxr_batch.job import make_job
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.reviews import add_reviews, judged_sha256, one_import
from gxr_batch.records import Key, Review
from gxr_batch.review.import_reviews import Imported, import_reviews
from gxr_batch.run.status import statuses

ROWS = 12
FAULTS = {"fail_containing": "number 7"}
HEADER, FIRST = 3, 4


class Desk:
    """A run, its exported workbook, and a reviewer who fills it in."""

    def __init__(self, work: Workplace) -> None:
        self.work, self.run = work, work.folder / "outputs/j"

    def export(self, form: str = "xlsx", *, approved: bool = False) -> Path:
        return export(RunReader(self.run), form, None, Choice(approved=approved)).path

    def edit(self, change: Callable[[openpyxl.worksheet.worksheet.Worksheet], None], name: str = "edited.xlsx") -> Path:
        book = openpyxl.load_workbook(self.export())
        change(book["Cases"])
        target = self.work.folder / name
        book.save(target)
        return target

    def fill(self, reviews: dict[str, dict[str, object]], name: str = "edited.xlsx") -> Path:
        return self.edit(lambda sheet: fill(sheet, reviews), name)

    def take(self, *sheets: Path, reviewer: str = "Dr A") -> Imported:
        return import_reviews(RunReader(self.run), sheets, reviewer)

    def frame(self):
        return read_results(self.run).set_index("gxr_row_id")


def columns(sheet) -> dict[str, int]:
    return {cell.value: cell.column for cell in sheet[HEADER] if cell.value}


def rows(sheet) -> dict[str, int]:
    return {row[0].value: row[0].row for row in sheet.iter_rows(min_row=FIRST) if row[0].value}


def fill(sheet, reviews: dict[str, dict[str, object]]) -> None:
    at, places = rows(sheet), columns(sheet)
    for row_id, cells in reviews.items():
        for name, value in cells.items():
            sheet.cell(at[row_id], places[f"gxr_{name}"], value)


def empty(sheet, row_id: str, name: str) -> None:
    sheet.cell(rows(sheet)[row_id], columns(sheet)[f"gxr_{name}"]).value = None


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a job with a finished run; each test gets a copy."""
    work = Workplace(tmp_path_factory.mktemp("review"))
    cells = [f"finding number {number}" for number in range(ROWS)]
    cells[3], cells[4] = "=1+1 and _x000D_ is a text", "two\nlines and 🫁"
    work.table([(f"C{number:02}", cell) for number, cell in enumerate(cells)])
    work.job("[prompt]\ntemplate = 'basic'\n[engine]\nkind = 'echo'\n")
    work.faults = FAULTS
    work.run(expect=3)
    return work.folder


@pytest.fixture
def desk(tmp_path: Path, finished: Path) -> Desk:
    work = Workplace(tmp_path)
    work.faults = FAULTS
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return Desk(work)


APPROVED = {"review_status": "approved"}
EDITED = {"review_status": "approved_with_edits", "review_text": "A better text.", "review_quality": 4}
REJECTED = {"review_status": "rejected", "review_false_finding_significant": 2, "review_comment": "wrong lung"}


def test_a_review_is_applied_to_its_row(desk):
    done = desk.take(desk.fill({"C00": APPROVED, "C01": EDITED, "C02": REJECTED}))
    assert (done.taken, done.unreviewed, done.refused, done.disagreements) == (3, ROWS - 3, [], [])
    frame = desk.frame()
    assert list(frame["gxr_review_status"][:4]) == ["approved", "approved_with_edits", "rejected", "unreviewed"]
    assert frame.loc["C01", "gxr_review_text"] == "A better text."
    assert frame.loc["C01", "gxr_review_quality"] == 4
    assert frame.loc["C02", "gxr_review_false_finding_significant"] == 2
    assert frame.loc["C02", "gxr_review_comment"] == "wrong lung"
    assert frame.loc["C00", "gxr_reviewer"] == "Dr A"
    assert frame.loc["C00", "gxr_reviewed_at"] == date.today()
    assert f"reviewed by Dr A on {date.today()}" in frame.loc["C00", "gxr_disclaimer"]
    assert "not reviewed" in frame.loc["C05", "gxr_disclaimer"]


def test_an_import_does_not_change_the_generated_text(desk):
    before = desk.frame()["gxr_text"]
    stored = (desk.run / "results.parquet").read_bytes()
    desk.take(desk.fill({"C01": EDITED}))
    assert desk.frame()["gxr_text"].equals(before)
    assert (desk.run / "results.parquet").read_bytes() == stored


def test_rows_are_matched_by_id_after_sorting_deleting_moving_and_adding(desk):
    def rearrange(sheet) -> None:
        fill(sheet, {"C03": APPROVED, "C04": EDITED, "C09": REJECTED})
        sheet.delete_rows(rows(sheet)["C01"])
        kept = [[cell.value for cell in row] for row in sheet.iter_rows(min_row=HEADER)]
        header, body = kept[0], sorted(kept[1:], key=lambda row: str(row[0]), reverse=True)
        order = [*range(5, len(header)), *range(5)]
        sheet.delete_rows(1, sheet.max_row)
        sheet.append(["my own title"])
        for line in [header, *body]:
            sheet.append(["my notes", *(line[place] for place in order)])

    done = desk.take(desk.edit(rearrange))
    assert (done.taken, done.refused) == (3, [])
    frame = desk.frame()
    assert frame.loc[["C03", "C04", "C09"], "gxr_review_status"].tolist() == [
        "approved",
        "approved_with_edits",
        "rejected",
    ]


def test_a_row_with_a_changed_generated_text_is_refused_and_listed(desk):
    sheet = desk.fill({"C00": APPROVED, "C01": {**APPROVED, "text": "something else entirely"}})
    done = desk.take(sheet)
    assert done.taken == 1
    (refused,) = done.refused
    assert (refused.row_id, refused.sheet, refused.row, refused.file) == ("C01", "Cases", 5, "edited.xlsx")
    assert "generated text was changed" in refused.why
    assert desk.frame().loc["C01", "gxr_review_status"] == "unreviewed"


def test_changed_whitespace_in_the_generated_text_is_ignored(desk):
    text = desk.frame().loc["C04", "gxr_text"]
    done = desk.take(desk.fill({"C04": {**APPROVED, "text": text.replace("\n", "\r\n") + "  \n"}}))
    assert (done.taken, done.refused) == (1, [])


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        ({"review_status": "fine"}, "must be one of unreviewed, approved"),
        ({"review_status": "approved_with_edits"}, "needs the full corrected text"),
        ({"review_status": "approved", "review_text": "another text"}, "choose approved_with_edits"),
        ({**APPROVED, "review_quality": 6}, "from 1 to 5"),
        ({**APPROVED, "review_quality": 2.5}, "from 1 to 5"),
        (
            {**APPROVED, "review_wrong_location_significant": "many"},
            "wrong_location_significant must be a whole number",
        ),
        ({**APPROVED, "reviewed_at": "01/02/2026"}, "2026-01-31"),
        ({**APPROVED, "reviewed_at": "2026-02-31"}, "2026-01-31"),
    ],
)
def test_invalid_cells_are_refused_with_a_reason(desk, cells, why):
    done = desk.take(desk.fill({"C00": cells, "C01": APPROVED}))
    assert done.taken == 1
    assert [one.row_id for one in done.refused] == ["C00"]
    assert why in done.refused[0].why


@pytest.mark.parametrize(
    "cell", [datetime(2026, 1, 31, 8), date(2026, 1, 31), "2026-01-31", "31.01.2026", "2026-01-31T08:00:00Z"]
)
def test_a_date_is_read_in_every_unambiguous_form(desk, cell):
    desk.take(desk.fill({"C00": {**APPROVED, "reviewed_at": cell}}))
    assert desk.frame().loc["C00", "gxr_reviewed_at"] == date(2026, 1, 31)


def test_a_row_without_a_text_or_unknown_to_the_run_is_refused(desk):
    def change(sheet) -> None:
        fill(sheet, {"C07": APPROVED})
        at = rows(sheet)["C02"]
        sheet.cell(at, 1, "X99")
        sheet.cell(at, columns(sheet)["gxr_review_status"], "approved")

    done = desk.take(desk.edit(change))
    assert done.taken == 0
    assert {one.row_id: one.why for one in done.refused} == {
        "C07": "the row failed and has no text",
        "": "this run has no such row, or has not generated it yet",
    }


def test_a_review_without_a_name_is_refused(desk):
    done = desk.take(desk.fill({"C00": APPROVED}), reviewer="")
    assert "--reviewer NAME" in done.refused[0].why


def test_conflicting_reviews_of_one_row_are_refused(desk):
    def change(sheet) -> None:
        fill(sheet, {"C00": APPROVED})
        line = [cell.value for cell in sheet[rows(sheet)["C00"]]]
        line[columns(sheet)["gxr_review_status"] - 1] = "rejected"
        sheet.append(line)

    done = desk.take(desk.edit(change))
    assert done.taken == 0, "it is unknown which of them is valid"
    assert [one.row_id for one in done.refused] == ["C00", "C00"]
    assert "conflicting reviews by one reviewer: edited.xlsx, sheet Cases, row 4" in done.refused[0].why


def test_importing_the_same_sheet_again_changes_nothing(desk):
    sheet = desk.fill({"C00": APPROVED, "C01": EDITED})
    desk.take(sheet)
    files = sorted((desk.run / "reviews").glob("*.parquet"))
    done = desk.take(sheet)
    assert (done.taken, done.unchanged) == (0, 2)
    assert sorted((desk.run / "reviews").glob("*.parquet")) == files


def test_a_new_review_by_the_same_reviewer_replaces_the_old_one(desk):
    desk.take(desk.fill({"C00": REJECTED}))
    done = desk.take(desk.fill({"C00": {**APPROVED, "review_false_finding_significant": None, "review_comment": None}}))
    assert (done.taken, done.disagreements) == (1, [])
    assert desk.frame().loc["C00", "gxr_review_status"] == "approved"


def test_reviews_of_reviewers_who_disagree_are_all_kept_and_reported(desk):
    first = desk.fill({"C00": APPROVED, "C01": APPROVED}, "a.xlsx")
    second = desk.fill({"C00": REJECTED, "C02": EDITED}, "b.xlsx")
    desk.take(first, reviewer="Dr A")
    done = desk.take(second, reviewer="Dr B")
    assert [(one.row_id, one.verdicts) for one in done.disagreements] == [
        ("C00", (("Dr A", "approved"), ("Dr B", "rejected")))
    ]
    frame = desk.frame()
    assert frame.loc["C00", "gxr_review_status"] == "rejected", "the newest review is shown"
    assert "reviewers_disagree" in frame.loc["C00", "gxr_flags"]
    approved = [json.loads(line) for line in desk.export("jsonl", approved=True).read_text().splitlines()]
    assert [row["gxr_row_id"] for row in approved] == ["C01", "C02"]


def test_a_second_reviewer_may_agree_with_the_first(desk):
    sheet = desk.fill({"C00": APPROVED, "C01": EDITED, "C02": REJECTED})
    assert desk.take(sheet, reviewer="Dr A").taken == 3
    done = desk.take(sheet, reviewer="Dr B")
    assert (done.taken, done.refused, done.disagreements) == (3, [], [])
    assert desk.take(sheet, reviewer="dr  b").unchanged == 3
    assert desk.frame().loc["C00", "gxr_reviewer"] == "Dr B"


def test_what_is_on_a_very_hidden_sheet_is_refused_and_listed(desk):
    def hide(sheet) -> None:
        copy = sheet.parent.copy_worksheet(sheet)
        copy.title, copy.sheet_state = "Extra", "veryHidden"
        fill(copy, {"C00": {**APPROVED, "reviewer": "Dr A"}})
        fill(sheet, {"C01": APPROVED})

    done = desk.take(desk.edit(hide))
    assert done.taken == 1
    assert [(one.row_id, one.sheet) for one in done.refused] == [("C00", "Extra")]
    assert "very hidden" in done.refused[0].why
    assert desk.frame().loc["C00", "gxr_review_status"] == "unreviewed"


def test_half_a_character_loses_only_its_own_row(desk):
    half = {**EDITED, "review_comment": "see _xD800_"}
    done = desk.take(desk.fill({"C00": half, "C01": {**APPROVED, "review_comment": "_xD83E__xDEC1_"}}))
    assert [(one.row, one.why) for one in done.refused] == [
        (FIRST, "gxr_review_comment has half a character, such as _xD800_; type it again")
    ]
    assert desk.frame().loc["C01", "gxr_review_comment"] == "🫁"


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_reviews_that_cannot_be_read_are_never_taken_for_none(desk, mode):
    desk.take(desk.fill({"C00": APPROVED}))
    with shared_folder() as place:
        run = shutil.copytree(desk.run, place / "run")
        for path in (run, *run.rglob("*")):
            path.chmod(0o777)
        (run / "reviews").chmod(mode)
        with unprivileged():
            for use in (lambda: export(RunReader(run), "csv", None, Choice()), lambda: read_results(run)):
                with pytest.raises(StorageError, match="Permission denied"):
                    use()
            (state,) = statuses(run)
        (run / "reviews").chmod(0o777)
    assert (state.ok, state.reviewed) == (ROWS - 1, None)


def test_a_review_is_stale_once_its_row_is_generated_again(desk):
    desk.take(desk.fill({"C05": APPROVED, "C06": APPROVED}))
    table = [(f"C{number:02}", f"finding number {number}") for number in range(ROWS)]
    table[5] = ("C05", "an edited finding")
    desk.work.table(table)
    desk.work.run(expect=3)
    frame = desk.frame()
    assert frame.loc["C05", "gxr_review_status"] == "unreviewed"
    assert "stale_review" in frame.loc["C05", "gxr_flags"]
    assert frame.loc["C06", "gxr_review_status"] == "approved", "reviews survive a resumed run"
    approved = [json.loads(line) for line in desk.export("jsonl", approved=True).read_text().splitlines()]
    assert [row["gxr_row_id"] for row in approved] == ["C06"]


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8-sig"), (";", "cp1252"), ("\t", "utf-16"), (",", "utf-8")]
)
def test_a_sheet_saved_as_csv_is_imported(desk, delimiter, encoding):
    def save(sheet) -> None:
        fill(sheet, {"C00": APPROVED, "C01": EDITED})
        with (desk.work.folder / "saved.csv").open("w", newline="", encoding=encoding, errors="replace") as file:
            writer = csv.writer(file, delimiter=delimiter, lineterminator="\r\n")
            for row in sheet.iter_rows(values_only=True):
                writer.writerow(["" if cell is None else cell for cell in row])

    desk.edit(save)
    done = desk.take(desk.work.folder / "saved.csv")
    assert (done.taken, done.refused) == (2, [])
    assert desk.frame().loc["C01", "gxr_review_text"] == "A better text."


def test_the_csv_for_excel_can_be_reviewed_too(desk):
    path = desk.export("csv")
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    table[3] |= {"gxr_review_status": "approved"}
    with (desk.work.folder / "filled.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    done = desk.take(desk.work.folder / "filled.csv")
    assert (done.taken, done.refused) == (1, []), "the guarded text of =1+1 is the generated text"


def test_a_workbook_exported_after_an_import_shows_the_reviews(desk):
    desk.take(desk.fill({"C01": {**EDITED, "reviewed_at": "2026-01-31"}}))
    sheet = openpyxl.load_workbook(desk.export())["Cases"]
    cells = {name: sheet.cell(rows(sheet)["C01"], place).value for name, place in columns(sheet).items()}
    assert cells["gxr_review_status"] == "approved_with_edits"
    assert cells["gxr_review_text"] == "A better text."
    assert cells["gxr_review_quality"] == 4
    assert cells["gxr_reviewed_at"] == datetime(2026, 1, 31)
    done = desk.take(desk.fill({}))
    assert (done.taken, done.unchanged) == (0, 1)


def test_only_approved_cases_go_into_approved_xlsx(desk):
    desk.take(desk.fill({"C00": APPROVED, "C01": EDITED, "C02": REJECTED}))
    done = desk.work.gxr("export", "outputs/j", "--only", "approved")
    assert "approved.xlsx: 2 rows" in done.stdout
    book = openpyxl.load_workbook(desk.run / "approved.xlsx")
    assert list(rows(book["Cases"])) == ["C00", "C01"]
    assert "approved" in book["README"]["A1"].value
    assert "approved by the person" in book["Cases"]["A1"].value


def test_approved_cases_become_training_data_with_the_prompts_of_the_run(desk):
    desk.take(desk.fill({"C00": APPROVED, "C01": EDITED, "C02": REJECTED}))
    lines = [json.loads(line) for line in desk.export("chat-jsonl").read_text().splitlines()]
    assert [line["metadata"]["gxr_row_id"] for line in lines] == ["C00", "C01"]
    first, second = (line["messages"] for line in lines)
    assert [turn["role"] for turn in first] == ["user", "assistant"]
    assert "finding number 0" in first[0]["content"]
    assert first[1]["content"] == desk.frame().loc["C00", "gxr_text"]
    assert second[1]["content"] == "A better text."


def test_finetune_exports_the_approved_cases_of_runs_that_a_glob_matches(desk):
    desk.take(desk.fill({"C00": APPROVED, "C02": REJECTED}))
    assert list(export_approved(make_job("f", given={"finetune.data": [str(desk.run.parent / "*")]}))) == []
    (line,) = (desk.run / "approved-chat.jsonl").read_text().splitlines()
    assert json.loads(line)["metadata"]["gxr_row_id"] == "C00"


def test_finetune_refuses_an_outdated_export_that_an_entry_names_as_a_file_and_leaves_it_as_it_is(desk):
    desk.take(desk.fill({"C00": APPROVED, "C01": APPROVED}))
    job = make_job("f", given={"finetune.data": [str(desk.run.parent / "*" / "approved-chat.jsonl")]})
    before = desk.export("chat-jsonl").read_text()
    assert len(read_examples(job)[0]) == 2
    desk.take(desk.fill({"C00": REJECTED}))
    assert list(export_approved(job)) == []
    assert (desk.run / "approved-chat.jsonl").read_text() == before
    with pytest.raises(RunError, match="was reviewed after its approved rows were exported"):
        read_examples(job)


def test_finetune_says_which_approved_rows_it_leaves_out(desk, monkeypatch):
    (desk.work.folder / "own.md.j2").write_text("Say {{ findings }}.")
    desk.work.job("[prompt]\ntemplate = 'own.md.j2'\n[engine]\nkind = 'echo'\n")
    desk.work.run("--fresh", faults={})
    desk.take(desk.fill({"C00": APPROVED}))
    (desk.work.folder / "own.md.j2").write_text("Tell {{ findings }}.")
    monkeypatch.chdir(desk.work.folder)
    (note,) = export_approved(make_job("f", given={"finetune.data": [str(desk.run)]}))
    assert "1 row left out: the prompt cannot be reproduced" in note


def test_a_prompt_that_cannot_be_reproduced_is_left_out_and_counted(desk, monkeypatch):
    work = desk.work
    (work.folder / "own.md.j2").write_text("Say {{ findings }}.")
    work.job("[prompt]\ntemplate = 'own.md.j2'\n[engine]\nkind = 'echo'\n")
    work.run("--fresh", faults={})
    desk.take(desk.fill({"C00": APPROVED}))
    (work.folder / "own.md.j2").write_text("Tell {{ findings }}.")
    monkeypatch.chdir(work.folder)
    done = export(RunReader(desk.run), "chat-jsonl", None, Choice())
    assert done.rows == 0
    assert "1 row left out" in done.notes[0]


def test_a_file_that_is_not_a_sheet_of_a_run_is_refused(desk):
    other = desk.work.folder / "other.xlsx"
    openpyxl.Workbook().save(other)
    with pytest.raises(RunError, match="column gxr_row_id"):
        desk.take(other)
    (desk.work.folder / "broken.xlsx").write_bytes(b"no workbook")
    with pytest.raises(RunError, match="not a readable workbook"):
        desk.take(desk.work.folder / "broken.xlsx")
    with pytest.raises(RunError, match="sheet does not exist"):
        desk.take(desk.work.folder / "absent.xlsx")
    (desk.work.folder / "sheet.ods").write_bytes(b"x")
    with pytest.raises(RunError, match="cannot be read"):
        desk.take(desk.work.folder / "sheet.ods")


def test_two_imports_never_write_at_the_same_time(desk, monkeypatch):
    monkeypatch.setattr("gxr_batch.ledger.reviews._LOCK_SECONDS", 0.1)
    sheet = desk.fill({"C00": APPROVED})
    with one_import(desk.run), pytest.raises(RunLocked, match="Another import"):
        desk.take(sheet)


def test_a_damaged_file_of_reviews_is_named(desk):
    desk.take(desk.fill({"C00": APPROVED}))
    path = desk.run / "reviews/review-00000001.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match="A review file is damaged"):
        desk.frame()


def test_the_command_reports_imported_and_refused_rows_and_quotes_no_text(desk):
    sheet = desk.fill({"C00": APPROVED, "C01": {**APPROVED, "text": "secret words"}})
    done = desk.work.gxr("review", "import", "outputs/j", str(sheet), "--reviewer", "Dr A", expect=3)
    assert "1 reviews imported, 0 unchanged, 10 rows unreviewed, 1 refused" in done.stdout
    assert "C01 (edited.xlsx, sheet Cases, row 5)" in done.stdout
    assert "secret" not in done.stdout + done.stderr
    again = json.loads(desk.work.gxr("review", "import", "outputs/j", str(sheet), "--json", expect=3).stdout)
    assert again["refused"][1]["row_id"] == "C01"


def test_an_approval_can_be_withdrawn(desk):
    desk.take(desk.fill({"C00": APPROVED}))
    done = desk.take(desk.fill({"C00": {"review_status": "unreviewed"}}))
    assert (done.taken, done.withdrawn, done.remarks) == (1, 1, 0)
    assert desk.frame().loc["C00", "gxr_review_status"] == "unreviewed"
    assert desk.export("jsonl", approved=True).read_text() == ""


def test_a_name_alone_is_not_a_review(desk):
    done = desk.take(desk.fill({"C00": {"reviewer": "Dr A"}, "C01": {"reviewer": "Dr A", "reviewed_at": "2026-01-31"}}))
    assert (done.taken, done.unreviewed, done.refused) == (0, ROWS, [])


def test_a_name_filled_down_a_sheet_exported_earlier_withdraws_nothing(desk):
    named = {"reviewer": "Dr A", "reviewed_at": "2026-01-31"}
    sheet = desk.fill({"C00": named, "C01": {**named, **REJECTED}}, "earlier.xlsx")
    desk.take(desk.fill({"C00": {**APPROVED, **named}}))
    done = desk.take(sheet)
    assert (done.taken, done.withdrawn, done.refused) == (1, 0, [])
    assert desk.frame().loc["C00", "gxr_review_status"] == "approved"


def test_a_remark_in_a_sheet_exported_earlier_does_not_end_a_verdict(desk):
    sheet = desk.fill({"C00": {"reviewer": "Dr A", "review_comment": "hm"}}, "earlier.xlsx")
    desk.take(desk.fill({"C00": APPROVED}))
    done = desk.take(sheet)
    assert done.taken == 0
    assert "earlier verdict is not in this sheet" in done.refused[0].why
    assert desk.frame().loc["C00", "gxr_review_status"] == "approved"


def test_a_remark_can_be_withdrawn(desk):
    desk.take(desk.fill({"C00": {"review_comment": "hm"}}))
    row = desk.frame().loc["C00"]
    assert (row["gxr_review_comment"], row["gxr_review_status"]) == ("hm", "unreviewed")
    assert "not reviewed" in row["gxr_disclaimer"]
    done = desk.take(desk.edit(lambda sheet: empty(sheet, "C00", "review_comment")))
    assert (done.taken, done.withdrawn) == (1, 1)
    assert not isinstance(desk.frame().loc["C00", "gxr_review_comment"], str)


def test_a_sheet_that_shows_a_remark_does_not_end_a_verdict_given_since(desk):
    desk.take(desk.fill({"C00": {"review_comment": "hm"}}))
    changed = desk.fill({"C00": {"review_comment": "hm2"}}, "changed.xlsx")
    desk.take(desk.fill({"C00": APPROVED}))
    assert "earlier verdict is not in this sheet" in desk.take(changed).refused[0].why
    assert desk.frame().loc["C00", "gxr_review_status"] == "approved"


def test_a_withdrawn_remark_does_not_hide_that_of_another_reader(desk):
    sheet = desk.fill({"C00": {"review_comment": "check side"}}, "b.xlsx")
    desk.take(desk.fill({"C00": {"review_comment": "hm"}}))
    desk.take(sheet, reviewer="Dr B")
    desk.take(desk.fill({"C00": {"reviewer": "Dr A", "review_comment": "hm again"}}))
    desk.take(desk.edit(lambda cases: empty(cases, "C00", "review_comment")))
    assert desk.frame().loc["C00", "gxr_review_comment"] == "check side"


def test_two_sheets_without_names_are_refused_for_that(desk):
    one = desk.fill({"C00": APPROVED}, "one.xlsx")
    other = desk.fill({"C00": REJECTED}, "other.xlsx")
    done = desk.take(one, other, reviewer="")
    assert [refused.why.split(";")[0] for refused in done.refused] == ["gxr_reviewer is empty"] * 2


@pytest.mark.parametrize("reviewer", ["", "Dr A"])
def test_a_remark_that_an_earlier_version_stored_without_a_name_is_unchanged(desk, reviewer):
    row = desk.frame().loc["C00"]
    digest = judged_sha256(row["gxr_text"], row["gxr_prompt_sha256"])
    remark = Review(Key("C00", 1), digest, "unreviewed", "", date(2026, 1, 31), None, (None,) * 12, None, "hm")
    with one_import(desk.run):
        add_reviews(desk.run, [remark], {})
    done = desk.take(desk.fill({"C01": {**APPROVED, "reviewer": "Dr A"}}), reviewer=reviewer)
    assert (done.taken, done.unchanged, done.refused) == (1, 1, [])


def test_a_row_whose_id_a_spreadsheet_changed_is_no_text_corrected_in_place(desk):
    def exchange(sheet) -> None:
        at, places = rows(sheet), columns(sheet)
        sheet.cell(at["C01"], places["gxr_prompt_sha256"], sheet.cell(at["C00"], places["gxr_prompt_sha256"]).value)
        sheet.cell(at["C01"], places["gxr_row_id"], "C00")

    done = desk.take(desk.edit(exchange))
    assert (done.unreviewed, done.refused) == (ROWS, [])


def test_remarks_need_a_name_since_two_unnamed_readers_would_be_one(desk):
    done = desk.take(desk.fill({"C00": {"review_missing_finding_significant": 1}}), reviewer="")
    assert done.taken == 0
    assert "gxr_reviewer is empty" in done.refused[0].why


@pytest.mark.parametrize("cells", [{}, {"reviewer": "Dr A", "reviewed_at": "2026-01-31"}])
def test_a_text_corrected_in_place_is_refused_even_without_a_status(desk, cells):
    done = desk.take(desk.fill({"C00": {**cells, "text": "A correction."}}))
    assert (done.taken, done.unreviewed) == (0, ROWS - 1)
    assert [(one.row_id, one.why) for one in done.refused] == [
        ("C00", "the generated text was changed; corrections go into gxr_review_text")
    ]


def test_a_row_generated_again_since_the_export_is_no_text_corrected_in_place(desk):
    sheet = desk.fill({})
    table = [(f"C{number:02}", f"finding number {number}") for number in range(ROWS)]
    table[5] = ("C05", "an edited finding")
    desk.work.table(table)
    desk.work.run(expect=3)
    assert desk.take(sheet).refused == []


def test_a_comment_without_a_verdict_leaves_other_verdicts_valid(desk):
    desk.take(desk.fill({"C00": APPROVED}))
    done = desk.take(desk.fill({"C00": {"review_status": "unreviewed", "reviewer": "Dr B", "review_comment": "hm"}}))
    assert (done.taken, done.remarks) == (1, 1)
    row = desk.frame().loc["C00"]
    assert (row["gxr_review_status"], row["gxr_reviewer"]) == ("approved", "Dr A")


def test_an_older_review_does_not_replace_a_newer_one(desk):
    old = desk.fill({"C00": {**APPROVED, "reviewed_at": "2026-01-01"}}, "old.xlsx")
    new = desk.fill({"C00": {**REJECTED, "reviewed_at": "2026-01-20"}}, "new.xlsx")
    desk.take(new)
    done = desk.take(old)
    assert done.taken == 0
    assert "stored review is newer, of 2026-01-20" in done.refused[0].why
    assert desk.frame().loc["C00", "gxr_review_status"] == "rejected"


def test_a_review_of_a_day_to_come_is_refused(desk):
    done = desk.take(desk.fill({"C00": {**APPROVED, "reviewed_at": "2062-01-01"}}))
    assert [one.why for one in done.refused] == ["gxr_reviewed_at is in the future"]


def test_a_review_that_an_earlier_version_stored_with_a_day_to_come_can_be_replaced(desk, monkeypatch):
    class Later(date):
        @classmethod
        def today(cls) -> date:
            return date(2062, 1, 1)

    with monkeypatch.context() as patched:
        patched.setattr("gxr_batch.review.import_reviews.date", Later)
        desk.take(desk.fill({"C00": APPROVED}))
    done = desk.take(desk.fill({"C00": {**REJECTED, "reviewed_at": "2026-01-31"}}))
    assert "stored review is newer" in done.refused[0].why
    assert desk.take(desk.fill({"C00": REJECTED})).taken == 1, "with the date that the sheet shows"


def test_a_replaced_review_needs_a_new_date_to_be_restored(desk):
    first = desk.fill({"C00": APPROVED}, "first.xlsx")
    second = desk.fill({"C00": REJECTED}, "second.xlsx")
    desk.take(first)
    desk.take(second)
    done = desk.take(first)
    assert done.taken == 0
    assert "enter a new gxr_reviewed_at" in done.refused[0].why
    assert desk.frame().loc["C00", "gxr_review_status"] == "rejected"


def test_importing_the_same_sheet_on_another_day_changes_nothing(desk, monkeypatch):
    sheet = desk.fill({"C00": APPROVED})
    desk.take(sheet)
    day = desk.frame().loc["C00", "gxr_reviewed_at"]

    class Later(date):
        @classmethod
        def today(cls) -> date:
            return day.replace(year=day.year + 1)

    monkeypatch.setattr("gxr_batch.review.import_reviews.date", Later)
    done = desk.take(sheet)
    assert (done.taken, done.unchanged) == (0, 1)
    assert desk.frame().loc["C00", "gxr_reviewed_at"] == day


def test_changing_another_reviewers_review_is_refused(desk):
    desk.take(desk.fill({"C00": APPROVED}), reviewer="Dr A")
    done = desk.take(desk.fill({"C00": REJECTED}), reviewer="Dr B")
    assert done.taken == 0
    assert "another name than --reviewer" in done.refused[0].why


def test_a_reviewers_name_may_differ_in_case_and_punctuation(desk):
    desk.take(desk.fill({"C00": {**APPROVED, "reviewer": "Dr. Ray"}}))
    done = desk.take(desk.fill({"C00": {**REJECTED, "reviewer": "dr.  ray"}}), reviewer="")
    assert (done.taken, done.disagreements) == (1, [])


def test_a_guarded_cell_is_imported_without_its_apostrophe(desk):
    desk.take(desk.fill({"C00": {**EDITED, "review_text": "- No effusion."}}))
    done = desk.take(desk.export("csv"))
    assert (done.taken, done.unchanged, done.refused) == (0, 1, [])
    assert json.loads(desk.export("chat-jsonl").read_text())["messages"][-1]["content"] == "- No effusion."


def test_a_corrected_text_longer_than_a_cell_is_kept_in_full(desk):
    whole = "A very long corrected text. " * 2000
    with desk.export("csv").open(newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    table[0] |= {"gxr_review_status": "approved_with_edits", "gxr_review_text": whole}
    with (desk.work.folder / "long.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    desk.take(desk.work.folder / "long.csv")
    done = desk.take(desk.fill({}))
    assert (done.taken, done.unchanged, done.refused) == (0, 1, [])
    assert desk.frame().loc["C00", "gxr_review_text"] == whole.strip()


@pytest.mark.parametrize("cell", ["#NAME?", "#REF!", "Err:508"])
def test_a_spreadsheet_error_is_refused_as_a_text(desk, cell):
    done = desk.take(desk.fill({"C00": {**EDITED, "review_text": cell}}))
    assert "has a spreadsheet error" in done.refused[0].why


def test_a_header_with_a_repeated_or_missing_column_is_refused(desk):
    def twice(sheet) -> None:
        sheet.cell(HEADER, sheet.max_column + 1, "gxr_review_status")

    def missing(sheet) -> None:
        sheet.cell(HEADER, columns(sheet)["gxr_review_status"], "Status")

    for change, message in ((twice, "repeats a column"), (missing, "lacks a column")):
        with pytest.raises(RunError, match=f"{message}: gxr_review_status"):
            desk.take(desk.edit(change))


def test_a_sheet_exported_before_its_row_was_generated_again_is_refused(desk):
    sheet = desk.fill({"C05": APPROVED})
    table = [(f"C{number:02}", f"finding number {number}") for number in range(ROWS)]
    table[5] = ("C05", "an edited finding")
    desk.work.table(table)
    desk.work.run(expect=3)
    assert "generated again since the sheet was written" in desk.take(sheet).refused[0].why


def test_a_filled_in_workbook_is_never_replaced(desk):
    path = desk.export()
    book = openpyxl.load_workbook(path)
    fill(book["Cases"], {"C00": APPROVED})
    book.save(path)
    output = desk.work.gxr("export", "outputs/j").stdout
    (kept,) = desk.run.glob("results.before-*.xlsx")
    assert kept.name in output
    assert desk.take(kept).taken == 1


@pytest.mark.parametrize("place", ["outputs/j/results.xlsx", "elsewhere.xlsx"])
@pytest.mark.parametrize("verb", ["export", "report"])
def test_no_verb_replaces_a_workbook_that_was_filled_in_since_its_export(desk, verb, place):
    path = desk.work.folder / place
    desk.work.gxr("export", "outputs/j", "--to", place)
    book = openpyxl.load_workbook(path)
    fill(book["Cases"], {"C00": APPROVED})
    book.save(path)
    output = desk.work.gxr(verb, "outputs/j", "--to", place).stdout
    (kept,) = path.parent.glob(f"{path.stem}.before-*.xlsx")
    assert kept.name in output
    assert desk.take(kept).taken == 1


def test_the_openai_batch_export_has_the_corrected_text(desk):
    desk.take(desk.fill({"C01": EDITED}))
    line = json.loads(desk.export("openai-batch", approved=True).read_text())
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "A better text."
