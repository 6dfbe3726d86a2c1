"""Measures how time, memory and files of a run grow with its table, with real commands and the echo engine.

Checkpoints every 0.1 s make small parts, which are compacted all the time. "MiB" is the peak resident memory of the
command's process (with Ray: of the driver), "B/row" its growth per row since the first size. "files" is the highest
number of files in the run folder, counted twenty times per second. "again" is the same command with nothing left to do.
"resume" reads the table again, finds every row in the parts and merges the results, as after a replaced table. "time"
is the seconds per row relative to the first size, and "cpu" the same for CPU seconds, which other processes on the
machine affect less.

    python benchmarks/large.py                          # 100,000 and 1,000,000 rows
    python benchmarks/large.py --rows 100000 1000000 10000000
    python benchmarks/large.py --rows 20000 100000 --engine ray     # two workers on this machine
    python benchmarks/large.py --input parquet
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow.csv
import pyarrow.parquet as pq
from overhead import write_table

JOB = """name = "large"
[input]
path = "{table}"
id_column = "case_id"
[engine]
kind = "{engine}"
[ray]
worker = "echo"
workers = 2
cpus_per_worker = 1
[run]
output = "{output}"
checkpoint_seconds = 0.1
"""
HEAD = (
    "rows",
    "seconds",
    "rows/s",
    "time",
    "cpu s",
    "cpu",
    "MiB",
    "B/row",
    "files",
    "results MiB",
    "again s",
    "resume s",
    "MiB",
)
WIDTHS = (11, 9, 8, 6, 8, 6, 7, 8, 6, 12, 8, 9, 7)


class Seen(NamedTuple):
    """One command: wall and CPU seconds, peak resident MiB, highest number of files in the run folder."""

    seconds: float
    cpu_seconds: float
    mebibytes: float
    files: int


def watched(folder: Path, *arguments: str) -> Seen:
    """Run gxr-batch and count the files in its run folder meanwhile."""
    began, files = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "gxr_batch", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        files = max(files, sum(len(names) for _, _, names in os.walk(folder)))
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} exited with {process.returncode}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Seen(time.perf_counter() - began, cpu_seconds, usage.ru_maxrss / 1024, files)


def table_of(rows: int, kind: str, scratch: Path) -> Path:
    """Write the table; as Parquet with one row group, the worst case for reading in pieces."""
    path = scratch / f"{rows}.csv"
    write_table(path, rows)
    if kind == "parquet":
        table = pyarrow.csv.read_csv(path)
        path.unlink()
        path = path.with_suffix(".parquet")
        pq.write_table(table, path, row_group_size=max(rows, 1))
    return path


def measure(rows: int, options: argparse.Namespace, scratch: Path) -> tuple[int, Seen, float, Seen, Seen]:
    """Run a table of `rows` rows, run it again, and run it without results.parquet, which reads the table again."""
    output, job = scratch / f"run-{rows}", scratch / f"{rows}.toml"
    table = table_of(rows, options.input, scratch)
    job.write_text(JOB.format(table=table, output=output, engine=options.engine))
    first = watched(output, "run", str(job), "--quiet")
    size = (output / "results.parquet").stat().st_size / 2**20
    again = watched(output, "run", str(job), "--quiet")
    (output / "results.parquet").unlink()
    resumed = watched(output, "run", str(job), "--quiet")
    subprocess.run(["rm", "-r", output, table], check=True)
    return rows, first, size, again, resumed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--engine", choices=["echo", "ray"], default="echo")
    parser.add_argument("--input", choices=["csv", "parquet"], default="csv")
    options = parser.parse_args()
    print(f"engine {options.engine}, {options.input} input")
    print(" ".join(f"{name:>{width}}" for name, width in zip(HEAD, WIDTHS, strict=True)), flush=True)
    base: tuple[int, Seen] | None = None
    with tempfile.TemporaryDirectory(prefix="gxr-batch-large-") as scratch:
        for count in options.rows:
            rows, first, size, again, resumed = measure(count, options, Path(scratch))
            base = base or (rows, first)
            time_ratio = first.seconds / rows / (base[1].seconds / base[0])
            cpu_ratio = first.cpu_seconds / rows / (base[1].cpu_seconds / base[0])
            grown = (first.mebibytes - base[1].mebibytes) * 2**20 / (rows - base[0]) if rows != base[0] else 0.0
            cells = (
                f"{rows:,}",
                f"{first.seconds:.1f}",
                f"{rows / first.seconds:,.0f}",
                f"{time_ratio:.2f}",
                f"{first.cpu_seconds:.1f}",
                f"{cpu_ratio:.2f}",
                f"{first.mebibytes:.0f}",
                f"{grown:.0f}",
                f"{first.files:,}",
                f"{size:.1f}",
                f"{again.seconds:.1f}",
                f"{resumed.seconds:.1f}",
                f"{resumed.mebibytes:.0f}",
            )
            print(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)


if __name__ == "__main__":
    main()
