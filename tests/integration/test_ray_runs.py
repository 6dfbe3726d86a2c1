"""Whole runs with engine.kind = "ray": real workers, a killed driver, an existing cluster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from places import ROOT, SUPPORT
from running import Workplace, without_times

from gxr_batch.cli.status import _one
from gxr_batch.run.status import RunStatus

RAY = "[engine]\nkind = 'ray'\n[ray]\nworker = 'echo'\nworkers = 2\n"
SLOW = "[run]\ncheckpoint_seconds = 0.2\n[echo]\ntokens_per_second = 5\n"
MODEL = "[sampling]\nmax_new_tokens = 8\n[engine]\nslots = 4\n"


@pytest.fixture
def work(tmp_path):
    return Workplace(tmp_path)


def wait_until(true: Callable[[], object], child: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a condition is true, while the child is alive or was killed by us."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        assert child.poll() in {None, -9}, child.communicate()
        time.sleep(0.05)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if child.name().startswith("ray::Worker")]


def plant(folder: Path, *names: str) -> None:
    """Write modules that leave a file RAN-<name> if they are imported."""
    for name in names:
        marker = folder / f"RAN-{name}"
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ImportError('planted')\n")


CONSOLE = str(Path(sys.executable).with_name("gxr-batch"))


@pytest.mark.parametrize("command", [[CONSOLE], [sys.executable, "-m", "gxr_batch"]], ids=["script", "module"])
def test_nothing_is_imported_from_the_current_folder(work, command):
    work.job(RAY)
    # `python -m gxr_batch` runs the module of that name in the current folder first: Python decides that.
    plant(work.folder, "pyarrow", "click", "ray", *(["gxr_batch"] if len(command) == 1 else []))
    done = subprocess.run([*command, "run", "j.toml"], cwd=work.folder, capture_output=True, text=True, check=False)
    assert not list(work.folder.glob("RAN-*")), done.stderr
    assert done.returncode == 0, done.stderr


def test_no_other_user_reaches_the_ray_that_a_run_starts(work):
    work.job(RAY + SLOW)
    child = work.start("run", "j.toml")
    wait_until(work.parts, child)
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    listening = [place for each in family for place in each.net_connections("inet") if place.status == "LISTEN"]
    assert len(listening) >= 5
    assert {place.laddr.ip.removeprefix("::ffff:") for place in listening} == {"127.0.0.1"}
    logs = [Path(file.path) for file in workers_of(child)[0].open_files()]
    (folder,) = {parent for log in logs for parent in log.parents if parent.name.startswith("gxr-ray-")}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.is_relative_to(folder / "r") for path in folder.rglob("*"))
    child.kill()
    child.communicate()
    assert all_end(family)


def all_end(processes: list[psutil.Process]) -> bool:
    """Wait until none of the processes runs any more; return False after more than a minute."""
    deadline = time.monotonic() + 60
    while left := [process for process in processes if _runs(process)]:
        if time.monotonic() > deadline:
            return False
        psutil.wait_procs(left, timeout=0.2)
    return True


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def has_event(work: Workplace, name: str) -> bool:
    log = work.folder / "outputs/j/log.jsonl"
    return log.exists() and f'"event": "{name}"' in log.read_text()


def results_exist(work: Workplace) -> bool:
    return (work.folder / "outputs/j/results.parquet").exists()


def texts(work: Workplace) -> dict[str, str]:
    return {row["case_id"]: row["gxr_text"] for row in work.results()}


def test_the_run_folder_records_what_became_of_a_worker(work):
    work.table(12)
    work.job("[engine]\nkind = 'ray'\nslots = 4\n[ray]\nworker = 'echo'\nworkers = 1\n")
    assert "9 slots from now on." in work.run(faults={"more_slots": 9}).stderr
    (entry,) = work.manifest()["invocations"]
    assert (entry["engine"]["slots"], entry["engine"]["reproducible"]) == (9, False)


@pytest.mark.model
def test_two_workers_write_the_same_texts_as_one_process(work, demo_model_dir):
    work.table(12)
    work.job(MODEL + "kind = 'transformers'\n[run]\noutput = 'outputs/alone'\n")
    work.run()
    work.job(MODEL + "kind = 'ray'\n[ray]\nworkers = 2\n")
    summary = work.run_json()
    assert (summary["ok"], summary["failed"]) == (12, 0)
    assert without_times(work.results()) == without_times(work.results("outputs/alone"))
    manifest = work.manifest()
    assert manifest["resolved"]["ray.worker"] == "transformers"
    (entry,) = manifest["invocations"]
    assert entry["engine"]["slots"] == 8
    # How many rows each gets depends on speed; with so few tokens, one may finish most before the other writes any.
    assert sum(entry["workers"]["rows"]) == 12
    assert min(entry["workers"]["rows"]) >= 1, "both wrote"
    shares = sum(row["gxr_seconds_share"] for row in work.results())
    assert shares <= entry["streaming_seconds"] * 1.02


def test_a_killed_driver_leaves_nothing_behind_and_its_run_resumes_with_other_workers(work):
    work.table(200)
    work.job("[engine]\nkind = 'echo'\n")
    work.run()
    expected = texts(work)
    shutil.rmtree(work.folder / "outputs")
    work.job(RAY + SLOW)
    child = work.start("run", "j.toml")
    wait_until(work.parts, child)
    assert work.manifest()["resolved"].get("engine.slots") is None, "a pool's slots are a sum, not a setting"
    (state,) = json.loads(work.gxr("status", "--json", "outputs/j").stdout)
    assert state["workers"] | {"rows": []} == {"alive": 2, "lost": 0, "rows": []}
    family = psutil.Process(child.pid).children(recursive=True)
    logs = [Path(file.path) for file in workers_of(child)[0].open_files()]
    (folder,) = {parent for log in logs for parent in log.parents if parent.name.startswith("gxr-ray-")}
    child.kill()
    child.communicate()
    wait_until(lambda: not folder.exists(), child, 60)
    assert all_end(family)
    refused = work.run("--set", "ray.worker=api", "--set", "api.model=m", expect=2)
    assert "ray.worker" in refused.stderr
    summary = work.run_json("--set", "ray.workers=1", "--set", "echo.tokens_per_second=0")
    assert 0 < summary["generated_now"] < 200
    assert texts(work) == expected
    assert len(work.results()) == 200


def test_a_run_whose_worker_is_killed_has_the_same_results(work):
    work.table(120)
    work.job("[engine]\nkind = 'echo'\n")
    work.run()
    expected = texts(work)
    shutil.rmtree(work.folder / "outputs")
    work.job(RAY + SLOW.replace("= 5", "= 20"))
    child = work.start("run", "j.toml", "--json")
    wait_until(work.parts, child)
    victim, other = workers_of(child)
    victim.kill()
    assert not results_exist(work), "the kill came after the last row"
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert all_end([other]), "it ended with the run"
    summary = json.loads(out)
    assert (summary["ok"], summary["failed"], summary["generated_now"]) == (120, 0, 120)
    assert texts(work) == expected
    (entry,) = work.manifest()["invocations"]
    assert (entry["outcome"], entry["workers"]["lost"]) == ("finished", 1)
    assert sum(entry["workers"]["rows"]) == 120
    assert 1 <= entry["retries"] <= 16, "the rows that it had, and no others, ran again"
    keys = [row for part in work.parts() for row in pq.read_table(part, columns=["gxr_row_id"]).to_pylist()]
    assert len(keys) == 120, "a row was written twice"
    assert err.count("was lost; it will be replaced") == 1
    events = [json.loads(line) for line in (work.folder / "outputs/j/log.jsonl").read_text().splitlines()]
    assert [event["lost"] for event in events if event["event"] == "workers"][-1] == 1


def in_foreground(work: Workplace, *arguments: str) -> subprocess.Popen[str]:
    """Start a run as a terminal does, in its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "gxr_batch", "run", "j.toml", "--json", *arguments],
        cwd=work.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def test_a_second_ctrl_c_ends_a_run_and_its_ray_at_once(work):
    work.job(RAY + SLOW + "[sampling]\nmax_new_tokens = 1000\n")
    work.table([(f"C{number}", "word " * 400) for number in range(60)])
    child = in_foreground(work, "--set", "run.grace_seconds=200")
    wait_until(lambda: has_event(work, "workers"), child)
    family = psutil.Process(child.pid).children(recursive=True)
    os.killpg(child.pid, 2)
    wait_until(lambda: has_event(work, "stop_requested"), child)
    os.killpg(child.pid, 2)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert all_end(family)


def test_ctrl_c_ends_a_run_and_its_ray_cleanly(work):
    work.job(RAY + SLOW)
    child = in_foreground(work, "--set", "run.grace_seconds=1")
    wait_until(work.parts, child)
    family = psutil.Process(child.pid).children(recursive=True)
    os.killpg(child.pid, 2)  # as a terminal does: to every foreground process
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    summary = json.loads(out)
    assert 0 < summary["ok"] < 60
    assert "lost" not in err
    assert all_end(family)


def test_an_existing_cluster_is_used_and_may_lose_a_host(work, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folder = tempfile.mkdtemp(prefix="gxr-cluster-", dir="/tmp")  # short, since socket paths are limited
    work.table(96)  # six rounds of the two workers' slots, so that both hold rows when one host goes
    command = [sys.executable, str(SUPPORT / "ray_cluster.py")]
    environment, pipe = os.environ | {"RAY_TMPDIR": folder}, subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as cluster:
        assert cluster.stdout is not None
        assert cluster.stdin is not None
        address = cluster.stdout.readline().strip()
        work.job(RAY.replace("workers = 2", f"address = '{address}'") + SLOW.replace("= 5", "= 20"))
        child = work.start("run", "j.toml", "--json")
        wait_until(work.parts, child)
        cluster.stdin.write("\n")
        cluster.stdin.flush()
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert json.loads(out)["ok"] == 96
        entry = work.manifest()["invocations"][0]
        assert entry["workers"]["lost"] == 1
        assert len(entry["workers"]["rows"]) == 2, "a worker for each host"
        assert entry["retries"] >= 1
        assert err.count("was lost; it will be replaced") == 1
        assert "Traceback" not in err
        assert cluster.stdout.readline() == "gone\n"
        cluster.stdin.close()
        assert cluster.wait(60) == 0, "the run must not stop the cluster"
    shutil.rmtree(folder)


def test_status_shows_how_many_workers_are_alive_and_how_many_were_lost():
    known = {"run": "outputs/j", "name": "j", "ok": 5, "failed": 0, "held": 0, "left": 3}
    running = RunStatus(state="running", workers={"alive": 1, "lost": 2, "rows": [3, 2]}, **known)
    assert "  workers    1 alive, 2 lost" in list(_one(running))
    finished = RunStatus(state="finished", workers={"alive": 2, "lost": 0, "rows": [3, 2]}, **known)
    assert "worker" not in "".join(_one(finished))


def test_a_cluster_that_is_not_there_is_exit_4(work):
    work.job(RAY + "address = '127.0.0.1:9'\n")
    done = work.run(expect=4)
    assert "Cannot connect to a Ray cluster" in done.stderr
    assert "ray.address = 127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_that_requires_a_token_is_exit_4(work, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(work.folder))  # where Ray would look for one
    with socket.create_server(("127.0.0.1", 0)) as server:
        work.job(RAY + f"address = '127.0.0.1:{server.getsockname()[1]}'\n")
        done = work.run(expect=4)
    assert "Cannot connect to a Ray cluster (AuthenticationError)" in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_run_that_loses_the_head_of_its_cluster_is_exit_4_and_resumes_later(work):
    work.table(400)
    work.job(RAY + SLOW)
    child = work.start("run", "j.toml")
    wait_until(work.parts, child)
    family = psutil.Process(child.pid).children(recursive=True)
    (head,) = [process for process in family if process.name() == "gcs_server"]
    head.kill()
    _, err = child.communicate(timeout=120)
    assert child.returncode == 4, err
    assert "its head cannot be reached" in err
    assert work.manifest()["invocations"][-1]["outcome"] == "broken off"
    assert all_end(family)
    summary = work.run_json("--set", "echo.tokens_per_second=0")
    assert summary["ok"] == 400
    assert summary["generated_now"] < 380


def test_without_ray_a_run_names_what_to_install_and_ends_with_4(work):
    (work.folder / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")
    work.job(RAY)
    environment = os.environ | {"PYTHONPATH": f"{work.folder}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "gxr_batch", "run", "j.toml"],
        cwd=work.folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert f"pip install -c {ROOT / 'constraints.txt'} -e '{ROOT}[ray]'" in done.stderr


@pytest.mark.long
def test_the_slurm_script_starts_a_ray_runs_the_job_and_ends_both(work, monkeypatch):
    """With real `ray start` processes as two hosts; `srun` is a fake that runs its command here."""
    script = ROOT / "jobs/schedule/gxr-batch-ray.slurm"
    bodies = {
        "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"',
        "gxr-batch": f'exec {sys.executable} -m gxr_batch "$@"',
        "ray": f'exec {Path(sys.executable).with_name("ray")} "$@"',
    }
    for name, body in bodies.items():
        (work.folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (work.folder / name).chmod(0o755)
    work.job("[ray]\nworker = 'echo'\ncpus_per_worker = 1\n")
    folder = tempfile.mkdtemp(prefix="gxr-slurm-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("PATH", f"{work.folder}:{os.environ['PATH']}")
    given = {"JOB_ID": "77", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "1"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in given.items()} | {"SLURMD_NODENAME": "here"}
    done = subprocess.run(["bash", str(script), "j.toml"], cwd=work.folder, env=environment, timeout=280, check=False)
    shutil.rmtree(folder)
    assert done.returncode == 0
    assert len(work.results()) == 60
    assert len(work.manifest()["invocations"][0]["workers"]["rows"]) == 2
