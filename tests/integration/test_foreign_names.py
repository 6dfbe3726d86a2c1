"""Names that others choose never control the terminal, forge a line of a message, or fill the screen."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import tempfile
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import COMMAND, Workplace

from gxr_batch.errors import GxrError
from gxr_batch.ledger.lock import Holder
from gxr_batch.models.lora_config import read_adapter_config

# Title, colour and a cursor that moves, the one-character form of them, reversed text, another line.
EVIL = "x\x1b]0;title\x07\x1b[31m\x9b2J\u202e\r\nError: forged"
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
CELL = EVIL.replace("\r\n", " ")  # a cell may have lines
LONGEST_LINE = 2000


def assert_harmless(output: str) -> None:
    output = output.replace("\r\n", "\n")
    assert CONTROL.findall(output) == []
    assert "\r" not in output
    assert not [line for line in output.split("\n") if line.startswith("Error: forged")]
    assert max(map(len, output.split("\n")), default=0) < LONGEST_LINE


class Terminal(Workplace):
    """A workplace whose stdout is a terminal."""

    def shown(self, *arguments: str, expect: int = 0) -> str:
        """Run the command; return what it wrote to the terminal and to stderr."""
        here, there = os.openpty()
        written = b""
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen([*COMMAND, *arguments], cwd=self.folder, stdout=there, stderr=errors) as done,
        ):
            os.close(there)
            with suppress(OSError):  # the other end was closed
                while piece := os.read(here, 65536):
                    written += piece
            os.close(here)
            done.wait()
            errors.seek(0)
            output = (written + errors.read()).decode("utf-8", "surrogateescape")
        assert done.returncode == expect, output
        return output


@pytest.fixture
def work(tmp_path) -> Terminal:
    folder = tmp_path / EVIL.replace("/", "_")
    folder.mkdir()
    made = Terminal(folder)
    rows = [(f"{EVIL} {number}", f"clear lungs {CELL}", "", CELL) for number in range(3)]
    made.table([*rows, ("plain", "", "", "x")], ("case_id", "findings", EVIL, f"{EVIL} 2"))
    made.job("[prompt]\ntemplate = 'basic'\n[engine]\nkind = 'echo'\n[sampling]\nmax_new_tokens = 400\n")
    return made


def test_no_verb_shows_a_control_character_of_a_name_or_a_cell(work):
    name = f"table {EVIL}.csv"
    (work.folder / name).write_bytes((work.folder / "f.csv").read_bytes())
    evil_run = f"outputs/{EVIL} run"
    work.shown("run", "j.toml", expect=3)
    for arguments, code in {
        ("run", "j.toml", "--output", evil_run): 3,
        ("run", "j.toml", "--retry", "failed", "--row", EVIL): 2,
        ("check", "j.toml"): 0,
        ("check", "j.toml", "--set", f"input.columns.findings={json.dumps(EVIL + ' 3')}"): 2,
        ("check", "j.toml", "--set", f"input.id_column={json.dumps(EVIL + ' 3')}"): 2,
        ("check", "j.toml", "--set", f"input.path={json.dumps(name)}", "--set", f"{EVIL}.x=1"): 2,
        ("check", "j.toml", "--set", f"input.path={json.dumps(name)}"): 0,
        ("check", "j.toml", "--set", f"prompt.template={json.dumps(EVIL)}"): 2,
        ("status", "outputs"): 0,
        ("status", evil_run): 0,
        ("show", "outputs/j"): 0,
        ("show", evil_run, "--row", f"{EVIL} 1"): 0,
        ("show", evil_run, "--row", EVIL): 2,
        ("export", evil_run): 0,
        ("export", evil_run, "--format", "csv", "--to", f"{EVIL}.csv"): 0,
        ("report", evil_run, "--to", f"{EVIL}.html"): 0,
        ("templates", "render", "j.toml"): 0,
        ("generate", "--engine", "echo", "--prompt", CELL): 0,
        ("init", name, "--column", "findings=findings", "--to", f"{EVIL}.toml"): 0,
        (EVIL,): 2,
        ("run", "j.toml", f"--{EVIL}"): 2,
    }.items():
        assert_harmless(work.shown(*arguments, expect=code))
    for run in ("outputs/j", evil_run):
        assert_harmless((work.folder / run / "log.jsonl").read_text())


def test_reviews_show_no_control_character_of_ids_sheets_files_or_reviewers(work):
    work.shown("run", "j.toml", expect=3)
    work.shown("export", "outputs/j", "--format", "csv-plain")
    with (work.folder / "outputs/j/results-plain.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    for number, verdict in enumerate(("approved", "rejected")):
        for row in rows:
            row[header.index("gxr_review_status")], row[header.index("gxr_reviewer")] = verdict, f"{EVIL} {number}"
        with (work.folder / f"{EVIL}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows, [*rows[0][:-1], "x"]])
        assert_harmless(work.shown("review", "import", "outputs/j", f"{EVIL}.csv", expect=3))
    assert_harmless(work.shown("show", "outputs/j"))


def test_what_comes_from_run_files_is_harmless(work):
    work.shown("run", "j.toml", expect=3)
    run = work.folder / "outputs/j"
    manifest = json.loads((run / "run.json").read_text())
    manifest["invocations"][-1]["packages"][EVIL] = EVIL
    manifest["invocations"][-1]["outcome"] = EVIL
    (run / "run.json").write_text(json.dumps(manifest))
    lock = {"host": EVIL, "pid": 1, "started": 0.0, "since": EVIL, "boot": "", "file": ""}
    (run / "run.lock").write_text(json.dumps(lock))
    assert_harmless(work.shown("status", "outputs/j"))
    assert_harmless(work.shown("run", "j.toml", expect=4))
    (run / "run.lock").unlink()
    assert_harmless(work.shown("run", "j.toml", "--retry", "failed", expect=3))
    part = max((run / "parts").iterdir())
    table = pq.read_table(part)
    pq.write_table(table.append_column(EVIL, pa.nulls(len(table))), part)
    assert_harmless(work.shown("status", "outputs/j", expect=2))


def test_a_holder_and_an_adapter_name_no_control_character(tmp_path):
    holder = Holder(host=EVIL, pid=1, started=0.0, since=EVIL)
    assert_harmless(str(holder))
    for settings in (
        {"peft_type": EVIL},
        {"peft_type": "LORA", EVIL: 7},
        {"peft_type": "LORA", "init_lora_weights": EVIL},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(GxrError) as caught:
            read_adapter_config(tmp_path)
        assert_harmless(str(caught.value))


@pytest.mark.parametrize(
    "override",
    [
        ".".join("a" * 50_000) + "=1",
        "x" * 10**5 + "=1",
        "engine." + "x" * 10**5 + "=1",
        "x" * 10**5,
        "run.output={" + "x" * 10**5 + "}",
    ],
)
def test_a_long_key_is_cut(work, override):
    done = work.gxr("check", "j.toml", "--set", override, expect=2)
    assert len(done.stderr) < LONGEST_LINE


def test_a_long_key_of_a_job_file_is_cut(work):
    (work.folder / "j.toml").write_text(
        (work.folder / "j.toml").read_text() + "x" * 2**20 + " = 1\n" + "x" * 2**20 + " = 1"
    )
    assert len(work.gxr("check", "j.toml", expect=2).stderr) < LONGEST_LINE
    (work.folder / "j.toml").write_text('"' + "x" * 2**20 + '" = 1\nname = "j"')
    assert len(work.gxr("check", "j.toml", expect=2).stderr) < LONGEST_LINE


@pytest.mark.parametrize("key", ["prompt.system", " prompt . system ", 'prompt."system"', "prompt"])
def test_a_system_text_of_the_command_line_is_neither_logged_nor_shown(work, key):
    canary = "kanarienvogel"
    value = f'{{template="basic", system="{canary}"}}' if key == "prompt" else canary
    done = work.gxr("run", "j.toml", "--set", f"{key}={value}", expect=3)
    assert canary not in (work.folder / "outputs/j/log.jsonl").read_text()
    again = work.gxr("run", "j.toml", "--set", f"{key}={value.replace(canary, canary + '2')}", expect=2)
    wrong = work.gxr("check", "j.toml", "--set", f"prompt.system {canary}", expect=2)
    assert canary not in done.stderr + done.stdout.partition("AI-generated")[0] + again.stderr + wrong.stderr


def test_what_a_form_on_the_command_line_asks_for_is_not_logged(work):
    canary, log = "kanarienvogel", work.folder / "outputs/j/log.jsonl"
    sections = ["form.sections=['Impression', 'Next step']", f"form.request={canary} {{headings}}"]
    asked = [*sections, f"form.section.Impression.ask={canary}", f'form.section."Next step".ask={canary}']
    work.gxr("run", "j.toml", *(word for one in asked for word in ("--set", one)), expect=3)
    assert canary not in log.read_text()
    assert "form.section.Next step.ask=..." in log.read_text()


def test_what_is_piped_stays_as_it_is(work):
    text = "a\x9b31m\u202eb"
    assert text in work.gxr("generate", "--engine", "echo", "--prompt", text, "--quiet").stdout
    assert json.loads(work.gxr("generate", "--engine", "echo", "--prompt", EVIL, "--json").stdout)["text"]
