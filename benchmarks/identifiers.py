"""Measures identifier screening on its hand-made set: recall and precision of each rule, and microseconds per cell.

python benchmarks/identifiers.py            # the table
python benchmarks/identifiers.py --mistakes # also the lines on which a rule is wrong
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from flags import LESSON
from screening_set import figures, lines, mistakes

from gxr_batch.text_checks.identifiers import identifiers_in

INPUTS = Path(__file__).parent.parent / "inputs"


def ordinary_cells(characters: int) -> list[str]:
    """Return the sample table's findings, cut or repeated to a length."""
    with (INPUTS / "findings.csv").open(newline="") as file:
        return [(row["findings"] * 4)[:characters] for row in csv.DictReader(file)]


def microseconds(cells: list[str], rounds: int) -> float:
    """Return the CPU time per cell, the fastest of nine measurements."""
    best = float("inf")
    for _ in range(9):
        began = time.process_time()
        for _ in range(rounds):
            for cell in cells:
                identifiers_in(cell)
        best = min(best, time.process_time() - began)
    return best / rounds / len(cells) * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mistakes", action="store_true", help="list the lines on which a rule is wrong")
    options = parser.parse_args()
    made = lines()
    print(f"{len(made)} texts, {sum(bool(line.rules) for line in made)} of them with identifiers\n")
    print(f"{'rule':<12} {'expected':>8} {'found':>6} {'recall':>7} {'precision':>9}")
    for rule, one in figures().items():
        print(f"{rule:<12} {one.expected:>8} {one.found:>6} {one.recall:>7.2f} {one.precision:>9.2f}")
    if options.mistakes:
        for line, found in mistakes():
            print(f"line {line.number}: expected {sorted(line.rules)}, found {sorted(found)}")
    print()
    for characters in (300, 1500):
        print(f"ordinary cell of {characters:,} characters: {microseconds(ordinary_cells(characters), 30):.1f} µs")
    answers = [LESSON.format(findings=cell) for cell in ordinary_cells(300)]
    print(f"generated text of {len(answers[0]):,} characters: {microseconds(answers, 10):.1f} µs")


if __name__ == "__main__":
    main()
