"""Runs the command on thousands of cases of unusual input and counts violations of the contract.

python benchmarks/fuzz.py                            # 3,300 cases
python benchmarks/fuzz.py --cases 300 --seed 5 --kinds folder,job
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from fuzzing import KINDS, try_case


def main() -> None:
    """Run the cases of each kind and print the counts; exit with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3300, help="how many cases in total (default 3300)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case (default 0)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated kinds (default all)")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    folder = Path(tempfile.mkdtemp(prefix="gxr-fuzz-"))
    found = Counter[str]()
    print(f"{'kind':10}{'cases':>7}{'tracebacks':>12}{'hangs':>7}{'lost':>6}{'seconds':>9}  exits", flush=True)
    for kind in kinds:
        began, exits, count = time.monotonic(), Counter[int](), Counter[str]()
        for seed in range(options.seed, options.seed + max(1, options.cases // len(kinds))):
            verdict = try_case(kind, seed, folder)
            exits.update(verdict.codes)
            count.update(cases=1, tracebacks=len(verdict.tracebacks), hangs=len(verdict.hangs), lost=len(verdict.lost))
            for trouble in verdict.troubles:
                print(trouble, file=sys.stderr, flush=True)
        found.update(count)
        print(
            f"{kind:10}{count['cases']:7}{count['tracebacks']:12}{count['hangs']:7}{count['lost']:6}"
            f"{time.monotonic() - began:9.1f}  {dict(sorted(exits.items()))}",
            flush=True,
        )
    print(f"{'all':10}{found['cases']:7}{found['tracebacks']:12}{found['hangs']:7}{found['lost']:6}")
    if any(folder.iterdir()):
        print(f"failed cases are kept in {folder}")
    else:
        folder.rmdir()
    sys.exit(any(found[trouble] for trouble in ("tracebacks", "hangs", "lost")))


if __name__ == "__main__":
    main()
