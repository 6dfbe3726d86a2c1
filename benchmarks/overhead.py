"""Measures the overhead of gxr-batch around a model: `run` with the echo engine, each in a separate process.

Prints rows per second end to end, peak resident memory, the time of a second run with nothing to do, and of `--help`.

    python benchmarks/overhead.py               # 100, 100,000 and 1,000,000 rows
    python benchmarks/overhead.py --rows 20000
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("no", "focal", "consolidation", "pleural", "effusion", "right", "left", "lower", "lobe", "opacity", "heart")
JOB = """name = "overhead"
[input]
path = "{table}"
id_column = "case_id"
[engine]
kind = "echo"
[run]
output = "{output}"
"""


def write_table(path: Path, rows: int) -> None:
    """Write a findings table of `rows` rows, about 170 characters each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "age", "sex", "history", "findings", "comparison"])
        for number in range(rows):
            findings = " ".join(WORDS[(number * 7 + step * 5) % len(WORDS)] for step in range(16))
            writer.writerow([f"C{number:08d}", 20 + number % 70, "FM"[number % 2], "cough", f"{findings}.", ""])


def timed(*arguments: str) -> tuple[float, float]:
    """Run gxr-batch on one core; return wall seconds and peak resident MiB of the process."""
    command = [sys.executable, "-m", "gxr_batch", *arguments]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} exited with {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss / 1024


def measure(rows: int, folder: Path) -> None:
    """Print one line of the table: a run, and the same command again."""
    table, job = folder / f"{rows}.csv", folder / f"{rows}.toml"
    write_table(table, rows)
    job.write_text(JOB.format(table=table, output=folder / f"run-{rows}"))
    seconds, memory = timed("run", str(job), "--quiet")
    again, again_memory = timed("run", str(job), "--quiet")
    print(
        f"{rows:>10,} {seconds:>9.2f} {rows / seconds:>11,.0f} {memory:>9.0f} {again:>9.2f} {again_memory:>9.0f}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 100_000, 1_000_000])
    rows = parser.parse_args().rows
    helps = [timed("--help")[0] for _ in range(6)][1:]
    print(f"--help: {statistics.median(helps):.3f} s (median of 5, warm)\n")
    print(f"{'rows':>10} {'first s':>9} {'rows/s':>11} {'MiB':>9} {'again s':>9} {'MiB':>9}")
    with tempfile.TemporaryDirectory(prefix="gxr-batch-overhead-") as scratch:
        for count in rows:
            measure(count, Path(scratch))


if __name__ == "__main__":
    main()
