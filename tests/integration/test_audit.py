"""From a finished run to a bound of its error rate: rows are drawn, read in workbooks, imported and summed up."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import openpyxl
import pytest
from running import Workplace

from gxr_batch.audit.audit_files import audits_of
from gxr_batch.audit.summary import Finding, Reading, _by_template, _flag_qualities, summarise
from gxr_batch.errors import LaterVersion, RunError
from gxr_batch.export.audit_workbooks import AuditChoice, export_audit
from gxr_batch.ledger import RunReader
from gxr_batch.review.import_reviews import import_reviews

ROWS = 80
HEADER, FIRST = 3, 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    work = Workplace(tmp_path_factory.mktemp("audit"))
    work.table([(f"{number:03d}", f"Small effusion, film {number}.") for number in range(ROWS)])
    work.job("[prompt]\ntemplate = 'basic'\n[engine]\nkind = 'echo'\n")
    work.run()
    return work.folder


@pytest.fixture
def work(tmp_path: Path, finished: Path) -> Workplace:
    return Workplace.copy_of(finished, tmp_path / "w")


def run_of(work: Workplace) -> Path:
    return work.folder / "outputs/j"


def read(path: Path, name: str, wrong: set[str], **cells) -> list[str]:
    """Fill in a reader's workbook: the ids in `wrong` are rejected, the others approved; return its ids in order."""
    book = openpyxl.load_workbook(path)
    sheet = book["Cases"]
    at = {cell.value: cell.column for cell in sheet[HEADER]}
    ids = []
    for row in range(FIRST, sheet.max_row + 1):
        ids.append(sheet.cell(row, at["gxr_row_id"]).value)
        status = "rejected" if ids[-1] in wrong else "approved"
        for column, value in {"gxr_review_status": status, "gxr_reviewer": name, **cells}.items():
            sheet.cell(row, at[column], value)
    book.save(path)
    return ids


def taken(run: Path, *sheets: Path):
    done = import_reviews(RunReader(run), sheets, "Somebody")
    assert not done.refused
    return done


def test_from_the_draw_to_the_bound(work):
    run = run_of(work)
    drawn = work.gxr("export", "outputs/j", "--audit", "30", "--readers", "2", "--overlap", "6")
    assert "audit-001-reader-1.xlsx: 18 rows" in drawn.stdout
    (audit,) = audits_of(run)
    first, second = (
        read(run / f"audit-001-reader-{number}.xlsx", f"Reader {number}", {audit.rows[number].key.row_id})
        for number in (1, 2)
    )
    assert [row.key.row_id for row in audit.rows if 1 in row.readers] == first, "in the order of the draw"
    assert len({*first, *second}) == 30
    assert len({*first} & {*second}) == 6
    work.gxr("review", "import", "outputs/j", *(f"outputs/j/audit-001-reader-{number}.xlsx" for number in (1, 2)))
    said = json.loads(work.gxr("review", "summary", "outputs/j", "--json").stdout)
    assert said["run"]["read"] == 30
    assert said["run"]["erroneous"] == 2, "both of the overlap, where one reader is enough"
    assert said["run"]["rate"] == pytest.approx(2 / 30)
    assert 2 / 30 < said["run"]["bound_of_a_single_look"] < said["run"]["bound"] < 0.4
    assert said["agreement"]["rows"] == 6
    assert said["agreement"]["agreed"] == 4
    assert len(said["agreement"]["differing"]) == 2
    assert said["readers"] == {f"Reader {number}": {"read": 18, "erroneous": 1} for number in (1, 2)}
    work.gxr("report", "outputs/j")
    assert f"≤ {said['run']['bound']:.1%}" in (run / "report.html").read_text()
    text = work.gxr("review", "summary", "outputs/j").stdout
    assert "30 of 30 drawn rows read, from 80 generated rows; 2 erroneous" in text
    assert "Read " in text


def test_a_blind_workbook_shows_neither_model_nor_flags_nor_what_others_said(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=20))
    taken_before = run / "audit-001-reader-1.xlsx"
    read(taken_before, "Reader 1", {"003"}, gxr_review_comment="seen by the first reader")
    taken(run, taken_before)
    for path in run.glob("reviews/audit-001.json"):
        path.unlink()  # the same rows again
    drew = export_audit(RunReader(run), AuditChoice(rows=20, blind=True))
    book = openpyxl.load_workbook(drew.workbooks[0].path)
    values = {str(cell.value) for sheet in book for row in sheet.iter_rows() for cell in row if cell.value}
    names = {cell.value for cell in book["Cases"][HEADER]}
    hidden = {"gxr_model", "gxr_template", "gxr_adapter", "gxr_seed", "gxr_findings_kept", "gxr_findings_lost"}
    assert not hidden & names
    assert not any("echo" in value and "[echo" not in value for value in values)
    assert not values & {"seen by the first reader", "approved with edits", "echoes_prompt"}
    assert not any("reviewed by Reader 1" in value or value == "Reader 1" for value in values)
    statuses = [row[0].value for row in book["Cases"].iter_rows(min_row=FIRST, min_col=3, max_col=3)]
    assert set(statuses) == {"unreviewed"}
    assert book.properties.title == "Teaching cases"


def test_a_second_draw_continues_the_first_and_keeps_its_strata(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=30, by="template", seed=4))
    export_audit(RunReader(run), AuditChoice(rows=50))
    first, second = audits_of(run)
    assert (second.by, second.seed) == ("template", 4)
    assert len({row.key for row in [*first.rows, *second.rows]}) == ROWS
    with pytest.raises(RunError, match="Only 0 generated rows"):
        export_audit(RunReader(run), AuditChoice(rows=1))
    with pytest.raises(RunError, match="An earlier draw of this run was made by template, with seed 4"):
        export_audit(RunReader(run), AuditChoice(rows=1, by="flags"))


def test_what_counts_as_an_error_and_what_is_unknown(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=40))
    sheet = run / "audit-001-reader-1.xlsx"
    book = openpyxl.load_workbook(sheet)
    cases = book["Cases"]
    at = {cell.value: cell.column for cell in cases[HEADER]}
    plans = [
        {"gxr_review_status": "approved"},
        {"gxr_review_status": "approved", "gxr_review_wrong_location_insignificant": 2},
        {"gxr_review_status": "approved", "gxr_review_wrong_location_significant": 1},
        {"gxr_review_status": "approved_with_edits", "gxr_review_text": "Better."},
        {
            "gxr_review_status": "approved_with_edits",
            "gxr_review_text": "Better.",
            "gxr_review_missing_finding_significant": 0,
        },
        {"gxr_review_status": "rejected"},
    ]
    for row, plan in enumerate(plans, start=FIRST):
        for name, value in plan.items():
            cases.cell(row, at[name], value)
    book.save(sheet)
    taken(run, sheet)
    found = summarise(RunReader(run))
    assert (found.whole.read, found.whole.erroneous, found.whole.unknown) == (6, 2, 1)
    assert found.whole.rate == pytest.approx(2 / 5)
    assert found.kinds == {"wrong_location": 1, "rejected, no kind given": 1}
    assert found.flags["any flag"].flagged == 5
    assert found.flags["any flag"].recall == 1


def test_reviews_of_other_rows_and_of_earlier_texts_do_not_count(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=10))
    inside = {row.key.row_id for row in audits_of(run)[0].rows}
    outside = work.folder / "all.xlsx"
    work.gxr("export", "outputs/j", "--to", "all.xlsx")
    read(outside, "Reader", set())
    taken(run, outside)
    record = run / "reviews/audit-001.json"
    content = json.loads(record.read_text())
    content["rows"][0]["judged_sha256"] = "0" * 64
    record.write_text(json.dumps(content))
    found = summarise(RunReader(run))
    assert (found.whole.read, found.elsewhere, found.changed) == (9, ROWS - len(inside), 1)


def test_a_run_whose_texts_changed_is_not_drawn_from_again(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=10))
    record = run / "reviews/audit-001.json"
    content = json.loads(record.read_text())
    content["frame"]["sha256"] = "0" * 64
    record.write_text(json.dumps(content))
    with pytest.raises(RunError, match="have changed since the earlier draw"):
        export_audit(RunReader(run), AuditChoice(rows=10))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: json.dumps({**content, "rows": [{"row_id": 5}]}),
        lambda content: json.dumps({**content, "strata": []}),
        lambda content: json.dumps({**content, "rows": content["rows"] * 2}),
        lambda content: json.dumps({**content, "by": "moon"}),
        lambda content: json.dumps({**content, "created_at": 7}),
        lambda content: json.dumps({**content, "seed": "x"}),
        lambda content: json.dumps({**content, "strata": [{"name": "all", "rows": 2**52}]}),
        lambda content: "[" * 100_000,
        lambda content: json.dumps({**content, "rows": [{**content["rows"][0], "row_id": "\ud800"}]}),
    ],
)
def test_a_damaged_record_is_one_message(work, damage):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=10))
    record = run / "reviews/audit-001.json"
    record.write_text(damage(json.loads(record.read_text())))
    with pytest.raises(RunError, match="The record of an audit is damaged"):
        summarise(RunReader(run))
    assert work.gxr("status", "outputs/j").returncode == 0, "nothing else reads it"


def test_a_record_of_a_later_version_is_refused(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=10))
    record = run / "reviews/audit-001.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 2}))
    with pytest.raises(LaterVersion):
        summarise(RunReader(run))


def test_without_a_draw_reviews_say_nothing_about_other_rows(work):
    failed = work.gxr("review", "summary", "outputs/j", expect=2)
    assert "--audit 150" in failed.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", "0"], "--seed needs --audit"),
        (["--blind"], "--blind needs --audit"),
        (["--audit", "5", "--format", "csv"], "leave out --format"),
        (["--audit", "5", "--overlap", "6"], "--overlap is more than --audit"),
        (["--audit", "81"], "Only 80 generated rows"),
    ],
)
def test_options_that_do_not_go_together(work, options, said):
    assert said in work.gxr("export", "outputs/j", *options, expect=2).stderr


def test_two_readers_may_import_at_once(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=40, readers=2, overlap=10))
    sheets = [run / f"audit-001-reader-{number}.xlsx" for number in (1, 2)]
    for number, sheet in enumerate(sheets):
        read(sheet, f"Reader {number}", set())
    threads = [threading.Thread(target=taken, args=(run, sheet)) for sheet in sheets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = summarise(RunReader(run))
    assert found.whole.read == 40
    assert found.shared == found.agreed == 10
    assert found.alpha is None, "all said the same"


def test_two_spellings_of_a_name_are_one_reader(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=20))
    sheet = run / "audit-001-reader-1.xlsx"
    ids = read(sheet, "Dr. Ray", set())
    book = openpyxl.load_workbook(sheet)
    at = {cell.value: cell.column for cell in book["Cases"][HEADER]}
    for row in range(FIRST, FIRST + 10):
        book["Cases"].cell(row, at["gxr_reviewer"], "dr.  ray")
    book.save(sheet)
    taken(run, sheet)
    assert [*summarise(RunReader(run)).readers.values()] == [(len(ids), 0)]


def test_counts_without_a_verdict_count_and_a_comment_alone_does_not(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=20))
    sheet = run / "audit-001-reader-1.xlsx"
    book = openpyxl.load_workbook(sheet)
    at = {cell.value: cell.column for cell in book["Cases"][HEADER]}
    cells = [("missing_finding_significant", 1), ("missing_finding_significant", 0), ("comment", "Later.")]
    for row, (name, value) in enumerate(cells, start=FIRST):
        book["Cases"].cell(row, at[f"gxr_review_{name}"], value)
        book["Cases"].cell(row, at["gxr_reviewer"], "Reader")
    book.save(sheet)
    taken(run, sheet)
    found = summarise(RunReader(run))
    assert (found.whole.read, found.whole.erroneous, found.whole.unknown) == (2, 1, 0)


def test_if_every_row_has_a_flag_or_template_its_figure_is_the_rate(work):
    """Unknown rows are left out of both, in the same way."""
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=60, by="template"))
    findings: list[Finding] = ["unknown"] * 10 + ["erroneous"] * 4 + ["good"] * 46
    readings = [
        Reading(row._replace(stratum="ab"[at >= 30]), {"R": finding}, frozenset(), frozenset({"refusal"}), "")
        for at, (row, finding) in enumerate(zip(audits_of(run)[0].rows, findings, strict=True))
    ]
    assert _flag_qualities(readings, {"a": 100, "b": 300})["refusal"].precision == pytest.approx(0.2 * 100 / 400)
    assert _by_template(readings, {"a": 100, "b": 300})[""].rate == pytest.approx(0.2 * 100 / 400)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: {**content, "by": "flags", "strata": [{"name": "with flags", "rows": 80}]},
        lambda content: {**content, "rows": [{**row, "row_id": f"x{row['row_id']}"} for row in content["rows"]]},
    ],
)
def test_a_record_that_does_not_continue_the_first_is_damaged(work, change):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=50))
    content = json.loads((run / "reviews/audit-001.json").read_text())
    (run / "reviews/audit-002.json").write_text(json.dumps(change(content)))
    with pytest.raises(RunError, match="The record of an audit is damaged") as raised:
        summarise(RunReader(run))
    assert str(raised.value.where).endswith("audit-002.json")


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_a_record_that_is_no_plain_file_is_one_message(work, plant):
    record = run_of(work) / "reviews/audit-001.json"
    record.parent.mkdir()
    plant(record)
    for command in ("report", "export", "review"):
        words = {"report": [], "export": ["--audit", "5"], "review": ["summary"]}[command]
        arguments = [command, *words[:1], "outputs/j"] if command == "review" else [command, "outputs/j", *words]
        failed = work.gxr(*arguments, expect=None)
        assert failed.returncode in {2, 4}
        assert "Traceback" not in failed.stderr
        assert "audit-001.json" in failed.stderr


def test_a_row_removed_from_the_table_does_not_end_an_audit(work):
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=40))
    read(run / "audit-001-reader-1.xlsx", "Reader", set())
    taken(run, run / "audit-001-reader-1.xlsx")
    drawn = summarise(RunReader(run)).drawn
    work.table([(f"{number:03d}", f"Small effusion, film {number}.") for number in range(1, ROWS)])
    work.run()
    assert summarise(RunReader(run)).drawn == drawn
    work.gxr("report", "outputs/j")


def test_a_draw_from_an_unfinished_run_speaks_of_the_rows_that_it_had(tmp_path):
    work = Workplace(tmp_path)
    work.run(expect=4, faults={"crash_after": 30})
    run = run_of(work)
    work.gxr("export", "outputs/j", "--audit", "5", expect=2)
    work.gxr("export", "outputs/j", "--audit", "5", "--partial")
    frame = sum(audits_of(run)[0].frame_rows.values())
    assert frame < 60
    read(run / "audit-001-reader-1.xlsx", "Reader", set())
    taken(run, run / "audit-001-reader-1.xlsx")
    assert "now" not in work.gxr("review", "summary", "outputs/j").stdout
    work.gxr("report", "outputs/j")
    work.run()
    said = " ".join(work.gxr("review", "summary", "outputs/j").stdout.split())
    assert f"the run has 60 generated rows now; the figures are of the {frame} that were drawn from" in said
    assert "have changed since" in work.gxr("export", "outputs/j", "--audit", "5", expect=2).stderr
    (run / "results.parquet").unlink()
    assert work.gxr("review", "summary", "outputs/j").stdout
    assert "Traceback" not in work.gxr("report", "outputs/j", expect=None).stderr


def test_a_kill_between_workbooks_and_record_loses_no_reading(work):
    """The same command draws the same rows again, and a workbook that was filled in meanwhile is kept."""
    run = run_of(work)
    export_audit(RunReader(run), AuditChoice(rows=20))
    (run / "reviews/audit-001.json").unlink()  # as after a kill
    first = read(run / "audit-001-reader-1.xlsx", "Reader", set())
    work.gxr("export", "outputs/j", "--audit", "20")
    kept = [path for path in run.glob("*.xlsx") if path.name != "audit-001-reader-1.xlsx"]
    assert len(kept) == 1
    taken(run, *kept)
    assert summarise(RunReader(run)).whole.read == len(first) == 20
