"""Measures how well the flags find seeded errors in the pairs of tests/data, and their microseconds per row.

The rules were tuned on the tuning pairs only; the held-out pairs were written before the rules. Both have the same
author, so the figures apply to errors of this kind, not to those of a model.

    python benchmarks/flags.py
    python benchmarks/flags.py --misses     # lists the tuning texts with wrong or missing flags
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from flag_pairs import RULED, SETS, cases, evidence, scores

from gxr_batch.text_checks.flags import Evidence, flags_of

INPUT = Path(__file__).parent.parent / "inputs" / "findings.csv"
LESSON = """**Findings**

{findings}

**Interpretation**

The description above is read from the outside to the inside: chest wall, pleura, lungs, mediastinum, heart. Each part
is named, its borders are followed, and what departs from the normal picture is put into words before a cause is sought.

**Differential diagnosis**

1. Infection, which is the most common cause in a patient with fever
2. Heart failure, where the change is usually on both sides and the heart is enlarged
3. Malignancy, above all in smokers
4. Inflammation of another kind, such as vasculitis or drug reactions

**Teaching points**

- A pneumothorax would show as a thin line without lung markings beyond it.
- An effusion of less than 200 ml may be missed on the frontal view.
- Comparison with earlier films, where there are any, is the best single help.
"""


def rows() -> list[dict[str, str | None]]:
    """Return the rows of the sample table without ids, four times, each with different findings, as in a long run."""
    with INPUT.open(newline="", encoding="utf-8") as file:
        table = [
            {name: cell or None for name, cell in row.items() if name != "case_id"} for row in csv.DictReader(file)
        ]
    return [row | {"findings": f"{row['findings']} Film {number}."} for number in range(4) for row in table]


def microseconds(texts: list[Evidence]) -> float:
    """Return the CPU time per text, the median of several rounds."""
    rounds = []
    for _ in range(15):
        began = time.process_time()
        for text in texts:
            flags_of(text)
        rounds.append((time.process_time() - began) / len(texts) * 1e6)
    return statistics.median(rounds)


def main() -> None:
    """Print the table and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--misses", action="store_true", help="list the tuning texts with wrong or missing flags")
    misses = parser.parse_args().misses
    sets = {name: cases(name) for name in SETS}
    found = {name: scores(texts) for name, texts in sets.items()}
    print(f"{'':<26}" + "".join(f"{name:^26}" for name in sets))
    print(f"{'flag':<26}" + f"{'planted':>8}{'recall':>8}{'precision':>10}" * len(sets))
    for flag in RULED:
        cells = (found[name][0][flag] for name in sets)
        print(
            f"{flag:<26}" + "".join(f"{cell.positives:>8}{cell.recall:>8.2f}{cell.precision:>10.2f}" for cell in cells)
        )
    print(", ".join(f"{name}: {len(texts)} texts, {len(found[name][1])} off" for name, texts in sets.items()))
    if misses:
        print("\n".join(found["tuning"][1]))
    table = rows()
    lessons = [evidence(LESSON.format(findings=row["findings"]), **row) for row in table]
    short = [evidence("Small right effusion. The heart is enlarged, no pneumothorax.", **row) for row in table]
    echoes = [echo._replace(text=f"[echo 123456789] {echo.prompt}") for echo in (evidence("", **row) for row in table)]
    long = statistics.mean(len(lesson.text) for lesson in lessons)
    print(f"\nmicroseconds per row: {microseconds(lessons):.0f} for {long:,.0f} characters,", end=" ")
    print(f"{microseconds(short):.0f} for 10 words, {microseconds(echoes):.0f} for the echo engine's")


if __name__ == "__main__":
    main()
