"""A rehearsal of benchmarks/cuda.py: every step on the CPU, in Triton's interpreter, with tiny shapes.

The packages are those of a machine with torch, transformers and Triton, and what the script's help says to carry.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "cuda.py"
FIRST = ["agree", "tokens", "alongside", "graphs", "memory", "ballast"]
SECOND = ["roofline", "steps", "useful", "generate"]
# Runs the script with two steps more: one that fails, and one that never ends.
PLANTED = """
import time, cuda

def fails(bench, found):
    found["so far"] = 1
    raise RuntimeError("planted")

def hangs(bench, found):
    while True:
        time.sleep(0.01)

cuda.FIRST = {"fails": fails, **cuda.FIRST, "hangs": hangs}
cuda.main()
"""


def with_needs(names: list[str]) -> set[str]:
    """Return the distributions and, without extras, all that they need."""
    found: set[str] = set()
    while names:
        name = names.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            needed = [Requirement(one) for one in requires]
            names += [one.name.lower() for one in needed if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Return a folder that has the packages of such a machine, and no others."""
    carried = re.search(r"--python-version \S+ (.+)", SCRIPT.read_text())
    assert carried
    folder = tmp_path_factory.mktemp("packages")
    for name in with_needs(["torch", "transformers", "triton", *carried[1].split()]):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (folder / top).unlink(missing_ok=True)  # two distributions may share one
            (folder / top).symlink_to(distribution(name).locate_file(top))
    return folder


def rehearse(packages: Path, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (packages, ROOT, SCRIPT.parent)))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-S", "-P", "-c", PLANTED, "--device", "cpu", "--shape", "tiny", *options]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1800)
def test_every_step_runs_and_one_that_fails_leaves_the_others(packages, tmp_path):
    out = tmp_path / "out.json"
    steps = ",".join(["fails", *FIRST, *SECOND])
    done = rehearse(packages, tmp_path, "--only", steps, "--seconds", "1700", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["steps"]
    assert list(found) == ["fails", *FIRST, *SECOND]
    failed = found.pop("fails")
    assert failed["failed"] == "RuntimeError: planted"
    assert failed["so far"] == 1
    assert not [(name, own["failed"]) for name, own in found.items() if "failed" in own or "left out" in own]
    assert found["agree"]["float32, reproducible = True"] == {"why": "agrees", "same bits alone and together": True}
    differing = {name: value for own in found.values() for name, value in own.items() if "rows that differ" in name}
    assert len(differing) == 6
    assert set(differing.values()) == {0}
    assert len(found["steps"]) == 4 + 1  # and its seconds
    assert json.loads(done.stdout[done.stdout.rindex("\n{") :]) == {"generate": found["generate"]}


def test_a_step_ends_when_the_time_is_up(packages, tmp_path):
    done = rehearse(packages, tmp_path, "--only", "hangs,memory", "--seconds", "1")
    assert done.returncode == 0, done.stderr
    assert '"failed": "the time is up"' in done.stdout
    assert '"left out": "no time"' in done.stdout


def test_packages_that_the_machine_lacks_are_not_there(packages):
    there = {path.name for path in packages.iterdir()}
    assert {"torch", "transformers", "triton", "pydantic", "pyarrow"} <= there
    assert not there & {"bitsandbytes", "pandas", "peft", "openai", "openpyxl", "psutil"}


def test_steps_that_are_not_there_are_refused():
    done = subprocess.run([sys.executable, SCRIPT, "--only", "speed"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "speed: choose from agree, tokens" in done.stderr
