"""Measures writing the workbook and other exports, and importing every row reviewed. Each step is a separate process.

    python benchmarks/exports.py                # 100,000 rows
    python benchmarks/exports.py --rows 10000

Rows have about 1,100 characters of text, like those of a model with 256 new tokens.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("no", "focal", "consolidation", "pleural", "effusion", "right", "left", "lower", "lobe", "opacity", "heart")
JOB = """name = "exports"
[input]
path = "table.csv"
id_column = "case_id"
[prompt]
template = "basic"
[engine]
kind = "echo"
[run]
output = "run"
max_failed = "off"
"""
FILLED = {
    "gxr_review_status": "approved",
    "gxr_review_quality": "4",
    "gxr_reviewer": "A",
    "gxr_reviewed_at": "2026-01-31",
}


def write_table(path: Path, rows: int) -> None:
    """Write a table from which the echo engine makes texts of about 1,100 characters."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "age", "findings"])
        for number in range(rows):
            findings = " ".join(WORDS[(number * 7 + step * 5 + step // 9) % len(WORDS)] for step in range(160))
            writer.writerow([f"C{number:08d}", 20 + number % 70, f"{findings} {number}."])


def timed(folder: Path, *arguments: str) -> None:
    """Run gxr-batch and print wall seconds and peak resident memory of the process."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "gxr_batch", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"{' '.join(arguments)} exited with {code}")
    print(
        f"{' '.join(arguments):60} {time.perf_counter() - began:7.1f} s {usage.ru_maxrss / 1024:7.0f} MiB", flush=True
    )


def fill(folder: Path) -> None:
    """Review every row in the CSV and save it as a spreadsheet does."""
    with (folder / "run/results.csv").open(newline="", encoding="utf-8-sig") as source:
        reader = csv.DictReader(source)
        with (folder / "reviewed.csv").open("w", newline="", encoding="utf-8-sig") as target:
            writer = csv.DictWriter(target, reader.fieldnames or [])
            writer.writeheader()
            writer.writerows(row | FILLED for row in reader)


def main() -> None:
    """Print seconds and memory of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gxr-exports-") as name:
        folder = Path(name)
        write_table(folder / "table.csv", options.rows)
        (folder / "job.toml").write_text(JOB)
        timed(folder, "run", "job.toml", "--quiet")
        for form in ("xlsx", "csv", "jsonl", "parquet"):
            timed(folder, "export", "run", "--format", form)
        print(f"results.xlsx: {(folder / 'run/results.xlsx').stat().st_size / 2**20:,.0f} MiB")
        fill(folder)
        timed(folder, "review", "import", "run", "run/results.xlsx")
        timed(folder, "review", "import", "run", "reviewed.csv")
        timed(folder, "review", "import", "run", "reviewed.csv")  # all unchanged now
        timed(folder, "export", "run", "--only", "approved")


if __name__ == "__main__":
    main()
