"""Starts the real command in tests: a job file in a folder, a child process, its output and exit code."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.parquet as pq
import pytest
from places import SUPPORT

COMMAND = [sys.executable, "-m", "gxr_batch"]
FAULTY_COMMAND = [sys.executable, str(SUPPORT / "faulty_cli.py"), "--faults"]

Faults = Mapping[str, Any]  # of `faulty_engine.Faults`


class Workplace:
    """A folder with one job, in which the command runs as a user would start it.

    Faults of the call, or else of the workplace, are played by its echo engine; {} means none.
    """

    faults: Faults = MappingProxyType({})

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job("[engine]\nkind = 'echo'\n")
        self.table(60)

    @classmethod
    def copy_of(cls, made: Path, folder: Path) -> Workplace:
        """Return a workplace that continues from a copy of another one's folder."""
        shutil.copytree(made, folder)
        place = cls.__new__(cls)
        place.folder = folder
        return place

    def job(self, sections: str, *, head: str = "path = 'f.csv'\nid_column = 'case_id'\n") -> None:
        text = f"name = 'j'\n[input]\n{head}{sections}"
        (self.folder / "j.toml").write_text(text)

    def table(self, rows: int | Sequence[Sequence[str]], header: Sequence[str] = ("case_id", "findings")) -> None:
        if isinstance(rows, int):
            rows = [(f"C{number}", f"finding number {number}") for number in range(rows)]
        with (self.folder / "f.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    def command(self, faults: Faults | None = None) -> list[str]:
        faults = self.faults if faults is None else faults
        return [*FAULTY_COMMAND, json.dumps(dict(faults))] if faults else COMMAND

    def start(self, *arguments: str, faults: Faults | None = None) -> subprocess.Popen[str]:
        command = [*self.command(faults), *arguments]
        return subprocess.Popen(command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def gxr(
        self, *arguments: str, expect: int | None = 0, faults: Faults | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [*self.command(faults), *arguments]
        done = subprocess.run(command, cwd=self.folder, text=True, capture_output=True, timeout=280, check=False)
        assert expect is None or done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def run(
        self, *arguments: str, expect: int | None = 0, faults: Faults | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.gxr("run", "j.toml", *arguments, expect=expect, faults=faults)

    def run_json(self, *arguments: str, expect: int | None = 0, faults: Faults | None = None) -> dict:
        return json.loads(self.run("--json", *arguments, expect=expect, faults=faults).stdout)

    def results(self, run: str = "outputs/j") -> list[dict]:
        return pq.read_table(self.folder / run / "results.parquet").to_pylist()

    def manifest(self, run: str = "outputs/j") -> dict:
        return json.loads((self.folder / run / "run.json").read_text())

    def parts(self, run: str = "outputs/j") -> list[Path]:
        return sorted((self.folder / run / "parts").glob("part-*.parquet"))


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has installed a handler for a signal; False once it has ended (Linux)."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def mostly_long(cases: Sequence[Any], *, every: int) -> list[Any]:
    """Return cases for parametrize: `make test` runs one in `every`, `make test-long` all."""
    return [
        case if number % every == 0 else pytest.param(case, marks=pytest.mark.long) for number, case in enumerate(cases)
    ]


def without_times(rows: list[dict]) -> list[dict]:
    """Return result rows without the fields that may differ between two identical runs."""
    timed = ("gxr_seconds", "gxr_tokens_per", "gxr_rows_in", "gxr_started", "gxr_finished_at")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]
