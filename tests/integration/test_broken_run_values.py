"""Values in a run's files that no run has: each verb ends with one message, or does its work."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from running import Workplace

from gxr_batch.cli import main
from gxr_batch.disk import sync_folder
from gxr_batch.ledger.reviews import _file_schema

PART, RESULTS = "parts/part-00000001.parquet", "results.parquet"
READERS = (
    ("status", "outputs"),
    ("show", "outputs/j", "--row", "C1"),
    ("export", "outputs/j", "--format", "xlsx", "--to", "out.xlsx"),
    ("export", "outputs/j", "--format", "parquet", "--partial", "--to", "out.parquet"),
    ("report", "outputs/j", "--to", "out.html"),
)
VERBS = (*READERS, ("run", "j.toml"), ("check", "j.toml"))
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A finished run of three rows."""
    work = Workplace(tmp_path_factory.mktemp("base"))
    work.table(3)
    work.run()
    return work.folder


@pytest.fixture
def run(base, tmp_path, monkeypatch) -> Path:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs/j"


def troubles(*verbs: tuple[str, ...]) -> list[str]:
    """Return the verbs that end in something else than their work or one message."""
    found = []
    for verb in verbs:
        done = CliRunner().invoke(main, verb)
        if done.exit_code not in {0, 2, 4} or done.stderr.count("Error:") != (done.exit_code != 0):
            found.append(f"{verb[0]}: exit {done.exit_code}: {done.stderr[-500:]}")
    return found


def change(path: Path, name: str, value: object) -> None:
    """Replace every cell of a column; a time is given in milliseconds."""
    table = pq.read_table(path)
    kind = table.schema.field(name).type
    made = pa.array([value] * len(table), pa.int64()).view(kind) if isinstance(value, int) else None
    column = pa.array([value] * len(table), kind) if made is None else made
    pq.write_table(table.set_column(table.schema.get_field_index(name), table.schema.field(name), column), path)


@pytest.mark.parametrize("file", [PART, RESULTS])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gxr_started_at", 2**62),
        ("gxr_finished_at", -(2**62)),
        ("gxr_finished_at", 10**15),
        ("gxr_flags", [None]),
        ("gxr_flags", ["\x1b[2J\x00\ufffe<b>"]),
        ("gxr_findings_kept", [None]),
        ("gxr_findings_lost", [None]),
        ("gxr_findings_lost", ["\x1b[2J\x00\ufffe<b>"]),
        ("gxr_finish_reason", "\x1b[2J\x00\ufffe" + "x" * 40_000),
    ],
)
def test_a_cell_that_no_run_writes_ends_in_one_message(run, file, name, value):
    change(run / file, name, value)
    assert not troubles(*VERBS)


def test_results_with_other_columns_than_a_run_writes_are_damaged(run):
    whole = pq.read_table(run / RESULTS)
    for wrong in (
        whole.append_column("findings", whole["findings"]),
        whole.set_column(whole.schema.get_field_index("gxr_text"), "gxr_text", pa.array([b"\xff"] * 3)),
    ):
        pq.write_table(wrong, run / RESULTS)
        for form in ("csv", "xlsx", "jsonl", "parquet"):
            done = CliRunner().invoke(main, ["export", "outputs/j", "--format", form])
            assert (done.exit_code, done.stderr.count("The run's results are damaged.")) == (2, 1), done.output


@pytest.mark.parametrize(
    ("mark", "value"),
    [
        *((f"gxr_{name}", value) for name in ("resolved", "fingerprint") for value in (DEEP, b"[]", b"3", b"null")),
        *(
            ("gxr_union", value)
            for value in (DEEP, b'{"level": 1e999, "lines": []}', b'{"level": 0, "lines": [[1, -5]]}')
        ),
    ],
)
def test_odd_metadata_of_a_part_ends_in_one_message(run, mark, value):
    table = pq.read_table(run / PART)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, mark: value}), run / PART)
    assert not troubles(*READERS)
    (run / "run.json").unlink()
    assert not troubles(*VERBS[-2:])


@pytest.mark.parametrize("value", [DEEP, b"[]", b'{"ok": "x", "failed": 0, "held": 0, "left": 0}'])
def test_odd_counts_of_results_end_in_one_message(run, value):
    table = pq.read_table(run / RESULTS)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, "gxr_counts": value}), run / RESULTS)
    assert not troubles(*VERBS)


@pytest.mark.parametrize(
    "values",
    [
        {"done": 10**400},
        {"done": 1, "streaming_seconds": 5e-324},
        {"done": 1, "streaming_seconds": float("nan")},
        {"new_tokens": 10**400, "streaming_seconds": 1},
        {"started_at": "0001-01-01T00:00:00+14:00"},
        {"input_files": ["a\0b"]},
        {"input_files": ["\ud800"]},
        {"input_files": ["loop"]},
        {"counts": {"ok": "x", "failed": 0, "held": 0, "left": 0}},
        {"counts": {"ok": None, "failed": 0, "held": 0, "left": 0}},
    ],
)
def test_an_odd_value_of_an_invocation_ends_in_one_message(run, values):
    os.symlink("loop", "loop")
    known = json.loads((run / "run.json").read_text())
    known["invocations"][-1] |= values
    (run / "run.json").write_text(json.dumps(known))
    assert not troubles(*VERBS)


@pytest.mark.parametrize("samples", [1001, 10**20])
def test_more_samples_than_a_job_can_have_are_damage(run, samples):
    known = json.loads((run / "run.json").read_text())
    known["job"]["sampling"]["samples_per_row"] = samples
    (run / "run.json").write_text(json.dumps(known))
    done = CliRunner().invoke(main, ["status", "outputs/j"])
    assert (done.exit_code, done.stderr.count("The run's manifest is damaged.")) == (2, 1)


def test_a_review_from_a_year_that_python_lacks_is_damage(run):
    schema = _file_schema()
    row = {"gxr_row_id": "C1", "gxr_sample": 1, "gxr_judged_sha256": "0", "gxr_review_status": "approved"}
    table = pa.Table.from_pylist([row | {"gxr_reviewed_at": datetime.date(2026, 1, 1)}], schema=schema)
    (run / "reviews").mkdir()
    path = run / "reviews/review-00000001.parquet"
    pq.write_table(table, path)
    change_date = pa.array([2**31 - 1], pa.int32()).view(pa.date32())
    at = schema.get_field_index("gxr_reviewed_at")
    pq.write_table(table.set_column(at, schema.field(at), change_date), path)
    assert not troubles(*VERBS)
    assert "A review file is damaged." in CliRunner().invoke(main, ["show", "outputs/j"]).stderr


def test_a_file_with_the_last_part_number_stops_the_run_before_rows_are_lost(run):
    planted = run / "parts/part-99999999.parquet.damaged"
    planted.touch()
    with open("f.csv", "a") as file:
        file.write("new,another finding\n")
    done = CliRunner().invoke(main, ["run", "j.toml"])
    assert done.exit_code == 4
    assert "A file has a number that no run reaches: 99999999." in done.stderr
    assert f"where: {planted.parent}" in done.stderr
    planted.unlink()
    assert CliRunner().invoke(main, ["run", "j.toml"]).exit_code == 0
    assert sorted(path.name for path in planted.parent.iterdir()) == ["part-00000001.parquet", "part-00000002.parquet"]


def test_a_disk_that_cannot_sync_folders_holds_runs(tmp_path, monkeypatch):
    real = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refusal, os.strerror(refusal))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    monkeypatch.chdir(tmp_path)
    Workplace(tmp_path).table(3)
    refusal = errno.EINVAL
    assert CliRunner().invoke(main, ["run", "j.toml"]).exit_code == 0
    refusal = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)
