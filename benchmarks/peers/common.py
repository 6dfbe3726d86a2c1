"""Shared by the peer scripts: reading the task, timing, and printing the result line.

Uses the standard library only, because each peer runs in a separate environment.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPERATURE, TOP_P, TOP_K, REPETITION_PENALTY = 0.7, 0.9, 50, 1.1
CAPACITY = 1024  # tokens of prompt plus answer, the same for every engine
WARM_UP_ROWS, WARM_UP_TOKENS = 2, 8


@dataclass(frozen=True)
class Task:
    """The prompts as token ids and texts, with output lengths, seeds and numbers of shared leading ids."""

    model: Path
    ids: list[list[int]]
    texts: list[str]
    lengths: list[int]
    seeds: list[int]
    shared: list[int]

    @property
    def tokens(self) -> int:
        """The total of useful tokens."""
        return sum(self.lengths)

    def warm_up(self) -> list[list[int]]:
        """Return two short prompts to run before the clock starts."""
        return [self.ids[0][: 20 + row] for row in range(WARM_UP_ROWS)]


def read_task(description: str, add: Callable[[argparse.ArgumentParser], None] | None = None) -> tuple[Task, Any]:
    """Read `PROMPTS.json MODEL` and the peer's options from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("prompts", type=Path, help="written by engines.py")
    parser.add_argument("model", type=Path, help="folder of the bfloat16 model")
    if add is not None:
        add(parser)
    options = parser.parse_args()
    data = json.loads(options.prompts.read_text())
    return Task(model=options.model, **data), options


class Clock:
    """The seconds of a timed block."""

    seconds = 0.0


@contextmanager
def timed() -> Iterator[Clock]:
    """Time a block."""
    clock, began = Clock(), time.perf_counter()
    yield clock
    clock.seconds = time.perf_counter() - began


def check_lengths(found: Sequence[int], wanted: Sequence[int]) -> None:
    """Exit unless every row has exactly the requested number of tokens."""
    wrong = [row for row, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other]
    if wrong:
        row = wrong[0]
        raise SystemExit(f"{len(wrong)} rows have a wrong length, e.g. row {row}: {found[row]} of {wanted[row]} tokens")


def report(tokens: int, seconds: float, note: str = "", **details: Any) -> None:
    """Print the peer's result as the last line of output."""
    line = {"tokens": tokens, "seconds": seconds, "peak_mib": peak_mib(), "note": note, **details}
    print(json.dumps(line), flush=True)


def skip(reason: str) -> None:
    """Print why this peer cannot run here."""
    print(json.dumps({"skipped": reason}), flush=True)


def peak_mib() -> float:
    """Return the peak resident memory of this process and its largest finished child.

    ru_maxrss of the process itself would include the memory of its parent at the fork.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        own = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return max(own, children)
