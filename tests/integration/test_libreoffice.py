"""Round trip through a real LibreOffice, in which a script fills in, sorts and saves the workbook."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from form_runs import FORM, run_with_form
from places import SUPPORT
from running import Workplace

from gxr_batch import read_results
from gxr_batch.audit.summary import summarise
from gxr_batch.export import Choice, export
from gxr_batch.export.audit_workbooks import AuditChoice, export_audit
from gxr_batch.forms import composed
from gxr_batch.ledger import RunReader
from gxr_batch.review.import_reviews import import_reviews

PYTHON = "/usr/bin/python3"
EDIT = SUPPORT / "office" / "edit.py"
CELLS = {
    "C1": "=1+1",
    "C2": "@SUM(A1) and _x000D_ as text",
    "C3": "two\nlines, \"quoted\"; 'single'",
    "C4": "التهاب رئوي 🫁",
    "C5": "  00123 1-2 TRUE",
    "00123": "an id that looks like a number",
}
EDITS = {
    "C1": {"gxr_review_status": "approved", "gxr_review_quality": 5, "gxr_reviewed_at": "2026-01-31"},
    "C3": {
        "gxr_review_status": "approved_with_edits",
        "gxr_review_text": "A corrected text,\nof two lines; with signs: \"=1\" 'x'.",
        "gxr_review_wrong_location_insignificant": 1,
        "gxr_reviewer": "Dr B",
    },
    "C4": {"gxr_review_status": "rejected", "gxr_review_comment": "=not a formula?"},
    "00123": {"gxr_review_status": "approved"},
}


def office() -> str:
    """Return the soffice command, or skip the test and name what is missing."""
    soffice = shutil.which("soffice")
    if soffice is None:
        pytest.skip("LibreOffice is not installed (apt.txt: libreoffice-calc-nogui)")
    if subprocess.run([PYTHON, "-c", "import uno"], capture_output=True, check=False).returncode:
        pytest.skip("LibreOffice's Python bridge is not installed (apt.txt: python3-uno)")
    return soffice


def edited(soffice: str, workbook: Path, folder: Path, edits: Mapping[str, Mapping[str, Any]] = EDITS) -> None:
    """Open the workbook in LibreOffice, fill it in, sort it and save it."""
    pipe = f"gxr{uuid.uuid4().hex}"
    home = (folder / "profile").absolute().as_uri()
    (folder / "edits.json").write_text(json.dumps(edits))
    arguments = ["--headless", "--norestore", f"-env:UserInstallation={home}", f"--accept=pipe,name={pipe};urp"]
    process = subprocess.Popen([soffice, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        script = [PYTHON, str(EDIT), pipe, str(workbook), str(folder / "edits.json"), str(folder)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory):
    """A workplace with a run, and its workbook as saved by LibreOffice."""
    soffice = office()
    work = Workplace(tmp_path_factory.mktemp("office"))
    work.table(list(CELLS.items()))
    work.job("[prompt]\ntemplate = 'basic'\n[engine]\nkind = 'echo'\n")
    work.run()
    path = export(RunReader(work.folder / "outputs/j"), "xlsx", None, Choice()).path
    edited(soffice, path, work.folder)
    return work


@pytest.mark.parametrize("name", ["reviewed.xlsx", "reviewed-Cases.csv"])
def test_reviews_saved_by_libreoffice_are_imported(reviewed, name):
    run = reviewed.folder / "outputs/j"
    for path in (run / "reviews").glob("*.parquet"):
        path.unlink()  # so that each kind of file is imported alone
    done = import_reviews(RunReader(run), [reviewed.folder / name], "Dr A")
    assert done.refused == []
    assert (done.taken, done.unreviewed) == (4, 2)
    frame = read_results(run).set_index("gxr_row_id")
    assert frame.loc["C1", "gxr_review_status"] == "approved"
    assert frame.loc["C1", "gxr_review_quality"] == 5
    assert frame.loc["C1", "gxr_reviewed_at"] == date(2026, 1, 31)
    assert frame.loc["C3", "gxr_review_text"] == EDITS["C3"]["gxr_review_text"]
    assert frame.loc["C3", "gxr_reviewer"] == "Dr B"
    assert frame.loc["C3", "gxr_review_wrong_location_insignificant"] == 1
    assert frame.loc["C4", "gxr_review_comment"] == "=not a formula?"
    assert frame.loc["00123", "gxr_review_status"] == "approved"
    assert frame.loc["C2", "gxr_review_status"] == "unreviewed"


def test_the_sheet_can_be_printed(reviewed):
    assert (reviewed.folder / "reviewed.pdf").read_bytes().startswith(b"%PDF")


def test_an_audit_read_in_libreoffice_is_summed_up(tmp_path):
    soffice = office()
    work = Workplace(tmp_path)
    work.table(list(CELLS.items()))
    work.job("[prompt]\ntemplate = 'basic'\n[engine]\nkind = 'echo'\n")
    work.run()
    run = work.folder / "outputs/j"
    drew = export_audit(RunReader(run), AuditChoice(rows=len(CELLS), blind=True))
    edited(soffice, drew.workbooks[0].path, work.folder)
    done = import_reviews(RunReader(run), [work.folder / "reviewed.xlsx"], "Dr A")
    assert done.refused == []
    found = summarise(RunReader(run))
    assert (found.whole.read, found.whole.erroneous, found.whole.unknown) == (4, 1, 0)


SECTION_EDITS = {
    "a": {
        "gxr_review_status": "approved_with_edits",
        "gxr_review_section_impression": 'Left basal consolidation;\nwith signs: "=1".',
        "gxr_review_section_key_findings": "- Consolidation\n- =no effusion\n- A third item",
        "gxr_review_section_difficulty": "hard",
        "gxr_review_section_grade": "4.25",
    },
    "b": {"gxr_review_status": "approved_with_edits", "gxr_review_section_key_findings": "- One item, typed"},
    "c": {"gxr_review_status": "approved"},
}


@pytest.fixture(scope="module")
def reviewed_by_section(tmp_path_factory):
    """The folder with a run that has a form, and its workbook as saved by LibreOffice."""
    soffice = office()
    folder = tmp_path_factory.mktemp("sections")
    run = run_with_form(folder / "run")
    edited(soffice, export(RunReader(run), "xlsx", None, Choice()).path, folder, SECTION_EDITS)
    return folder


@pytest.mark.parametrize("name", ["reviewed.xlsx", "reviewed-Cases.csv"])
def test_sections_corrected_in_libreoffice_become_the_whole_text(reviewed_by_section, name):
    run = reviewed_by_section / "run"
    for path in (run / "reviews").glob("*.parquet"):
        path.unlink()  # so that each kind of file is imported alone
    done = import_reviews(RunReader(run), [reviewed_by_section / name], "Dr A")
    assert done.refused == []
    assert done.taken == 3
    frame = read_results(run).set_index("gxr_row_id")
    first = SECTION_EDITS["a"]["gxr_review_section_impression"]
    items = ["Consolidation", "=no effusion", "A third item"]
    assert frame.loc["a", "gxr_review_text"] == composed(FORM, [first, items, "It is pneumonia", "hard", 4.25])
    same = ["Right basal consolidation.", ["One item, typed"], "It is pneumonia", "easy", 3.5]
    assert frame.loc["b", "gxr_review_text"] == composed(FORM, same)
    assert frame.loc["c", "gxr_review_status"] == "approved"
