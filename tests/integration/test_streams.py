"""stdout and stderr that are full, closed or of another encoding give a message or silence, never a traceback."""

from __future__ import annotations

import os
import subprocess

import pytest
from running import COMMAND, Workplace


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    place = Workplace(tmp_path_factory.mktemp("work"))
    place.run()
    return place


def shell(work: Workplace, line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = " ".join(COMMAND)
    environment = {"PYTHONUNBUFFERED": ""} | environment  # as on a user's machine: writes fail at the flush
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; G='{command}'; {line}"],
        cwd=work.folder, capture_output=True, timeout=100, check=False, env=os.environ | environment,
    )  # fmt: skip


VERBS = [
    "--help", "run --help", "--version", "status outputs/j", "status outputs --json", "export outputs/j",
    "check j.toml", "templates list", "templates show clinical_case", "templates render j.toml", "run j.toml",
    "run j.toml --fresh --json",
]  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_behind_stdout_is_exit_4(work, verb):
    done = shell(work, f"$G {verb} > /dev/full")
    assert done.returncode == 4, done.stderr
    assert b"cannot be written: No space left on device." in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("verb", ["--version", "status outputs/j"])
def test_a_full_disk_behind_unbuffered_stdout_is_exit_4(work, verb):
    done = shell(work, f"$G {verb} > /dev/full", PYTHONUNBUFFERED="1")
    assert done.returncode == 4, done.stderr
    assert b"cannot be written: No space left on device." in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_a_closed_pipe_is_ignored(work, verb):
    done = shell(work, f"(sleep 0.2; $G {verb}; echo ended $? >&2) | true")
    assert b"ended 0" in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("ends", [">&-", "2>&-", ">&- 2>&-", "2> /dev/full"])
def test_closed_streams_and_a_full_stderr_do_not_end_a_run(work, ends):
    done = shell(work, f"$G run j.toml --fresh {ends}; echo ended $?")
    assert b"ended 0" in done.stdout, done
    assert len(work.results()) == 60


def test_a_notice_is_never_written_to_stdout_if_stderr_is_closed(work):
    done = shell(work, "$G run j.toml --fresh --json 2>&-")
    assert done.stdout.startswith(b"{"), done.stdout


def test_a_prompt_that_the_terminal_cannot_encode_is_shown_with_escapes(work, tmp_path):
    other = Workplace(tmp_path)
    other.table([("C1", "漢字 opacity")])
    done = shell(other, "$G check j.toml", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert rb"\u6f22\u5b57 opacity" in done.stdout


def test_a_table_whose_name_is_not_utf8_is_run_reported_and_never_overwritten(tmp_path):
    place = Workplace(tmp_path)
    place.job("[engine]\nkind = 'echo'\n", head="path = '*.csv'\nid_column = 'case_id'\n")
    name = os.fsdecode(b"f\xff.csv")
    (tmp_path / "f.csv").rename(tmp_path / name)
    for verb in ("check j.toml", "run j.toml", "run j.toml --retry failed", "status outputs", "export outputs/j"):
        done = shell(place, f"$G {verb}")
        assert done.returncode == 0, done.stderr
    done = shell(place, r"$G export outputs/j --to $'f\xff.csv'")
    assert done.returncode == 2
    assert b"the run's input" in done.stderr
    done = shell(place, r"$G export outputs/j --to $'t\xff.csv'")
    assert done.returncode == 0, done.stderr
    assert os.fsdecode(b"t\xff.csv") in os.listdir(tmp_path)


@pytest.mark.parametrize(
    "line",
    [r"$G run $'j\xff.toml'", r"$G status $'j\xff'", r"$G run j.toml --output $'o\xff'", "$G export outputs/j --to ''"],
)
def test_invalid_names_give_a_message(work, line):
    done = shell(work, line)
    assert done.returncode == 2, done
    assert done.stderr.startswith((b"Error:", b"Usage:")), done.stderr
