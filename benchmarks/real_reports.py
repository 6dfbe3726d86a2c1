"""Measures the flags on texts of the demo model about real chest X-ray reports, read before the rules were changed.

The reports are not in this repository: get `indiana_reports.csv` of the Indiana University chest X-ray collection
(Open-i; columns uid, findings, indication, comparison). `real_reports.csv` names 90 of its rows by uid (66 with an
abnormality, 24 without, drawn at random) and has what two readers found in each text at temperatures 0.3 and 0.7; the
readers were language models that read independently, and a third settled the 25 texts on which they differed. Rules
were tuned on the texts of the half `tuning`; those of `held out` were evaluated, but never looked at.

    python benchmarks/real_reports.py indiana_reports.csv                 # generates the texts: about ten minutes
    python benchmarks/real_reports.py indiana_reports.csv --runs FOLDER   # keeps them there, or takes them from there

A text that differs from the one that was read is left out and counted: the last bits of a processor may change it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from flag_pairs import evidence

from gxr_batch.text_checks.flags import flags_of

LABELS = Path(__file__).parent / "real_reports.csv"
HALVES = ("tuning", "held out")
# Only these say that a text is wrong; `cut_mid_sentence`, for example, does not.
FAULTS = (
    "negates_given_finding", "asserts_negated_finding", "side_flipped", "invented_comparison", "number_not_in_input",
    "finding_invented", "finding_lost", "repeats_itself", "echoes_prompt",
)  # fmt: skip
JOB = """name = "real-{temperature}"
[input]
path = "reports.csv"
id_column = "case_id"
null_values = "common"
[prompt]
template = "clinical_case"
[model]
path = "demo"
dtype = "float32"
[sampling]
temperature = {temperature}
[engine]
slots = 48
"""


class Label(NamedTuple):
    """What the readers found in one text."""

    uid: str
    temperature: str
    half: str
    text_sha256: str
    faults: frozenset[str]


class Read(NamedTuple):
    """A text with its faults and its flags."""

    half: str
    faults: frozenset[str]
    flags: frozenset[str]


def labels() -> list[Label]:
    """Return the labels, in the order of the generated tables."""
    with LABELS.open(newline="", encoding="utf-8") as file:
        return [Label(*fields[:4], frozenset(fields[4].split())) for fields in list(csv.reader(file))[1:]]


def generate(reports: Path, folder: Path, known: Sequence[Label]) -> None:
    """Write the table and the runs that `folder` lacks."""
    with reports.open(newline="", encoding="utf-8") as file:
        by_uid = {row["uid"]: row for row in csv.DictReader(file)}
    uids = list(dict.fromkeys(label.uid for label in known))
    if missing := [uid for uid in uids if uid not in by_uid]:
        sys.exit(f"{reports} lacks {len(missing)} of the rows, for example uid {missing[0]}.")
    with (folder / "reports.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "findings", "history", "comparison"])
        for uid in uids:
            row = by_uid[uid]
            writer.writerow([uid, row["findings"], row["indication"], row["comparison"]])
    for temperature in sorted({label.temperature for label in known}):
        job = folder / f"real-{temperature}.toml"
        job.write_text(JOB.format(temperature=temperature), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "gxr_batch", "run", job.name], cwd=folder, check=True)


def texts(folder: Path, temperature: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a run by id."""
    table = pyarrow.parquet.read_table(folder / f"outputs/real-{temperature}/results.parquet")
    return {row["case_id"]: row for row in table.to_pylist()}


def read(folder: Path, known: Sequence[Label]) -> list[Read]:
    """Return the texts that are those that were read, with their flags as the rules are now."""
    runs = {temperature: texts(folder, temperature) for temperature in {label.temperature for label in known}}
    found = []
    for label in known:
        row = runs[label.temperature][label.uid]
        if hashlib.sha256(row["gxr_text"].encode()).hexdigest()[:16] != label.text_sha256:
            continue
        cells = {name: row[name] for name in ("findings", "history", "comparison")}
        flags = flags_of(evidence(row["gxr_text"], finish_reason=row["gxr_finish_reason"], **cells))
        found.append(Read(label.half, label.faults, frozenset(flags)))
    return found


def share(hits: int, of: int) -> str:
    """Return a share with its exact 95 % interval (Clopper and Pearson)."""
    if not of:
        return "-"
    low, high = binomtest(hits, of).proportion_ci(method="exact")
    return f"{hits}/{of}, {hits / of:.0%} ({low:.0%} to {high:.0%})"


def line(name: str, found: Sequence[bool], true: Sequence[bool]) -> str:
    """Return the line of a flag: its precision and its recall."""
    both = sum(one and other for one, other in zip(found, true, strict=True))
    return f"{name:<26}{share(both, sum(found)):<30}{share(both, sum(true))}"


def report(half: str, of: Iterable[Read]) -> None:
    """Print the table of one half."""
    own = [one for one in of if one.half == half]
    print(f"\n{half}: {len(own)} texts\n{'flag':<26}{'precision':<30}recall")
    for flag in FAULTS:
        print(line(flag, [flag in one.flags for one in own], [flag in one.faults for one in own]))
    flagged = [not one.flags.isdisjoint({*FAULTS, "other_language", "refusal", "empty_text"}) for one in own]
    faulty = [bool(one.faults) for one in own]
    print(line("any of these", flagged, faulty))
    alone = [fault for one, fault in zip(flagged, faulty, strict=True) if not one]
    print(f"texts without any of these flags that are faulty: {share(sum(alone), len(alone))}")


def main() -> None:
    """Generate what is missing, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, help="indiana_reports.csv")
    parser.add_argument("--runs", type=Path, help="folder for the runs (default: a temporary one)")
    arguments = parser.parse_args()
    known = labels()
    with ExitStack() as stack:
        folder = arguments.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        generate(arguments.reports, folder, known)
        found = read(folder, known)
    print(f"{len(found)} of {len(known)} texts are those that were read")
    for half in HALVES:
        report(half, found)


if __name__ == "__main__":
    main()
