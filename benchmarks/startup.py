"""Measures the start of verbs that read little, by itself, and against another version.

The versions take turns with the same job and the same finished run of one row, and each measurement is a new process.
"ratio" is the other version's CPU seconds divided by this one's, the median of the rounds: above 1, this one is faster.

    git worktree add ../before COMMIT
    python benchmarks/startup.py --against ../before
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

JOB = """name = "startup"
[input]
path = "table.csv"
[engine]
kind = "echo"
"""
VERBS = {
    "--help": ["--help"],
    "check": ["check", "job.toml"],
    "status": ["status", "outputs/startup"],
    "run": ["run", "job.toml", "--fresh"],
    "export": ["export", "outputs/startup", "--format", "csv"],
}


def cpu_seconds(root: Path, words: list[str], folder: Path) -> float:
    """Return the CPU seconds of user and system that one command of the version at `root` takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gxr_batch", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{root}: gxr-batch {' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a line a verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the root of another version")
    parser.add_argument("--rounds", type=int, default=11)
    asked = parser.parse_args()
    roots = [Path(__file__).resolve().parents[1], *([asked.against.resolve()] if asked.against else [])]
    print(f"{'verb':8} {'CPU s':>6}" + (f" {'other':>6} {'ratio':>6}" if asked.against else ""))
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(place) for place in range(len(roots))]
        for folder in folders:
            folder.mkdir()
            (folder / "table.csv").write_text("case_id,findings\n1,Small left pleural effusion.\n")
            (folder / "job.toml").write_text(JOB)
        for verb, words in {"(first run)": VERBS["run"], **VERBS}.items():
            rounds = [
                [cpu_seconds(root, words, folder) for root, folder in zip(roots, folders, strict=True)]
                for _ in range(asked.rounds if verb in VERBS else 1)
            ]
            if verb not in VERBS:
                continue
            seconds = [median(column) for column in zip(*rounds, strict=True)]
            ratio = median(others[-1] / own for own, *others in rounds) if asked.against else 0
            print(
                f"{verb:8} {seconds[0]:6.3f}" + (f" {seconds[1]:6.3f} {ratio:6.2f}" if asked.against else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
