"""Exports for pipelines hold every cell verbatim, and no export replaces another kind of file."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import openpyxl
import pyarrow.parquet as pq
import pytest
from running import Workplace

import gxr_batch.export as export_module
from gxr_batch.errors import RunError
from gxr_batch.export import FORMATS, Choice, export
from gxr_batch.ledger import RunReader
from gxr_batch.records import DISCLAIMER, review_schema

CELLS = ["=1+1", "a,b;c", 'say "x"', "two\nlines", "a segment\ra segment", "  blanks  ", "漢字 🫁", "-5", "\u2028"]


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    made = Workplace(tmp_path)
    made.table([(f"C{number}", cell) for number, cell in enumerate(CELLS)])
    made.job("[engine]\nkind = 'echo'\n")
    made.faults = {"fail_containing": "two"}
    made.run(expect=3)
    return made


def exported(work: Workplace, form: str, name: str) -> Path:
    work.gxr("export", "outputs/j", "--format", form)
    return work.folder / "outputs/j" / name


def test_plain_csv_is_verbatim(work):
    with exported(work, "csv-plain", "results-plain.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["findings"] for row in rows] == CELLS
    assert [row["gxr_text"] or None for row in rows] == [row["gxr_text"] for row in work.results()]


def test_json_lines_have_every_result_column(work):
    lines = exported(work, "jsonl", "results.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    expected = work.results()
    assert [list(row) for row in rows] == [[*row, *review_schema().names] for row in expected]
    assert [row["findings"] for row in rows] == CELLS
    assert rows[0]["gxr_started_at"] == expected[0]["gxr_started_at"].isoformat()


def test_parquet_has_the_results_with_their_types_and_metadata(work):
    path = exported(work, "parquet", "results-export.parquet")
    whole = work.folder / "outputs/j/results.parquet"
    stored = pq.read_table(whole)
    assert pq.read_table(path).select(stored.column_names).equals(stored)
    assert pq.read_schema(path).metadata[b"gxr_disclaimer"].decode() == DISCLAIMER


def test_openai_batch_lines_are_named_by_row_id(work):
    text = exported(work, "openai-batch", "results-openai-batch.jsonl").read_text(encoding="utf-8")
    lines = {line["custom_id"]: line for line in map(json.loads, text.rstrip("\n").split("\n"))}
    assert list(lines) == [f"C{number}" for number in range(len(CELLS))]
    good, bad = lines["C0"], lines["C3"]
    body = good["response"]["body"]
    assert body["choices"][0]["message"]["content"] == work.results()[0]["gxr_text"]
    assert body["usage"]["completion_tokens"] == work.results()[0]["gxr_new_tokens"]
    assert body["metadata"]["disclaimer"] == DISCLAIMER
    assert good["error"] is None
    assert bad["response"] is None
    assert "fail rows like this one" in bad["error"]["message"]


def test_openai_batch_lines_of_several_samples_have_distinct_names(work):
    work.run("--set", "sampling.samples_per_row=2", expect=3)
    text = exported(work, "openai-batch", "results-openai-batch.jsonl").read_text(encoding="utf-8")
    names = [json.loads(line)["custom_id"] for line in text.rstrip("\n").split("\n")]
    assert names[:2] == ["C0/1", "C0/2"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("form", list(FORMATS))
def test_no_format_overwrites_the_runs_own_files(work, form, monkeypatch):
    monkeypatch.chdir(work.folder)
    names = (
        "outputs/j/results.parquet",
        "outputs/j/inflight.json",
        "outputs/j/parts/x",
        "outputs/j/reviews/x",
        "f.csv",
    )
    for name in names:
        with pytest.raises(RunError, match="Cannot write the file there"):
            export(RunReader(Path("outputs/j")), form, Path(name), Choice())


def test_the_message_names_the_option_to_use_instead(work):
    assert "--to" in work.gxr("export", "outputs/j", "--to", "f.csv", expect=2).stderr


def test_a_file_that_is_no_export_of_this_run_is_refused(work):
    work.run("--output", "outputs/other", expect=3)
    work.gxr("export", "outputs/other")
    (work.folder / "notes.csv").write_text("mine")
    shutil.copy(work.folder / "j.toml", work.folder / "outputs/j/j.toml")
    for name in ("outputs/other/results.xlsx", "j.toml", "outputs/j/j.toml", "notes.csv"):
        before = (work.folder / name).read_bytes()
        for verb in ("export", "report"):
            done = work.gxr(verb, "outputs/j", "--to", name, expect=2)
            assert "It exists and is no export of this run." in done.stderr
            assert "next:  choose another --to, or move that file away first" in done.stderr
        assert (work.folder / name).read_bytes() == before


def test_an_export_of_this_run_is_replaced_wherever_it_is(work):
    (work.folder / "made-by-mktemp.csv").touch()
    for name in ("outputs/j/own.csv", "elsewhere.csv", "made-by-mktemp.csv"):
        for _ in range(2):
            work.gxr("export", "outputs/j", "--format", "csv", "--to", name)
    assert not list(work.folder.rglob("*.before-*"))
    (found,) = json.loads(work.gxr("status", "outputs/j", "--json").stdout)
    assert found["outdated_exports"] == []


def test_what_a_person_saves_while_an_export_is_written_is_kept(work, monkeypatch):
    folder = work.folder / "outputs/j"
    path = exported(work, "csv", "results.csv")
    whole, opened = path.read_bytes(), export_module.open_source

    def slowly(*arguments, **options):
        source = opened(*arguments, **options)

        def tables():
            yield from source.tables
            path.write_bytes(b"saved by a reviewer")

        return source._replace(tables=tables())

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "open_source", slowly)
        again = export(RunReader(folder), "csv", None, Choice())
    (kept,) = folder.glob("results.before-*.csv")
    assert kept.read_bytes() == b"saved by a reviewer"
    assert kept.name in again.notes[-1]
    assert path.read_bytes() == whole


def test_what_a_person_saves_as_soon_as_an_export_is_there_is_no_export(work, monkeypatch):
    folder = work.folder / "outputs/j"
    path = folder / "results.csv"
    with monkeypatch.context() as patched:  # called between the renaming and the note about the file
        patched.setattr("gxr_batch.disk.sync_folder", lambda _: path.write_bytes(b"saved at once"))
        export(RunReader(folder), "csv", None, Choice())
    export(RunReader(folder), "csv", None, Choice())
    (kept,) = folder.glob("results.before-*.csv")
    assert kept.read_bytes() == b"saved at once"


@pytest.fixture
def flagged(tmp_path: Path) -> Workplace:
    """A run whose rows have 1, 3, 2 and no flags; the last failed."""
    made = Workplace(tmp_path)
    cells = ["clear lungs", "<start_of_turn> MRN 4711", "<bos> clear lungs", "a failing row", "clear heart"]
    made.table([(f"C{number}", cell) for number, cell in enumerate(cells)])
    made.job("[engine]\nkind = 'echo'\n[privacy]\nidentifiers = 'flag'\n")
    made.faults = {"fail_containing": "failing"}
    made.run(expect=3)
    return made


@pytest.mark.parametrize("more", [[], ["--partial"]])
def test_rows_can_be_ordered_by_their_number_of_flags(flagged, more):
    flagged.gxr("export", "outputs/j", "--format", "jsonl", "--order", "flags", *more)
    text = (flagged.folder / "outputs/j/results.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    numbers = {row["case_id"]: len(row["gxr_flags"] or []) for row in rows}
    assert len(set(numbers.values())) >= 3
    assert [row["case_id"] for row in rows] == sorted(numbers, key=lambda name: (-numbers[name], name))


def test_a_workbook_ordered_by_flags_can_be_imported(flagged):
    flagged.gxr("export", "outputs/j", "--order", "flags")
    found = openpyxl.load_workbook(flagged.folder / "outputs/j/results.xlsx")["Cases"]
    head = [cell.value for cell in found[3]]
    assert [row[head.index("case_id")] for row in found.iter_rows(4, values_only=True)] == [
        "C1",
        "C2",
        "C0",
        "C4",
        "C3",
    ]


def test_a_run_that_changes_while_its_rows_are_ordered_is_no_export(flagged, monkeypatch):
    reader = RunReader(flagged.folder / "outputs/j")
    opened = export_module.open_source
    passes = iter([1, 0.5, 0.5, 0.5])

    def shrinking(*args, **kwargs):
        source, share = opened(*args, **kwargs), next(passes)
        return source._replace(tables=(table.slice(0, int(len(table) * share)) for table in source.tables))

    monkeypatch.setattr(export_module, "open_source", shrinking)
    with pytest.raises(RunError, match="has changed during the export"):
        export(reader, "jsonl", None, Choice(flagged_first=True))
    assert not (flagged.folder / "outputs/j/results.jsonl").exists()
