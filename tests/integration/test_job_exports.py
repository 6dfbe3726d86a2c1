"""`[export] formats`: exports that a finished run writes by itself, and how `status` lists outdated ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

import pytest
from running import Workplace

from gxr_batch.export import FORMATS
from gxr_batch.job.schema import ExportFormat


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    made = Workplace(tmp_path)
    made.job("[engine]\nkind = 'echo'\n[export]\nformats = ['xlsx', 'csv', 'report']\n")
    return made


def status(work: Workplace) -> dict:
    (found,) = json.loads(work.gxr("status", "outputs/j", "--json").stdout)
    return found


def test_the_job_file_accepts_every_format():
    assert set(get_args(ExportFormat)) == {*FORMATS, "report"}


def test_a_finished_run_writes_the_exports_of_its_job(work):
    done = work.run()
    assert "results.xlsx: 60 rows" in done.stderr
    assert (work.folder / "outputs/j/results.xlsx").stat().st_size > 0
    assert (work.folder / "outputs/j/results.csv").stat().st_size > 0
    assert "report.html: 60 cases of 60 rows" in done.stderr


def test_an_unfinished_run_writes_no_exports(work):
    work.run("--set", "run.max_failed=1", expect=5, faults={"fail_every": 1})
    assert not (work.folder / "outputs/j/results.xlsx").exists()


def test_a_second_run_writes_only_missing_or_outdated_exports(work):
    work.run()
    paper, table = (work.folder / "outputs/j" / name for name in ("results.xlsx", "results.csv"))
    paper.unlink()
    written = table.stat().st_mtime_ns
    assert "nothing left to do" in work.run().stdout
    assert paper.exists()
    assert table.stat().st_mtime_ns == written
    work.table(61)
    work.run()
    assert "C60" in table.read_text(encoding="utf-8-sig")


def test_an_export_that_fails_is_reported_and_does_not_fail_the_run(work):
    work.run("--set", "export.formats=[]")
    (work.folder / "outputs/j/results.xlsx").mkdir()
    done = work.run()
    assert "The export as xlsx failed; the results are safe." in done.stderr
    assert "results.csv: 60 rows" in done.stderr
    assert len(work.results()) == 60


def test_status_names_exports_that_are_older_than_the_results(work):
    work.run()
    assert status(work)["outdated_exports"] == []
    work.table(61)
    work.run("--set", "export.formats=[]")
    assert status(work)["outdated_exports"] == ["report.html", "results.csv", "results.xlsx"]
    assert "outdated   report.html, results.csv" in work.gxr("status", "outputs/j").stdout


def test_an_outdated_workbook_that_was_saved_again_stays_outdated_and_is_kept(work):
    work.run()
    paper = work.folder / "outputs/j/results.xlsx"
    work.table(61)
    work.run("--set", "export.formats=[]")
    saved = paper.read_bytes() + b"a reviewer's"
    paper.write_bytes(saved)  # newer than the results now
    assert "results.xlsx" in status(work)["outdated_exports"]
    work.run("--set", "export.formats=['xlsx']")
    (kept,) = paper.parent.glob("results.before-*.xlsx")
    assert kept.read_bytes() == saved
    assert "results.xlsx" not in status(work)["outdated_exports"]


def test_in_a_copy_with_new_times_exports_are_outdated_and_none_is_lost(work):
    work.run()
    folder = work.folder / "outputs/j"
    written = (folder / "results.xlsx").read_bytes()
    for path in folder.rglob("*"):  # as after cp -r
        if path.is_file():
            os.utime(path)
    assert status(work)["outdated_exports"] == ["report.html", "results.csv", "results.xlsx"]
    work.run()
    (kept,) = folder.glob("results.before-*.xlsx")
    assert kept.read_bytes() == written
    assert status(work)["outdated_exports"] == []


def test_a_failed_export_is_reported_with_quiet_too(work):
    work.run("--set", "export.formats=[]")
    (work.folder / "outputs/j/results.xlsx").mkdir()
    done = work.run("--quiet", "--json")
    assert "The export as xlsx failed" in done.stderr
    assert json.loads(done.stdout)["exports"] == {"xlsx": "failed", "csv": "written", "report": "written"}


def test_a_comparison_replaces_no_edited_report_and_the_jobs_report_replaces_the_comparison(work):
    work.run()
    work.run("--output", "outputs/other")
    page = work.folder / "outputs/j/report.html"
    page.write_text("edited")
    done = work.gxr("report", "outputs/j", "--against", "outputs/other")
    (kept,) = page.parent.glob("report.before-*.html")
    assert kept.name in done.stdout
    assert kept.read_text() == "edited"
    assert status(work)["outdated_exports"] == []
    compared = page.read_bytes()
    work.run()
    assert page.read_bytes() != compared
    assert list(page.parent.glob("report.before-*.html")) == [kept]
