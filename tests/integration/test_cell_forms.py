"""Cells of every type through the real command: prompts, workbook, CSV, report, terminal, and what runs again."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import os
import pty
import re
import subprocess
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import COMMAND, Workplace

from gxr_batch.rows import ids, table_reader

HEAD = "path = 't.parquet'\nid_column = 'key'\n"
SECTIONS = "[prompt]\ntemplate = 'own.md.j2'\n[engine]\nkind = 'echo'\n"
ACCESSIONS = [2**60 + 1, 2**60 + 2]
COLUMNS = {
    "key": pa.array([b"A", b"B"]),
    "findings": pa.array([["Small effusion", None, "nodule"], ["Clear lungs"]], pa.list_(pa.string())),
    "size": pa.array([2.3, 4.7], pa.float32()),
    "note": pa.array(["plain", "red \x1b[31m"]),
    "sex": pa.array([b"F", b"M"]),
    "accession": pa.array(ACCESSIONS),
}


@pytest.fixture
def work(tmp_path):
    made = Workplace(tmp_path)
    made.job(SECTIONS, head=HEAD)
    (tmp_path / "own.md.j2").write_text("{{ findings }} of {{ size }} cm, {{ sex }}, {{ note }}.")
    pq.write_table(pa.table(COLUMNS), tmp_path / "t.parquet")
    return made


def prompts(work: Workplace) -> list[str]:
    return [re.sub(r"^\[echo [\d,]+\] ", "", row["gxr_text"]) for row in work.results()]


def test_a_cell_reads_the_same_in_prompt_workbook_csv_and_report(work):
    work.run()
    assert prompts(work) == [
        "Small effusion; nodule of 2.3 cm, F, plain.",
        "Clear lungs of 4.7 cm, M, red \x1b[31m.",
    ]
    for form in ("xlsx", "csv", "csv-plain", "jsonl"):
        work.gxr("export", "outputs/j", "--format", form)
    work.gxr("report", "outputs/j")
    folder = work.folder / "outputs/j"
    header, *rows = list(
        openpyxl.load_workbook(folder / "results.xlsx")["Cases"].iter_rows(min_row=3, values_only=True)
    )
    book = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["accession"] for row in book] == [str(one) for one in ACCESSIONS]
    assert [row["size"] for row in book] == [2.3, 4.7]
    assert [(row["key"], row["sex"]) for row in book] == [("A", "F"), ("B", "M")]
    assert book[0]["findings"] == '["Small effusion", null, "nodule"]'
    for name in ("results.csv", "results-plain.csv"):
        with (folder / name).open(encoding="utf-8-sig", newline="") as file:
            first, _ = csv.DictReader(file)
        assert (first["size"], first["sex"], first["accession"]) == ("2.3", "F", str(ACCESSIONS[0]))
    line = json.loads((folder / "results.jsonl").read_text().splitlines()[0])
    assert (line["size"], line["findings"]) == (2.3, ["Small effusion", None, "nodule"])
    packed = max(re.findall(r"[A-Za-z0-9+/=]{200,}", (folder / "report.html").read_text()), key=len)
    cases = json.loads(gzip.GzipFile(fileobj=io.BytesIO(base64.b64decode(packed))).read())
    shown = {column["name"]: column.get("values", [column.get("constant")] * 2) for column in cases["columns"]}
    assert (shown["size"], shown["sex"], shown["accession"]) == ([2.3, 4.7], ["F", "M"], list(map(str, ACCESSIONS)))


def test_a_cell_whose_form_in_prompts_changed_runs_again_on_resume_and_no_other(tmp_path, monkeypatch):
    """The first run has the hashes of the version before; whole numbers and texts are shown as they were."""
    from gxr_batch import load_job, run_job

    table = {"key": ["A", "B", "C"], "findings": ["x", "y", "z"], "size": pa.array([2.0, 2.3, None], pa.float32())}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    (tmp_path / "own.md.j2").write_text("{{ findings }}{% if size %} of {{ size }} cm{% endif %}")
    (tmp_path / "j.toml").write_text(f"name = 'j'\n[input]\n{HEAD}{SECTIONS}")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as before:
        for module in (ids, table_reader):
            before.setattr(module, "prompt_values", lambda cells, column: cells[column].to_pylist())
        before.setattr("gxr_batch.run.prepare.CELL_FORMS", "1")
        run_job(load_job(Path("j.toml")))
    first = {row["gxr_row_id"]: row for row in pq.read_table("outputs/j/results.parquet").to_pylist()}
    assert "2.299999952316284 cm" in first["B"]["gxr_text"]
    done = run_job(load_job(Path("j.toml")))
    assert done.progress.done == 1
    second = {row["gxr_row_id"]: row for row in pq.read_table("outputs/j/results.parquet").to_pylist()}
    assert second["B"]["gxr_text"].endswith("y of 2.3 cm")
    assert (second["A"], second["C"]) == (first["A"], first["C"])
    assert run_job(load_job(Path("j.toml"))).progress.done == 0


def test_a_struct_that_a_template_prints_is_refused_with_what_to_write(work):
    study = pa.array([{"text": "x"}, {"text": "y"}])
    pq.write_table(pa.table({**COLUMNS, "note": study}), work.folder / "t.parquet")
    for verb in ("check", "run"):
        done = work.gxr(verb, "j.toml", expect=2)
        assert "the column note holds structs, which cannot be printed as a whole" in done.stderr
        assert "{{ note.text }}" in done.stderr
    assert not (work.folder / "outputs").exists()


def test_a_comparison_of_text_with_a_number_is_refused_in_a_new_run_and_reported_in_one_that_has_begun(work):
    source = "{{ findings }}{% if note == 1 %}!{% endif %}"
    work.job("[prompt]\ntemplate = 'own.md.j2'\n[engine]\nkind = 'echo'\n", head="path = 'f.csv'\nid_column = 'key'\n")
    (work.folder / "f.csv").write_text("key,findings,note\nA,clear,1\n")
    (work.folder / "own.md.j2").write_text(source)
    for verb in ("check", "run"):
        done = work.gxr(verb, "j.toml", expect=2)
        assert "compares or calculates note with a number" in done.stderr
        assert "write note | number" in done.stderr
    assert not (work.folder / "outputs").exists()
    (work.folder / "outputs/j").mkdir(parents=True)
    (work.folder / "f.csv").rename(work.folder / "text.csv")
    pq.write_table(pa.table({"key": ["A"], "findings": ["clear"], "note": [1]}), work.folder / "f.parquet")
    work.job(SECTIONS, head="path = 'f.parquet'\nid_column = 'key'\n")
    work.run()
    pq.write_table(
        pa.table({"key": ["A", "B"], "findings": ["clear", "x"], "note": ["1", "1"]}), work.folder / "f.parquet"
    )
    assert "compares or calculates note with a number" in work.run().stderr
    assert "compares or calculates note with a number" in work.gxr("check", "j.toml").stderr


def test_the_words_for_missing_values_are_counted_by_check_and_run(work):
    work.job("[prompt]\ntemplate = 'basic'\n[engine]\nkind = 'echo'\n", head="path = 'f.csv'\nid_column = 'key'\n")
    (work.folder / "f.csv").write_text("key,findings\nA,clear\nB,NA\nC,unknown\n")
    for verb in ("check", "run"):
        said = work.gxr(verb, "j.toml").stderr
        assert 'findings 2 (NA 1, unknown 1); input.null_values = "common" makes them missing' in said
        assert "WARNING: findings is required, and in 2 rows it is only such a word" in said
    done = work.gxr("run", "j.toml", "--set", "input.null_values=common", "--fresh", expect=3)
    assert "such a word" not in done.stderr
    assert [row["gxr_status"] for row in work.results()] == ["ok", "failed", "failed"]


@pytest.mark.parametrize("verb", [["check", "j.toml"], ["templates", "render", "j.toml"]])
def test_prompts_never_control_a_terminal(work, verb):
    leader, follower = pty.openpty()
    try:
        subprocess.run([*COMMAND, *verb], cwd=work.folder, stdout=follower, stderr=follower, check=True, timeout=120)
        os.close(follower)
        shown = b""
        while piece := _piece(leader):
            shown += piece
    finally:
        os.close(leader)
    assert b"\x1b" not in shown
    assert b"red \\x1b[31m." in shown


def _piece(leader: int) -> bytes:
    try:
        return os.read(leader, 65_536)
    except OSError:  # Linux reports the end of a terminal as an error
        return b""


def test_notices_and_errors_never_control_a_terminal_either(work):
    pq.write_table(pa.table({"key": ["A"], "fin\x1b[31mdings": ["x"]}), work.folder / "t.parquet")
    done = work.gxr("check", "j.toml", expect=2)
    assert "\x1b" not in done.stderr
