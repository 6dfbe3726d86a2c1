"""Kills hundreds of runs of the echo engine, resumes them, and compares the results with those of an uninterrupted run.

Kills at random times and at every kind of write boundary of a run, of a run that compacts parts, of `--retry` and of
`--fresh`. Exits with 1 if a try failed; its folder is kept.

    python benchmarks/kills.py --kills 200
    python benchmarks/kills.py --every        # one kill at every boundary of a run: about an hour
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from faults import Kill, Outcome, attempts, boundaries, can_trace, random_kills, scenarios, spread, workplace


def table(outcomes: list[Outcome]) -> str:
    """Return one line per kind: how many were tried, killed and survived, and which failed."""
    lines = [f"{'kind':<28} {'tried':>6} {'killed':>7} {'survived':>9}  failed"]
    for kind in dict.fromkeys(outcome.kill.kind for outcome in outcomes):
        some = [outcome for outcome in outcomes if outcome.kill.kind == kind]
        wrong = [outcome for outcome in some if outcome.trouble]
        failed = "; ".join(f"{outcome.kill.at}: {outcome.trouble}" for outcome in wrong) or "-"
        killed = sum(outcome.killed for outcome in some)
        lines.append(f"{kind:<28} {len(some):>6} {killed:>7} {len(some) - len(wrong):>9}  {failed}")
    return "\n".join(lines)


def main() -> None:
    """Kill, resume, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="number of tries, over all kinds (default 200)")
    parser.add_argument("--every", action="store_true", help="kill runs and compactions at every boundary")
    parser.add_argument("--hook", action="store_true", help="do not use strace")
    parser.add_argument("--seed", type=int, default=1, help="seed of times and boundaries (default 1)")
    options = parser.parse_args()
    trace, rng = can_trace() and not options.hook, random.Random(options.seed)
    root, began = Path(tempfile.mkdtemp(prefix="gxr-kills-")), time.perf_counter()
    outcomes: list[Outcome] = []
    # Shares of the tries, at random times and at writes: seven in ten for runs, the rest for `--retry` and `--fresh`.
    shares = {"run": (0.2, 0.2), "compact": (0.1, 0.2), "retry": (0.05, 0.1), "fresh": (0.05, 0.1)}
    for name, scenario in scenarios(root / "scenarios").items():
        by_chance, by_write = (round(options.kills * share) for share in shares[name])
        found = boundaries(workplace(root / f"count-{name}", scenario.base), scenario.command, trace=trace)
        print(f"{name}: {len(found)} write boundaries found by {'strace' if trace else 'the hook'}", flush=True)
        chosen = found if options.every and name in {"run", "compact"} else spread(found, by_write, rng)
        kills = random_kills(f"{name}, random moment", by_chance, rng)
        kills += [Kill(f"{name}, {boundary.call}", boundary) for boundary in chosen]
        outcomes += attempts(scenario, kills, root / "tries", trace=trace)
    print(table(outcomes))
    print(f"{time.perf_counter() - began:.0f} s")
    if any(outcome.trouble for outcome in outcomes):
        raise SystemExit(f"some runs did not survive; their folders are in {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
