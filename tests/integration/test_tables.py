"""Tables of every kind through the command: the same cases in every form, resumed across forms."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openpyxl import Workbook
from running import Workplace

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


def test_changed_layout_keys_read_the_table_of_a_finished_run_again(work):
    (work.folder / "f.csv").write_text("case_id,findings\nA1,Clear\n")
    work.run()
    (work.folder / "f.csv").write_text("case_id,findings\nA0,x\n")
    keys = ("--set", 'input.column_names=["case_id","findings"]')
    assert work.run_json(*keys)["ok"] == 1
    assert work.run_json(*keys, "--set", "input.skip_lines=1")["ok"] == 1
