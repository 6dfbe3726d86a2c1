"""One writer per run folder: on this host the system's lock decides, for other hosts the content of run.lock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from running import COMMAND, Workplace

# 60 s for all, 1 s for a row.
SLOW = "[engine]\nkind = 'echo'\nslots = 1\n[echo]\ntokens_per_second = 20\n[run]\ncheckpoint_seconds = 0.1\n"
ELSEWHERE = ["unshare", "--uts", "sh", "-c", 'hostname node-7 && exec "$@"', "sh"]


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    made = Workplace(tmp_path)
    made.run("--limit", "5")
    return made


def write_lock(work: Workplace, **changes) -> None:
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "since": "2026-01-01T00:00:00+00:00",
    }
    (work.folder / "outputs/j/run.lock").write_text(json.dumps(record | changes))


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_run_that_ended_cleanly_leaves_no_holder_in_the_lock(work):
    lock = work.folder / "outputs/j/run.lock"
    assert not lock.exists() or lock.read_text() == ""


def test_a_dead_holder_on_this_host_is_taken_over(work):
    write_lock(work, pid=dead_pid())
    assert work.run_json()["generated_now"] == 55


def test_a_reused_pid_is_not_a_holder(work):
    write_lock(work, started=psutil.Process().create_time() - 3600)
    assert work.run_json()["generated_now"] == 55


def test_on_a_file_system_without_locks_the_record_keeps_others_out(work):
    write_lock(work)  # this test process, which holds no system lock on the file
    done = work.run(expect=4)
    assert f"process {os.getpid()} on {socket.gethostname()}" in done.stderr
    assert "--take-over" not in done.stderr
    work.run("--take-over", expect=4)


def test_a_holder_on_another_host_is_taken_over_only_on_request(work):
    write_lock(work, host="node-7", pid=12)
    done = work.run(expect=4)
    assert "process 12 on node-7 since 2026-01-01" in done.stderr
    assert "--take-over" in done.stderr
    status = json.loads(work.gxr("status", "outputs/j", "--json").stdout)[0]
    assert (status["state"], status["seconds_left"]) == ("held elsewhere", None)
    assert "process 12 on node-7" in status["holder"]
    assert "alive or dead" in " ".join(work.gxr("status", "outputs/j").stdout.split())
    assert work.run_json("--take-over")["generated_now"] == 55
    assert "process 12 on node-7" in work.manifest()["invocations"][-1]["took_over"]
    assert "Taken over from process 12 on node-7" in (work.folder / "outputs/j/log.jsonl").read_text()
    assert work.run_json()["generated_now"] == 0, "after an orderly end nothing blocks it"


@pytest.mark.parametrize("content", ['{"host": "node-7"}', '{"host": "node-7", "pid": 3}'])
def test_a_host_alone_is_enough_to_keep_another_out(work, content):
    (work.folder / "outputs/j/run.lock").write_text(content)
    assert "on node-7" in work.run(expect=4).stderr
    work.run("--take-over")


BAD_PID = '{"host": "a", "pid": "x", "started": 0, "since": ""}'


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', BAD_PID])
def test_an_invalid_lock_file_locks_nobody_out(work, content):
    (work.folder / "outputs/j/run.lock").write_text(content)
    assert work.run_json()["generated_now"] == 55


def test_a_run_that_died_in_another_container_of_this_machine_is_resumed(work):
    """Only the host name differs: boot and file are the same, and the system grants the lock of a dead process."""
    if not shutil.which("unshare") or subprocess.run([*ELSEWHERE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not permit changing a process's host name (unshare --uts)")
    work.job(SLOW)
    there = subprocess.Popen(
        [*ELSEWHERE, *COMMAND, "run", "j.toml"], cwd=work.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    before, deadline = len(work.parts()), time.monotonic() + 60
    while len(work.parts()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    refused = work.run(expect=4).stderr
    assert "on node-7" in refused, "while it lives"
    assert "--take-over" not in refused, "this machine's lock is certain, so it would not help"
    work.run("--take-over", expect=4)
    there.send_signal(signal.SIGKILL)
    there.wait()
    lock = work.folder / "outputs/j/run.lock"
    record = json.loads(lock.read_text())
    for other in ({"boot": "another boot"}, {"file": "1:2"}, {"boot": "", "file": ""}):
        lock.write_text(json.dumps(record | other))
        refused = work.run(expect=4).stderr
        assert "on node-7" in refused, "dead or not: the state of another machine is unknown"
        assert "--take-over" in refused
    lock.write_text(json.dumps(record))
    done = work.run("--set", "echo.tokens_per_second=0")
    assert "Taken over from process" in done.stderr
    assert len(work.results()) == 60


def test_a_run_that_another_host_took_over_writes_nothing_more(work):
    """As on a file system without locks, where two nodes may begin at the same moment."""
    (work.folder / "j.toml").write_text((work.folder / "j.toml").read_text().partition("[engine]")[0] + SLOW)
    before = len(work.parts())
    child = work.start("run", "j.toml", "--quiet")
    deadline = time.monotonic() + 60
    while len(work.parts()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    write_lock(work, host="node-7")
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said.count("Error:")) == (4, 1), said
    assert "This process lost its lock: another took over" in said
    assert json.loads((work.folder / "outputs/j/run.lock").read_text())["host"] == "node-7"


def test_a_run_that_was_set_aside_has_no_holder(work):
    work.job(SLOW)
    fresh = work.start("run", "j.toml", "--fresh")
    deadline = time.monotonic() + 60
    while not (found := list((work.folder / "outputs").glob("j.before-*"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    states = {one["run"]: one["state"] for one in json.loads(work.gxr("status", "outputs", "--json").stdout)}
    fresh.kill()
    fresh.communicate()
    assert states[str(found[0].relative_to(work.folder))] != "running"
