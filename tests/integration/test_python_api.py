"""The Python API: what the command line does, without its output, its signals and its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from running import Workplace

import gxr_batch


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = Workplace(tmp_path)
    work.job("[engine]\nkind = 'echo'\n[export]\nformats = ['csv', 'report']\n")
    return work


def test_a_job_is_loaded_checked_run_and_read(work):
    job = gxr_batch.load_job("j.toml", ["sampling.temperature=0.4"])
    assert job.sampling.settings().temperature == 0.4
    checked = gxr_batch.check_job(job)
    assert (checked.rows, checked.usable, checked.resumes) == (60, 60, False)
    notices, seen = [], []
    result = gxr_batch.run_job(job, on_notice=notices.append, on_progress=lambda progress: seen.append(progress.done))
    assert result.finished
    assert result.counts.ok == 60
    assert result.results == result.folder / "results.parquet"
    assert result.exports == {"csv": "written", "report": "written"}
    assert seen[-1] == 60
    assert len(gxr_batch.read_results(result.folder)) == 60
    assert gxr_batch.check_job(job).resumes
    assert gxr_batch.run_job(job).exports == {"csv": "current", "report": "current"}


def test_limits_and_retries_are_keyword_arguments(work):
    job = gxr_batch.load_job("j.toml")
    assert gxr_batch.run_job(job, limit=7).counts.ok == 7
    assert gxr_batch.run_job(job, fresh=True, limit=3).counts.ok == 3


def test_nothing_is_printed_and_no_signal_handler_changes(work, capfd):
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    during = []
    job = gxr_batch.load_job("j.toml")
    gxr_batch.check_job(job)
    gxr_batch.run_job(job, on_progress=lambda _: during.append([signal.getsignal(number) for number in numbers]))
    assert capfd.readouterr() == ("", "")
    assert during
    assert all(handlers == before for handlers in during)


@pytest.mark.model
def test_preparing_the_demo_model_prints_nothing_either(work, tmp_path):
    code = "import gxr_batch; gxr_batch.check_job(gxr_batch.load_job('j.toml', ['engine.kind=auto']))"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert list((tmp_path / "cache").rglob("model.safetensors"))


def test_a_run_in_a_thread_is_stopped_cleanly_and_resumed(work):
    job = gxr_batch.load_job("j.toml", ["echo.tokens_per_second=40", "engine.slots=2"])
    stopper = gxr_batch.Stopper(grace_seconds=0)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(
            gxr_batch.run_job(job, stopper=stopper, on_progress=lambda seen: seen.done and stopper.ask("terminate"))
        )
    )
    thread.start()
    thread.join(60)
    (stopped,) = results
    assert (stopped.reason, stopped.finished, stopped.results) == ("terminate", False, None)
    assert 0 < stopped.counts.ok < 60
    faster = gxr_batch.load_job("j.toml")
    assert gxr_batch.run_job(faster).counts.ok == 60


def test_wrong_input_is_an_exception_with_what_where_and_next(work):
    with pytest.raises(gxr_batch.UserError) as caught:
        gxr_batch.load_job("j.toml", ["sampling.temprature=0.4"])
    assert "temperature" in str(caught.value)
    with pytest.raises(gxr_batch.GxrError, match="no such job file"):
        gxr_batch.load_job("nope.toml")


def test_a_failed_export_is_a_notice_and_part_of_the_result(work):
    job = gxr_batch.load_job("j.toml")
    gxr_batch.run_job(gxr_batch.load_job("j.toml", ["export.formats=[]"]))
    (work.folder / "outputs/j/results.csv").mkdir()
    notices: list[str] = []
    result = gxr_batch.run_job(job, on_notice=notices.append)
    assert result.exports == {"csv": "failed", "report": "written"}
    assert any("The export as csv failed; the results are safe." in notice for notice in notices)


def test_importing_the_package_imports_nothing_heavy_and_names_its_api():
    code = (
        "import sys; before = set(sys.modules); import gxr_batch; import gxr_batch as g\n"
        "assert set(g.__all__) <= set(dir(g))\n"
        "heavy = {'torch', 'pandas', 'pyarrow', 'pydantic', 'click', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert all(getattr(g, name) is not None for name in g.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": 0},
        {"limit": -1},
        {"limit": True},
        {"retry": "banana"},
        {"retry_rows": ["C1"]},
        {"retry": "failed", "retry_rows": "C1"},
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_touched(work, wrong):
    job = gxr_batch.load_job("j.toml")
    with pytest.raises(gxr_batch.UserError):
        gxr_batch.run_job(job, **wrong)
    assert not (work.folder / "outputs").exists()
    with pytest.raises(gxr_batch.UserError, match="list of strings"):
        gxr_batch.load_job("j.toml", "engine.kind=echo")


def test_every_progress_report_is_a_separate_object(work):
    seen = []
    gxr_batch.run_job(gxr_batch.load_job("j.toml"), on_progress=seen.append)
    assert seen[0].done == 0
    assert seen[-1].done == 60
