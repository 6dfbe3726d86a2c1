"""In addition to `test_jobs.py` and `test_inputs.py`: commented keys match the schema, and how schedules end."""

from __future__ import annotations

import configparser
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from places import ROOT
from pydantic import BaseModel
from running import catches

from gxr_batch.job import Job, load_job

JOBS = ROOT / "jobs"
REFERENCE = JOBS / "nightly_teaching_cases.toml"
SCHEDULE = JOBS / "schedule"


def keys_of_the_reference() -> dict[tuple[str, str], int]:
    """Return the line index of every key, set or commented out, by (section, key)."""
    found, section = {}, ""
    for index, line in enumerate(REFERENCE.read_text().splitlines()):
        if header := re.match(r"""(?:# )?\[([a-z.]+)(?:\."[^"]*")?\](?:\s|$)""", line):
            section = header[1]
            found[tuple(section.split("."))[-2:] if "." in section else (section, "")] = index
        elif key := re.match(r"(?:# )?([a-z_0-9]+) = ", line):
            found[section, key[1]] = index
    return found


def test_every_key_is_in_its_section_of_the_reference():
    found = keys_of_the_reference()
    for section, field in Job.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            missing = {key for key in field.annotation.model_fields if (section, key) not in found}
            assert not missing, f"[{section}] lacks {sorted(missing)}"


def test_every_commented_key_works(tmp_path):
    lines = REFERENCE.read_text().splitlines()
    for (section, key), index in keys_of_the_reference().items():
        if not key or not lines[index].startswith("# "):
            continue
        changed = [line.removeprefix("# ") if place == index else line for place, line in enumerate(lines)]
        if section in {"echo", "api", "vllm", "ray", "finetune"}:
            changed = [line.removeprefix("# ") if line.startswith(f"# [{section}]") else line for line in changed]
        if key == "section" or section == "form.section":  # of one of the form's headings
            changed = [re.sub(r'^# (?=\[form\.section\."Key findings"\])', "", line) for line in changed]
            changed = [re.sub(r"^sections = \[\]", 'sections = ["Key findings"]', line) for line in changed]
        if key == "choices":
            changed = [re.sub(r'^# kind = "text"', 'kind = "choice"', line) for line in changed]
        changed[index] = re.sub(r'= ""( .*e\.g\. ("[^"]+"))', r"= \2\1", changed[index])
        if key == "base":
            changed[index] = 'base = "some/model"'
        job_file = tmp_path / "job.toml"
        job_file.write_text("\n".join(changed))
        load_job(job_file)


def test_the_commented_sampling_keys_are_the_defaults(tmp_path):
    lines = REFERENCE.read_text().splitlines()
    for (section, _), index in keys_of_the_reference().items():
        if section == "sampling":
            lines[index] = lines[index].removeprefix("# ")
    (tmp_path / "job.toml").write_text("\n".join(lines))
    assert load_job(tmp_path / "job.toml").sampling.settings() == load_job(REFERENCE).sampling.settings()


def slurm(folder: Path, child: str, **more: str) -> subprocess.Popen[bytes]:
    """Start the Slurm script with fake gxr-batch and scontrol commands, and return once the child is ready.

    A child that keeps running is ready before the script has set its traps, the last of which is for TERM.
    """
    for name, body in {"gxr-batch": child, "scontrol": '#!/usr/bin/env bash\necho "$@" >> requeued'}.items():
        (folder / name).write_text(f"{body}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"} | more
    script = SCHEDULE / "gxr-batch.slurm"
    job = subprocess.Popen(["bash", str(script)], cwd=folder, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not ((folder / "ready").exists() and (catches(job.pid, signal.SIGTERM) or job.poll() is not None)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job


def test_a_slurm_job_that_is_cancelled_stops_cleanly_and_stays_cancelled(tmp_path):
    stops = "trap 'touch stopped; sleep 0.3; exit 75' TERM; touch ready; while :; do sleep 0.05; done"
    job = slurm(tmp_path, f"#!/usr/bin/env bash\n{stops}")
    os.killpg(job.pid, signal.SIGTERM)  # Slurm signals every process of the job: the run gets TERM twice
    assert job.wait(60) == 75
    assert (tmp_path / "stopped").exists()
    assert not (tmp_path / "requeued").exists()


def test_a_run_that_stops_at_once_when_warned_keeps_its_exit_code(tmp_path):
    # A slow `kill` lets the run end before the script checks whether it is still running.
    (tmp_path / "slow.sh").write_text('kill() { builtin kill "$@"; local code=$?; sleep 0.5; return $code; }\n')
    stops = "trap 'exit 75' USR1; touch ready; while :; do sleep 0.02; done"
    job = slurm(tmp_path, f"#!/usr/bin/env bash\n{stops}", BASH_ENV=str(tmp_path / "slow.sh"))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


def test_only_a_requeued_slurm_job_takes_over(tmp_path):
    says = '#!/usr/bin/env bash\necho "$@" > arguments; touch ready; exit 0'
    for count, ending in {"0": "", "2": " --take-over"}.items():
        assert slurm(tmp_path, says, SLURM_RESTART_COUNT=count).wait(60) == 0
        assert (tmp_path / "arguments").read_text() == f"run jobs/nightly_teaching_cases.toml{ending}\n"
        (tmp_path / "ready").unlink()


def unit(name: str) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # systemd's names are case-sensitive
    parser.read(SCHEDULE / name)
    return {section: dict(parser[section]) for section in parser.sections()}


def test_the_service_gives_a_stopping_run_more_time_than_the_job_needs():
    service = unit("gxr-batch.service")["Service"]
    assert float(service["TimeoutStopSec"]) > load_job(REFERENCE).run.grace_seconds
    assert service["WorkingDirectory"]
    assert set(service["SuccessExitStatus"].split()) == {"3", "75"}


def test_the_timer_never_starts_a_missed_run_during_the_day():
    assert "--stop-by" in unit("gxr-batch.service")["Service"]["ExecStart"]
    assert "Persistent" not in unit("gxr-batch.timer")["Timer"]
