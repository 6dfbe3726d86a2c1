"""500 cases of strange input: a documented exit code, one message, no traceback, no hang, no lost row or cell."""

from __future__ import annotations

import csv
import io
import os
import subprocess
from contextlib import chdir, contextmanager
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuzz_inputs import JOB, NASTY_CELLS, ROWS, csv_bytes, plain_table
from fuzzing import EXITS, HANG_SECONDS, KINDS, Hang, lost_rows, timed, try_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import COMMAND

from gxr_batch.cli import main
from gxr_batch.ledger import join

CASES = {
    "csv": 45, "parquet": 45, "text": 50, "jsonl": 40, "types": 40, "workbook": 30, "parts": 40,
    "job": 40, "set": 40, "template": 40, "folder": 30,
}  # fmt: skip
ONE_BY_ONE = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


@pytest.mark.parametrize("kind", KINDS)
def test_strange_input_ends_with_a_documented_exit_code(tmp_path, kind):
    verdicts = [try_case(kind, seed, tmp_path) for seed in range(CASES[kind])]
    assert [trouble for verdict in verdicts for trouble in verdict.troubles] == []
    codes = {code for verdict in verdicts for code in verdict.codes}
    assert {0, 2} <= codes  # neither all refused nor all accepted


def run_here(folder: Path) -> int:
    with chdir(folder), timed():
        result = CliRunner().invoke(main, ["run", "j.toml", "--fresh"])
    assert result.exit_code in EXITS, result.output
    return int(result.exit_code)


text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


@ONE_BY_ONE
@given(st.lists(st.tuples(st.from_regex(r"[a-zA-Z0-9#]{0,3}", fullmatch=True), text), max_size=12))
def test_every_row_of_any_table_is_accounted_for(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("table")
    content = io.StringIO(newline="")
    csv.writer(content, quoting=csv.QUOTE_ALL).writerows([("case_id", "findings"), *rows])
    (folder / "f.csv").write_bytes(content.getvalue().encode())
    (folder / "j.toml").write_text(JOB + "[run]\nmax_failed = 'off'\n")
    code = run_here(folder)
    while rows and rows[-1] == ("", ""):  # rows without any cell at the end are left out
        rows = rows[:-1]
    if code != 2:  # two lines of a cell may look like swallowed rows, which is refused
        assert lost_rows(folder / "outputs/j", rows=len(rows)) == []


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@ONE_BY_ONE
@given(st.sampled_from(["name", "input.path", "sampling.seed", "run.output", "prompt.templates", "engine"]), values)
def test_any_value_of_a_key_is_accepted_or_refused(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("job")
    with chdir(folder), timed():
        plain_table()
        Path("j.toml").write_text(JOB)
        setting = repr(value).replace("True", "true").replace("False", "false").replace("\x00", "")
        assert CliRunner().invoke(main, ["check", "j.toml", "--set", f"{key}={setting}"]).exit_code in EXITS


@ONE_BY_ONE
@given(st.text(st.sampled_from(list("{}%#|.()[]'\"~+*-/ \nfindagse01")), max_size=40))
def test_any_template_is_accepted_or_refused(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("template")
    with chdir(folder):
        plain_table()
    (folder / "own.j2").write_text("{{ findings }}" + source)
    (folder / "j.toml").write_text(JOB + "[prompt]\ntemplate = 'own.j2'\n[run]\nmax_failed = 'off'\n")
    if run_here(folder) in {0, 3}:
        assert lost_rows(folder / "outputs/j", rows=ROWS) == []


@pytest.mark.parametrize("seed", range(4))
def test_the_real_command_exits_like_the_one_in_this_process(tmp_path, seed):
    import random

    content, _ = csv_bytes(random.Random(seed))
    (tmp_path / "f.csv").write_bytes(content)
    (tmp_path / "j.toml").write_text(JOB)
    done = subprocess.run(
        [*COMMAND, "run", "j.toml"], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode in EXITS
    assert "Traceback" not in done.stderr
    assert run_here(tmp_path) == done.returncode


def test_the_fuzzer_detects_a_traceback_a_hang_and_a_lost_row(tmp_path, monkeypatch):
    """A check that never fails proves nothing: each of the three is provoked once."""
    import fuzzing

    monkeypatch.setattr("gxr_batch.run.runner.stream", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in try_case("folder", 0, tmp_path / "a").tracebacks[0]
    monkeypatch.undo()
    monkeypatch.setattr(fuzzing, "HANG_SECONDS", 0.2)
    monkeypatch.setattr("gxr_batch.run.runner.stream", lambda *_: [n for n in range(10**12) if n < 0])
    assert "did not end" in try_case("folder", 0, tmp_path / "b").hangs[0]
    monkeypatch.undo()
    gather = join._Parts.gather
    monkeypatch.setattr(join._Parts, "gather", lambda parts, part, line: gather(parts, part, line * 0))
    monkeypatch.setattr("gxr_batch.ledger.join._belong", lambda *_: True)
    assert "results for" in try_case("folder", 3, tmp_path / "c").lost[0]
    assert HANG_SECONDS == 10
    with pytest.raises(Hang), timed():
        os.kill(os.getpid(), 27)  # SIGPROF
    assert "\x00" in NASTY_CELLS


def without_the_last(batches):
    """Return a reader of batches that loses the last row of each."""
    return lambda *arguments: (table.slice(0, table.num_rows - 1) for table in batches(*arguments))


@pytest.mark.parametrize(
    ("kind", "broken", "report"),
    [
        ("text", ("gxr_batch.rows.csv_tables.batches", without_the_last), "rows were written"),
        ("jsonl", ("gxr_batch.rows.jsonl_tables.batches", without_the_last), "rows were written"),
        ("parts", ("gxr_batch.rows.parquet_tables.batches", without_the_last), "rows were written"),
        (
            "workbook",
            ("gxr_batch.rows.workbook_tables._text", lambda text: lambda *cell: text(*cell).lstrip("0")),
            "written as",
        ),
        ("types", ("gxr_batch.cells.text_of", lambda text: lambda value: (text(value) or "").upper()), "written as"),
        ("parts", ("gxr_batch.rows.input_files._is_marker", lambda _: lambda name: False), "rows were written"),
        ("text", ("gxr_batch.rows.compression._damage", lambda _: contextmanager(lambda path: iter([None]))), "Error"),
    ],
)
def test_the_fuzzer_detects_a_reader_that_loses_rows_or_changes_cells(tmp_path, monkeypatch, kind, broken, report):
    reader, breaks = broken
    module, _, name = reader.rpartition(".")
    monkeypatch.setattr(reader, breaks(getattr(import_module(module), name)))
    assert any(report in trouble for seed in range(40) for trouble in try_case(kind, seed, tmp_path).troubles)
