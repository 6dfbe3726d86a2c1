"""Tables of every kind through the command: the same cases in every form, resumed across forms, and emptied ones."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openpyxl import Workbook
from running import Workplace

from gxr_batch.errors import TableError
from gxr_batch.library import load_job, run_job

ROWS = [{"case_id": "A1", "findings": "Clear lungs"}, {"case_id": "A2", "findings": "Small effusion"}]
CSV = "case_id,findings\nA1,Clear lungs\nA2,Small effusion\n"


@pytest.fixture
def work(tmp_path):
    return Workplace(tmp_path)


def made(folder, form):
    """Write the same two rows in one form and return the input path."""
    match form:
        case "jsonl":
            (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case "csv.gz":
            (folder / "t.csv.gz").write_bytes(gzip.compress(CSV.encode()))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), folder / "t.parquet")
        case "xlsx":
            book = Workbook()
            for row in (list(ROWS[0]), *(list(row.values()) for row in ROWS)):
                book.active.append(row)
            book.save(folder / "t.xlsx")
        case "folder":
            for row in ROWS:
                part = folder / "t" / f"case_id={row['case_id']}"
                part.mkdir(parents=True)
                pq.write_table(pa.table({"findings": [row["findings"]]}), part / "part-0.parquet")
            return "t"
        case _:
            (folder / "t.csv").write_text(CSV)
            return "t.csv"
    return f"t.{form}"


def test_a_run_is_resumed_by_content_whatever_the_form_of_its_table(work):
    path = made(work.folder, "csv")
    work.run("--set", f"input.path={path}")
    before = {row["gxr_row_id"]: row["gxr_text"] for row in work.results()}
    for form in ("jsonl", "csv.gz", "parquet", "xlsx", "folder"):
        path = made(work.folder, form)
        done = work.run_json("--set", f"input.path={path}")
        assert (done["ok"], done["generated_now"]) == (2, 0), form
        assert {row["gxr_row_id"]: row["gxr_text"] for row in work.results()} == before
        assert work.run_json("--set", f"input.path={path}")["generated_now"] == 0


def test_a_table_that_became_empty_stops_the_job_and_keeps_its_results(work):
    work.table(2)
    work.run()
    results = (work.folder / "outputs/j/results.parquet").read_bytes()
    work.table(0)
    for verb in ("run", "check"):
        done = work.gxr(verb, "j.toml", expect=2)
        assert "The table has no rows; the last time this ran it had 2." in done.stderr
        assert "--allow-empty" in done.stderr
    assert (work.folder / "outputs/j/results.parquet").read_bytes() == results
    assert sorted(path.name for path in (work.folder / "outputs/j").glob("*.tmp*")) == []
    work.table(2)
    assert work.run_json()["generated_now"] == 0


def test_an_empty_table_can_be_accepted_and_the_rows_come_back(work):
    work.table(2)
    work.run()
    work.table(0)
    assert work.run_json("--allow-empty")["ok"] == 0
    assert work.results() == []
    assert work.run_json()["ok"] == 0
    work.table(2)
    done = work.run_json()
    assert (done["ok"], done["generated_now"]) == (2, 0)


def test_the_python_api_can_accept_an_empty_table(work, monkeypatch):
    monkeypatch.chdir(work.folder)
    work.table(2)
    run_job(load_job("j.toml"))
    work.table(0)
    with pytest.raises(TableError, match="no rows"):
        run_job(load_job("j.toml"))
    assert run_job(load_job("j.toml"), allow_empty=True).counts.total == 0


def test_a_table_that_never_had_rows_is_no_error(work):
    work.table(0)
    assert work.run_json()["ok"] == 0


def test_changed_layout_keys_read_the_table_of_a_finished_run_again(work):
    (work.folder / "f.csv").write_text("case_id,findings\nA1,Clear\n")
    work.run()
    (work.folder / "f.csv").write_text("case_id,findings\nA0,x\n")
    keys = ("--set", 'input.column_names=["case_id","findings"]')
    assert work.run_json(*keys)["ok"] == 1
    assert work.run_json(*keys, "--set", "input.skip_lines=1")["ok"] == 1
