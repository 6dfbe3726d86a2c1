"""The job files load, the reference names every key, and the schedules do what their comments say."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from places import ROOT
from pydantic import BaseModel
from running import catches

from gxr_batch.finetune.examples import read_examples
from gxr_batch.job import Job, load_job

JOBS = ROOT / "jobs"
SLURM = JOBS / "schedule" / "gxr-batch.slurm"


def test_the_demo_job_runs_the_whole_sample_table_on_the_demo_model():
    job = load_job(JOBS / "demo.toml")
    assert (job.name, job.model.path, job.prompt.template) == ("demo", "demo", "clinical_case")
    assert (job.input.path, job.input.id_column) == ("inputs/findings.csv", "case_id")
    settings = job.sampling.settings()
    assert (settings.max_new_tokens, settings.temperature, settings.repetition_penalty) == (256, 0.3, 1.0)
    assert job.warnings() == []
    assert job.run.output == "outputs/{name}"


def test_the_reference_job_loads_and_equals_the_defaults():
    job = load_job(JOBS / "nightly_teaching_cases.toml")
    plain = Job(name=job.name, input=job.input)
    assert job.sampling == plain.sampling
    assert job.engine == plain.engine
    assert job.warnings() == []


def test_the_reference_job_names_every_key():
    text = (JOBS / "nightly_teaching_cases.toml").read_text()
    for section, field in Job.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        part = text.split(f"[{section}]")[1].split("\n[" if section not in {"input", "prompt"} else "\0")[0]
        for key in model.model_fields:
            named = rf"""^(# )?{key} = |^\[{section}\.{key}\]|^# \[{section}\.{key}\."[^"]+"\]"""
            assert re.search(named, part, re.MULTILINE), f"{section}.{key}"


def test_the_crontab_changes_folder_and_escapes_its_percent_signs():
    (line,) = [line for line in (JOBS / "schedule/crontab").read_text().splitlines() if not line.startswith("#")]
    assert re.match(r"\d+ \d+ \* \* \* cd ", line)
    assert re.sub(r"\\%", "", line).count("%") == 0


def slurm(folder: Path, child: str) -> subprocess.Popen[str]:
    """Start the Slurm script with fake gxr-batch and scontrol commands."""
    for name, body in {"gxr-batch": child, "scontrol": 'echo "$@" >> requeued'}.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    return subprocess.Popen(["bash", str(SLURM)], cwd=folder, env=environment)


@pytest.mark.parametrize("code", [0, 3, 4])
def test_a_slurm_job_passes_on_the_exit_code(tmp_path, code):
    assert slurm(tmp_path, f"exit {code}").wait(60) == code
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("code", [75, 0, 3])
def test_a_slurm_job_that_is_warned_stops_cleanly_and_is_requeued_only_if_unfinished(tmp_path, code):
    child = f"trap 'touch warned; sleep 0.5; exit {code}' USR1; touch ready; while :; do sleep 0.05; done"
    job = slurm(tmp_path, child)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "ready").exists() and catches(job.pid, signal.SIGTERM)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == code
    assert (tmp_path / "warned").exists()
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 77\n" if code == 75 else "")


def test_the_training_data_of_the_demo_adapter_teaches_all_four_templates_in_one_layout():
    job = load_job(JOBS / "demo_adapter.toml", table=False)
    examples, files = read_examples(job)
    assert len(examples) == sum(file.rows for file in files) >= 300
    templates = {example.messages.template for example in examples}
    assert templates == {"basic", "clinical_case", "educational", "comparative"}
    assert len({example.messages for example in examples}) == len(examples)
    prompts = "\n".join(example.messages.turns[-1].text for example in examples)
    with (JOBS.parent / "inputs/findings.csv").open(encoding="utf-8", newline="") as file:
        assert not [row["case_id"] for row in csv.DictReader(file) if row["findings"][:60] in prompts], (
            "it is evaluated on"
        )
    parts = re.compile(r"Impression: .+\n\nKey findings:(\n- .+){2,4}\n\nDifferential: .+\n\nTeaching point: .+")
    for example in examples:
        assert parts.fullmatch(example.answer), example.where
