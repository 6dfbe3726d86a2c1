"""Measures how many rows per second one Ray driver can hand out and collect, with echo workers, which take no time.

Workers and driver share this machine's CPUs, so the figures are lower bounds for workers on other hosts. "alone" is the
echo engine in the driver's process. Measures the engine's stream only; overhead.py includes prompts, flags and
checkpoints.

    python benchmarks/ray_driver.py
    python benchmarks/ray_driver.py --rows 20000 --workers 1 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from gxr_batch.engines import create
from gxr_batch.engines.base import StopRequest
from gxr_batch.job import Job
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt, Turn

WORDS = " ".join(["pleural effusion on the left"] * 30)


def prompts(rows: int) -> Iterator[Prompt]:
    """Yield prompts of 150 words with 200 token ids, like those for a real engine."""
    ids = list(range(1000, 1200))
    for number in range(rows):
        messages = Messages((Turn("user", WORDS),), "t")
        yield Prompt(Key(f"C{number}", 1), messages, Encoded(ids, len(ids)), number, 256)


def streamed(rows: int, workers: int, slots: int) -> float:
    """Return rows per second of the engine's stream; with 0 workers, of the echo engine in this process."""
    job = Job.model_validate(
        {
            "name": "b",
            "input": {"path": "-"},
            "engine": {"kind": "ray" if workers else "echo", "slots": slots},
            "ray": {"worker": "echo", "workers": max(workers, 1), "cpus_per_worker": 1},
        }
    )
    with create(job).open() as session:
        for _ in session.stream(prompts(2 * session.info.slots), StopRequest()):
            pass
        began = time.perf_counter()
        done = sum(isinstance(event, Completion) for event in session.stream(prompts(rows), StopRequest()))
        return done / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--slots", type=int, default=64, help="slots per worker")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    print(f"{options.rows:,} rows, {options.slots} slots per worker")
    print(f"{'workers':>8} {'rows/s':>10} {'ratio':>9}")
    alone = streamed(options.rows, 0, options.slots)
    print(f"{'alone':>8} {alone:>10,.0f} {1.0:>9.2f}", flush=True)
    for workers in options.workers:
        speed = streamed(options.rows, workers, options.slots)
        print(f"{workers:>8} {speed:>10,.0f} {speed / alone:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
