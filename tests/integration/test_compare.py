"""Two runs over the same rows: what `gxr-batch compare` and `report --against` count, leave out and say."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import Workplace

from gxr_batch.audit.comparison import as_json, compare_runs
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.reviews import add_reviews, judged_sha256, one_import
from gxr_batch.records import ERROR_COUNTS, Key, Review
from gxr_batch.report import report

ROWS = 40
JOB = "[prompt]\ntemplate = 'basic'\n[engine]\nkind = 'echo'\n[run]\noutput = 'outputs/a'\n"


def rows(changed: str = "") -> list[tuple[str, str, str]]:
    return [
        (f"C{number:02}", f"Small effusion{changed if number == 7 else ''}, film {number}.", str(20 + number))
        for number in range(ROWS)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Run a; b with another template that uses the age too, and one changed row; c with two samples of each row."""
    work = Workplace(tmp_path_factory.mktemp("compare"))
    header = ("case_id", "findings", "age")
    work.table(rows(), header)
    work.job(JOB)
    work.run()
    work.run("--set", "sampling.samples_per_row=2", "--output", "outputs/c")
    work.table(rows(" on the left"), header)
    work.run("--set", "prompt.template=clinical_case", "--output", "outputs/b", "--limit", "30")
    return work.folder


@pytest.fixture
def work(tmp_path: Path, made: Path) -> Workplace:
    return Workplace.copy_of(made, tmp_path / "w")


def compared(work: Workplace, this: str, other: str) -> dict:
    return json.loads(work.gxr("compare", f"outputs/{this}", f"outputs/{other}", "--json").stdout)


def change(path: Path, name: str, cell) -> None:
    """Rewrite a column of a run's only part; `cell` gets row id, sample and the old value."""
    (part,) = path.glob("parts/part-*.parquet")
    table = pq.read_table(part)
    at = table.schema.names.index(name)
    values = [
        cell(row_id, sample, value)
        for row_id, sample, value in zip(
            *(table[one].to_pylist() for one in ("gxr_row_id", "gxr_sample", name)), strict=True
        )
    ]
    field = table.schema.field(at)
    table = table.set_column(at, field, pa.array(values, field.type))
    pq.write_table(table, part, write_page_checksum=True)


def judge(run: Path, verdicts: dict[str, str]) -> None:
    """Import one reviewer's verdicts; "significant" counts an error without a verdict."""
    texts = {one["gxr_row_id"]: one for table in RunReader(run).finished() for one in table.to_pylist()}
    reviews = []
    for row_id, verdict in verdicts.items():
        row = texts[row_id]
        errors = [None] * len(ERROR_COUNTS)
        if verdict == "significant":
            errors[ERROR_COUNTS.index("missing_finding_significant")] = 1
        status = "unreviewed" if verdict == "significant" else verdict
        text = "corrected" if verdict == "approved_with_edits" else None
        digest = judged_sha256(row["gxr_text"], row["gxr_prompt_sha256"])
        key = Key(row_id, row["gxr_sample"])
        reviews.append(Review(key, digest, status, "Ann", date(2026, 1, 2), None, tuple(errors), text, None))
    with one_import(run):
        add_reviews(run, reviews, {})


def test_two_templates_are_compared_over_the_rows_whose_cells_are_the_same(work):
    before = {path: path.stat().st_mtime_ns for path in work.folder.rglob("*")}
    said = work.gxr("compare", "outputs/b", "outputs/a").stdout
    assert {path: path.stat().st_mtime_ns for path in work.folder.rglob("*")} == before, "it writes nothing"
    assert max(map(len, said.splitlines())) <= 80
    assert said.startswith("29 rows compared; left out: 1 with other cells, 10 only in the other\n")
    assert "bootstrap over rows; p: McNemar's exact test" in said
    found = compared(work, "b", "a")
    assert found["runs"] == {"this": "outputs/b", "other": "outputs/a"}
    assert found["left_out"] == {"other_cells": 1, "without_text": 0, "only_this": 0, "only_other": 10}
    characters = found["means"]["characters"]
    texts = [{row["gxr_row_id"]: row["gxr_text"] for row in work.results(f"outputs/{name}")} for name in "ba"]
    both = [row_id for row_id in texts[0] if row_id != "C07"]
    longer = sum(len(texts[0][row_id]) - len(texts[1][row_id]) for row_id in both) / len(both)
    assert characters["difference"] == pytest.approx(longer)
    assert 0 < characters["low"] <= longer <= characters["high"]


def test_flags_in_one_run_only_are_counted_and_tested(work):
    run = work.folder / "outputs/b"
    change(run, "gxr_flags", lambda row_id, sample, old: ["side_flipped"] if row_id < "C10" else [])
    change(work.folder / "outputs/a", "gxr_flags", lambda row_id, sample, old: ["side_flipped"] * (row_id == "C01"))
    flags = compared(work, "b", "a")["flags"]
    assert flags["side_flipped"] == flags["any flag"]
    assert flags["side_flipped"] == {"this": 9, "other": 1, "only_this": 8, "only_other": 0, "p": 2 / 2**8}
    assert compared(work, "a", "b")["flags"]["side_flipped"]["only_other"] == 8
    assert "side_flipped" in (said := work.gxr("compare", "outputs/b", "outputs/a").stdout)
    assert "0.0078" in said


def test_rows_without_a_text_in_one_run_are_left_out(work):
    change(work.folder / "outputs/a", "gxr_text", lambda row_id, sample, old: None if row_id < "C03" else old)
    found = compared(work, "b", "a")
    assert (found["compared"]["rows"], found["left_out"]["without_text"]) == (26, 3)


def test_what_reviewers_found_is_compared_where_both_texts_were_read(work):
    for name in "ba":
        change(work.folder / "outputs" / name, "gxr_flags", lambda row_id, sample, old: [])
    judge(work.folder / "outputs/b", {f"C{number:02}": "approved" for number in range(6)})
    theirs = {
        "C00": "rejected",
        "C01": "significant",
        "C02": "approved",
        "C03": "approved_with_edits",
        "C20": "rejected",
    }
    judge(work.folder / "outputs/a", theirs)
    found = compared(work, "b", "a")
    assert found["erroneous"] == {
        "read": 3, "unknown": 1, "this": 0, "other": 2, "only_this": 0, "only_other": 2, "p": 0.5
    }  # fmt: skip
    assert list(found["flags"]) == ["any flag"], "what reviews add is no flag of the text"
    said = work.gxr("compare", "outputs/b", "outputs/a").stdout
    assert "an error (of 3 read)" in said
    assert "note: 1 text read in both runs not counted" in said


def test_of_several_samples_the_row_is_the_unit(work):
    change(
        work.folder / "outputs/c", "gxr_flags", lambda row_id, sample, old: ["token_limit"] if row_id < "C10" else []
    )
    shutil.copytree(work.folder / "outputs/c", work.folder / "outputs/d")
    change(
        work.folder / "outputs/d",
        "gxr_flags",
        lambda row_id, sample, old: old if (row_id, sample) == ("C00", 2) else [],
    )
    found = compared(work, "c", "d")
    assert (found["compared"]["rows"], found["compared"]["texts"]) == (ROWS, 2 * ROWS)
    assert found["flags"]["token_limit"] == {
        "this": 20, "other": 1, "only_this": 10, "only_other": 0, "p": pytest.approx(2 / 2**10)
    }  # fmt: skip
    said = work.gxr("compare", "outputs/c", "outputs/d").stdout
    assert said.startswith("80 texts of 40 rows compared; left out: none\n")
    found = compared(work, "c", "a")
    assert (found["compared"]["texts"], found["left_out"]["only_this"]) == (ROWS, ROWS)


def test_the_report_has_the_same_figures(work):
    change(
        work.folder / "outputs/b", "gxr_flags", lambda row_id, sample, old: ["side_flipped"] if row_id < "C05" else []
    )
    change(work.folder / "outputs/a", "gxr_flags", lambda row_id, sample, old: [])
    found = as_json(compare_runs(*(RunReader(work.folder / "outputs" / name) for name in "ba")))
    target = work.folder / "page.html"
    readers = [RunReader(work.folder / "outputs" / name) for name in "ba"]
    report(*readers, target, include_held=False)
    page = target.read_text()
    assert "29 have different texts, 0 have no text in one run, 1 have other cells." in page
    cells = "".join(f"<td>{cell}</td>" for cell in (5, 0, 5, 0, "0.062"))
    assert f'<th scope="row">side_flipped</th>{cells}' in page
    assert f"<td>{found['means']['characters']['difference']:+,.2f}</td>" in page
    assert "Intervals: 95%, bootstrap over rows" in page


def test_runs_without_a_common_row_are_refused(work):
    work.table([("X1", "One.", "1")], ("case_id", "findings", "age"))
    work.run("--output", "outputs/x")
    done = work.gxr("compare", "outputs/a", "outputs/x", expect=2)
    assert "no finished row in common" in done.stderr
    assert "There is no run here." in work.gxr("compare", "outputs/a", "outputs/no", expect=2).stderr


def test_a_damaged_part_is_left_out_and_said(work):
    (part,) = (work.folder / "outputs/b").glob("parts/part-*.parquet")
    whole = part.read_bytes()
    shutil.copy(part, part.with_name("part-00000002.parquet"))
    part.with_name("part-00000002.parquet").write_bytes(whole[: len(whole) // 2])
    said = work.gxr("compare", "outputs/b", "outputs/a").stdout
    assert "note: 1 damaged part of this run left out" in said
    (work.folder / "outputs/b/input.parquet").write_bytes(b"no table")
    done = work.gxr("compare", "outputs/a", "outputs/b", expect=2)
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.stderr
