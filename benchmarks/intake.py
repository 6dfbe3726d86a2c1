"""Measures the intake of tables (survey, types, ids, content hashes) by itself, and against another version.

Each measurement is a new process; the versions take turns, and the seconds are the best of the rounds. "ratio" is the
other version's seconds divided by this one's, the median of the rounds: above 1, this one is faster. The ratio of the
best seconds varied by 7 % between runs of the same two versions. CPU seconds are those of user and system, which other
processes on the machine affect less. "MiB" is the peak resident memory of the process.

    python benchmarks/intake.py                                   # 200,000 rows, and memory for 1,000,000
    git worktree add ../before COMMIT
    python benchmarks/intake.py --against ../before --rounds 7
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import pyarrow.csv
import pyarrow.parquet as pq
from overhead import write_table

TABLES = ("short.csv", "long.csv", "short.parquet", "long.parquet")
LONG_REPORT = 12  # times the findings of a short row, about 1,500 characters
JOB = """name = "intake"
[input]
path = "{table}"
id_column = "case_id"
[engine]
kind = "echo"
"""
# Run with the root of either version in PYTHONPATH.
CHILD = """
import json, resource, sys, time
from pathlib import Path
from gxr_batch.job import load_job
from gxr_batch.rows.ingest import ingest
from gxr_batch.run.prepare import prepare

def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

import pyarrow.parquet, gxr_batch.rows.csv_tables, gxr_batch.rows.ids  # imports are not intake
job, target = load_job(Path(sys.argv[1])), Path(sys.argv[2])
wall_before, cpu_before = time.perf_counter(), cpu()
prepared = prepare(job)
taken = ingest(prepared.survey, prepared.fields, target, id_column="case_id", prior=None, limit=None)
seconds = time.perf_counter() - wall_before, cpu() - cpu_before
target.unlink()
# Not ru_maxrss, which begins with the memory of the parent process.
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([taken.rows, *seconds, peak]))
"""


def make_table(folder: Path, name: str, rows: int) -> Path:
    """Write a table, with long reports if its name says so, and its job; return the job."""
    kind, _, ending = name.partition(".")
    path = folder / f"{rows}-{kind}.csv"
    write_table(path, rows)
    table = pyarrow.csv.read_csv(path)
    if kind == "long":
        place = table.schema.get_field_index("findings")
        reports = [" ".join([text] * LONG_REPORT) for text in table["findings"].to_pylist()]
        table = table.set_column(place, "findings", [reports])
        pyarrow.csv.write_csv(table, path)
    if ending == "parquet":
        path.unlink()
        path = path.with_suffix(".parquet")
        pq.write_table(table, path)
    job = path.with_suffix(f".{ending}.toml")
    job.write_text(JOB.format(table=path))
    return job


def take_in(root: Path, job: Path, rows: int) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak MiB of one intake by the version at `root`."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, job, job.with_suffix(".taken")],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    taken, wall, cpu, peak = json.loads(done.stdout)
    if taken != rows:
        raise SystemExit(f"{root} read {taken:,} of {rows:,} rows of {job.stem}")
    return wall, cpu, peak


def compare(folder: Path, name: str, rows: int, rounds: int, roots: list[Path]) -> None:
    """Print one line: the best of the rounds of each version, and the median of the rounds' ratios."""
    job = make_table(folder, name, rows)
    measured = [[take_in(root, job, rows) for root in roots] for _ in range(rounds)]
    best = [[min(one[place][figure] for one in measured) for figure in range(3)] for place in range(len(roots))]
    cells = [f"{wall:8.2f} {cpu:7.2f} {peak:6.0f}" for wall, cpu, peak in best]
    if len(best) > 1:
        wall_ratio, cpu_ratio = (median(other[at] / this[at] for this, other in measured) for at in range(2))
        cells += [f"{wall_ratio:7.2f} {cpu_ratio:9.2f}"]
    print(f"{name:15} {rows:>10,}", *cells, flush=True)
    job.with_suffix("").with_suffix(f".{name.partition('.')[2]}").unlink()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the timed tables (default 200,000)")
    parser.add_argument("--large", type=int, default=1_000_000, help="rows for peak memory, 0 = none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="root of another version's working tree")
    parser.add_argument("--tables", default=",".join(TABLES), help=f"default {','.join(TABLES)}")
    options = parser.parse_args()
    roots = [Path(__file__).parents[1], *([options.against.resolve()] if options.against else [])]
    columns = f"{'wall s':>8} {'CPU s':>7} {'MiB':>6}"
    ratios = f"{'ratio':>7} {'CPU ratio':>9}" if options.against else ""
    print(f"{'table':15} {'rows':>10}", *[columns] * len(roots), ratios)
    with tempfile.TemporaryDirectory(prefix="gxr-batch-intake-") as scratch:
        for name in options.tables.split(","):
            compare(Path(scratch), name, options.rows, options.rounds, roots)
        for name in ("short.csv", "short.parquet") if options.large else ():
            compare(Path(scratch), name, options.large, 1, roots)


if __name__ == "__main__":
    main()
