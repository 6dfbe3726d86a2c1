"""Text of a cell stays in the run's Parquet files and on the stdout of the commands that show it, whatever goes wrong.

A canary is in a findings cell; the real command is driven through its failures; then everything else that it wrote
or printed is searched.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import chdir
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from faulty_engine import playing
from running import COMMAND, Faults, Workplace

from gxr_batch.cli import main

CANARY = "Canary7f3e"
CELL = f"{CANARY} opacity in the left lower lobe, no effusion"
ROWS = [(f"C{number}", CELL if number % 3 == 0 else f"finding {number}") for number in range(60)]
SHOWING = {"check", "templates", "export"}  # commands whose stdout may show cells


class Watched(Workplace):
    """A workplace that searches all output of a command."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.table(ROWS)
        self.asked = 0

    def gxr(
        self, *arguments: str, expect: int | None = 0, faults: Faults | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command in this process, which is faster, and search its output."""
        with chdir(self.folder), playing(self.faults if faults is None else faults):
            result = CliRunner().invoke(main, arguments)
        done = subprocess.CompletedProcess(arguments, int(result.exit_code), result.stdout, result.stderr)
        self.said(arguments, done.stdout, done.stderr)
        assert expect is None or done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def real(self, *arguments: str, expect: int, faults: Faults | None = None) -> None:
        """Run the command in a separate process and search its output."""
        done = super().gxr(*arguments, expect=expect, faults=faults)
        self.said(arguments, done.stdout, done.stderr)

    def said(self, arguments: tuple[str, ...], stdout: str, stderr: str) -> None:
        self.asked += 1
        assert CANARY not in stderr, f"stderr of {arguments}: {stderr}"
        assert CANARY not in stdout or arguments[0] in SHOWING, f"stdout of {arguments}: {stdout}"

    def search(self) -> None:
        """Search file names and the content of all files that are neither the user's nor Parquet."""
        own = {"f.csv", "f.parquet", "results.csv", "results-with-held.csv"}
        assert self.asked
        for path in self.folder.rglob("*"):
            assert CANARY not in str(path)
            if path.is_file() and ".parquet" not in path.name and path.name not in own:
                assert CANARY.encode() not in path.read_bytes(), path


@pytest.fixture
def work(tmp_path):
    place = Watched(tmp_path)
    yield place
    if (tmp_path / "outputs").exists():
        place.gxr("status", "outputs", "--json", expect=None)
        place.gxr("status", "outputs", expect=None)
    place.search()


def test_the_canary_appears_where_it_may(work):
    """Without this every other test here could pass without any canary."""
    work.run()
    assert CANARY in str(pq.read_table(work.folder / "outputs/j/input.parquet").to_pylist())
    assert CANARY in str(work.results())
    assert CANARY in work.gxr("check", "j.toml").stdout
    assert CANARY in work.gxr("templates", "render", "j.toml").stdout
    work.gxr("export", "outputs/j", "--format", "csv")
    assert CANARY in (work.folder / "outputs/j/results.csv").read_text(encoding="utf-8-sig")


def test_a_search_that_finds_something_fails(work):
    work.run()
    (work.folder / "outputs/j/log.jsonl").write_text(CANARY)
    with pytest.raises(AssertionError, match="log"):
        work.search()
    (work.folder / "outputs/j/log.jsonl").unlink()
    with pytest.raises(AssertionError, match="stderr of"):
        work.said(("run",), "", CANARY)


@pytest.mark.parametrize(
    "source",
    [
        "{{ {}[findings] }}",
        "{{ findings.nothing }}",
        "{{ findings|attr(findings) }}",
        "{{ findings + 1 }}",
        "{{ findings|float / 0 }}",
        "{{ [1][findings] }}",
        "{{ findings|tojson|map(findings)|list }}",
        "{{ (findings ~ '%d') % findings }}",
        "{{ ('{' ~ findings ~ '}').format(1) }}",
        "{% for x in findings * 90 %}{% for y in findings * 90 %}.{% endfor %}{% endfor %}",
        "{{ findings|indent(findings|length ** 9) }}",
        "{{ findings[0]|random(findings) }}",
    ],
)
def test_a_template_that_fails_on_a_cell(work, source):
    (work.folder / "own.j2").write_text(source)
    work.table(ROWS[:4])
    work.job("[prompt]\ntemplate = 'own.j2'\n[engine]\nkind = 'echo'\n")
    for arguments in (("run", "j.toml"), ("check", "j.toml"), ("run", "j.toml", "--json", "--retry", "failed")):
        assert work.gxr(*arguments, expect=None).returncode in {0, 2, 3}
    work.gxr("templates", "render", "j.toml", expect=None)


def test_rows_that_cannot_be_generated(work):
    work.table([*ROWS, ("D1", ""), ("D2", CELL), ("D2", CELL + " again"), ("", CELL)])
    limits = ("--set", "model.max_seq_length=29", "--set", "sampling.max_new_tokens=8")
    assert "too long" in work.gxr("check", "j.toml", *limits).stdout
    work.run(*limits, expect=3)
    work.run("--retry", "failed", *limits, expect=3)


@pytest.mark.parametrize(
    "text",
    [
        f"case_id,findings\nC1,{CELL},{CELL}\n",
        f'case_id,findings\nC1,"{CELL}\nC2,{CELL}\n',
        f'case_id,findings\nC1,"{CELL}"x\n',
        f'case_id,findings\nC1,"x\nC2,{CANARY}\nC3,y"\n',
        f"C1,{CELL},F\nC2,{CELL},M\n",
        f"C1,{CELL}.\nC2,{CELL}.\n",
        f"C1,55,{CANARY}\nC2,60,{CANARY}\n",
        f"case_id,findings\x00\nC1,{CELL}\n",
        f"case_id,gxr_text,{CELL}.\nC1,x,y\n",
        f"{CELL}.,{CELL}., {CELL}.\nC1,x,y\n",
    ],
)
def test_delimited_tables_that_are_broken_or_lack_a_header(work, text):
    (work.folder / "f.csv").write_text(text)
    work.real("run", "j.toml", expect=2)
    for verb in ("run", "check"):
        assert work.gxr(verb, "j.toml", expect=None).returncode == 2
    assert work.gxr("templates", "render", "j.toml", expect=None).returncode == 2


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "utf-16", "cp1252", "rot13"])
def test_a_table_that_does_not_decode(work, encoding):
    (work.folder / "f.csv").write_bytes(f"case_id,findings\nC1,{CELL} \x81é".encode() + b"\x81\xff\n")
    work.job(f"encoding = '{encoding}'\n[engine]\nkind = 'echo'\n")
    work.run(expect=2)


def parquet(work: Watched, column: pa.Array) -> Path:
    path = work.folder / "f.parquet"
    pq.write_table(
        pa.table({"case_id": [f"C{n}" for n in range(len(column))], "findings": column}), path, compression="none"
    )
    work.job("[engine]\nkind = 'echo'\n", head="path = 'f.parquet'\nid_column = 'case_id'\n")
    return path


def test_parquet_that_is_broken(work):
    path = parquet(work, pa.array([cell for _, cell in ROWS]))
    content = path.read_bytes()
    at = content.index(CANARY.encode())
    for damaged in (
        content[:-60],
        content[:at] + b"\xff\xfe" + content[at + 2 :],
        content[: at - 4] + b"\xff\xff\xff\x7f" + content[at:],
        content.replace(b"findings", CANARY.encode()[:8]),
        CANARY.encode() * 50,
    ):
        path.write_bytes(damaged)
        assert work.run(expect=None).returncode == 2


def test_parquet_cells_that_cannot_be_used_in_a_prompt(work):
    parquet(work, pa.array([CELL.encode() + b"\xff", None, b"x"]))
    work.run(expect=None)
    parquet(work, pa.array([{"a": CELL}, None]))
    work.run("--fresh", expect=None)
    work.run("--fresh", "--set", "input.id_column=findings", expect=2)


def test_too_many_failures_and_an_engine_that_crashes(work):
    work.run("--set", "run.max_failed=3", expect=5, faults={"fail_every": 1})
    work.real("run", "j.toml", expect=4, faults={"crash_after": 11})
    work.run("--retry", "failed", "--set", "run.max_failed='off'", expect=3, faults={"fail_every": 2})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_stopped_by_a_signal_and_resumed(work, number):
    work.job("[engine]\nkind = 'echo'\nslots = 2\n[echo]\ntokens_per_second = 30\n")  # 20 s for all, 1 s for a row
    process = work.start("run", "j.toml", "--set", "run.checkpoint_seconds=0.1", "--set", "run.grace_seconds=0")
    deadline = time.monotonic() + 60
    while not work.parts() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert work.parts()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    work.said(("run",), stdout, stderr)
    assert process.returncode in {75, 130, -9}
    work.run("--set", "echo.tokens_per_second=0")
    assert len(work.results()) == len(ROWS)


@pytest.mark.parametrize("output", ["f.csv/x", "/proc/no/such", "outputs/" + "x" * 300])
def test_a_folder_that_cannot_be_written(work, output):
    assert work.run("--output", output, expect=None).returncode in {2, 4}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(work):
    work.run()
    (work.folder / "outputs/j").chmod(0o500)
    try:
        work.run("--retry", "failed", expect=4)
    finally:
        (work.folder / "outputs/j").chmod(0o700)


def limited(work: Watched, kilobytes: int, *arguments: str) -> int:
    line = f"trap '' XFSZ; ulimit -f {kilobytes}; exec {' '.join(COMMAND)} {' '.join(arguments)}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=work.folder, capture_output=True, text=True, timeout=100, check=False
    )
    work.said(arguments, done.stdout, done.stderr)
    return done.returncode


@pytest.mark.parametrize("kilobytes", [0, 1, 4, 8, 12])
def test_a_disk_that_is_full(work, kilobytes):
    work.table([(f"{name}{n}", f"{cell} {n * 7919}") for n in range(40) for name, cell in ROWS])
    code = limited(work, kilobytes, "run", "j.toml")
    assert code in {0, 4}
    work.run()
    code = limited(work, kilobytes, "export", "outputs/j")
    assert code in {0, 4}


def test_settings_that_are_wrong_or_changed(work):
    work.run()
    for override in ("sampling.seed=9", "prompt.template=educational", "engine.window=x", "model.max_seq_length=4000"):
        work.run("--set", override, expect=2)
    for override in (
        f"sampling.temperature={CELL}",
        f"prompt.format={CELL}",
        f"run.max_failed={CELL}",
        f"input=['{CELL}']",
    ):
        work.run("--set", override, expect=2)


def test_an_edited_table_and_a_damaged_run(work):
    work.run(expect=4, faults={"crash_after": 20})
    work.table([(row_id, f"{cell} edited") for row_id, cell in ROWS[:30]])
    work.run(expect=4, faults={"crash_after": 20})
    run = work.folder / "outputs/j"
    for path in (work.parts()[0], run / "input.parquet", run / "run.json"):
        kept = path.read_bytes()
        for damaged in (kept[: len(kept) // 2], CELL.encode() if path.suffix == ".parquet" else b'{"x": 1}', b""):
            path.write_bytes(damaged)
            work.run(expect=None)
            for verb in ("status", "export"):
                work.gxr(verb, "outputs/j", expect=None)
        path.write_bytes(kept)
    work.run()


def test_an_export_that_cannot_be_written(work):
    work.run()
    for target, code in ((".", 2), ("outputs/j/results.parquet", 2), ("no/such/x.csv", 2), ("''", 0), ("f.csv", 2)):
        work.gxr("export", "outputs/j", "--to", target.strip("'") or ".", expect=code or 2)
    kept = (work.folder / "outputs/j/results.parquet").read_bytes()
    (work.folder / "outputs/j/results.parquet").write_bytes(kept[:-9])
    work.gxr("export", "outputs/j", expect=None)


@pytest.mark.parametrize(
    ("target", "breaks"),
    [
        ("gxr_batch.engines.echo.EchoSession._complete", lambda self, row, _: {}[row.prompt.messages.turns[-1].text]),
        ("gxr_batch.rows.csv_tables._text_column", lambda file, cells, *_: float(cells[1])),
        ("gxr_batch.ledger.run_writer.write_part", lambda folder, number, results, _: int(results[0].text)),
    ],
)
def test_a_bug_keeps_its_traceback_but_not_the_cell_quoted_in_its_message(work, monkeypatch, target, breaks):
    monkeypatch.chdir(work.folder)
    monkeypatch.setattr(target, breaks)
    done = CliRunner().invoke(main, ["run", "j.toml"])
    work.said(("run",), done.stdout, done.stderr)
    assert done.exit_code == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "test_canary.py" in done.stderr
    assert "Error (its message may quote the table)" in done.stderr


def test_a_bug_in_one_rows_prompt_fails_that_row_without_its_text(work, monkeypatch):
    monkeypatch.chdir(work.folder)
    monkeypatch.setattr("gxr_batch.run.pipeline.render", lambda template, values, **_: int(values["findings"]))
    done = CliRunner().invoke(main, ["run", "j.toml"])
    work.said(("run",), done.stdout, done.stderr)
    assert done.exit_code == 3
    assert {row["gxr_error"][:44] for row in work.results()} == {"the prompt could not be made (ValueError, te"}


def test_the_manifest_of_a_run_with_everything_in_it(work):
    work.run("--set", "run.max_failed=off", "--json", expect=3, faults={"fail_every": 2})
    work.run("--retry", "failed", "--row", "C0", expect=None)
    assert json.loads((work.folder / "outputs/j/run.json").read_text())["invocations"]


def test_a_row_that_kills_the_process_and_other_rows_in_the_batch(work):
    work.job("[engine]\nkind = 'echo'\n[echo]\ntokens_per_second = 500\n")
    for code in (-signal.SIGKILL, -signal.SIGKILL, 3):
        work.real("run", "j.toml", expect=code, faults={"kill_containing": "finding 7"})
    assert (work.folder / "outputs/j/inflight.json").exists()


def test_prompts_that_are_cut_or_too_long(work):
    work.table([(row_id, f"{cell} " * 40) for row_id, cell in ROWS[:6]])
    sections = "[engine]\nkind = 'echo'\n[model]\nmax_seq_length = 64\n[sampling]\nmax_new_tokens = 16\n[prompt]\n"
    work.job(sections)
    work.run("--set", "prompt.template=basic", expect=3)
    work.run("--set", "prompt.template=basic", "--set", "prompt.too_long=truncate", "--fresh", expect=0)
    assert {row["gxr_flags"][0] for row in work.results()} == {"findings_truncated"}


def test_a_folder_held_by_another_host(work):
    work.run("--limit", "5")
    record = {"host": "elsewhere", "pid": 1, "started": 0, "since": "2026-01-01T00:00:00"}
    (work.folder / "outputs/j/run.lock").write_text(json.dumps(record))
    work.run(expect=4)
    work.run("--take-over")


def test_rows_that_identifier_screening_holds_and_releases(work):
    work.table([(row_id, f"MRN 778123{n}, {cell}") for n, (row_id, cell) in enumerate(ROWS)])
    hold = ("--set", "privacy.identifiers=hold")
    (work.folder / "own.j2").write_text("Dr. Greyson asks about {{ findings }}")
    work.run(*hold, expect=3)
    for arguments in ((), ("--json",), ("--retry", "held", "--row", "C0"), ("--retry", "failed"), ("--retry", "held")):
        work.run(*hold, *arguments, expect=None)
    work.gxr("check", "j.toml", *hold)
    assert CANARY not in work.gxr("check", "j.toml", "--json", *hold).stdout
    work.run(*hold, "--fresh", "--set", "prompt.template=own.j2", expect=3)
    work.gxr("export", "outputs/j", "--format", "csv", "--include-held")
