"""Evaluates the demo model with and without its adapter, on the sample table and on the rows held out of training.

Counts the answers that end with an end token, name their row's main finding, and swap left and right. Most rows name
their main finding, so that even an answer that repeats the prompt has it. Rows that only imply it, such as a line at
the apex that is a pneumothorax, are counted separately. Neither figure covers the rest of a text: --texts prints some.
Run it from the project's folder.

    python benchmarks/teaching.py                                  # the built-in adapter, sampling of jobs/demo.toml
    python benchmarks/teaching.py --set sampling.preset=default    # any setting of a job file
    python benchmarks/teaching.py --adapter outputs/demo_adapter-adapter --texts 2

An answer names the main finding if it has one of the spellings in main_findings.csv before the differential, not
negated in the same clause. The spellings were written from the rows, without seeing a model's texts. Swapped sides are
found by the flag `side_flipped`, which misses some; `benchmarks/flags.py` counts its errors.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet

from gxr_batch.finetune.examples import encode, read_examples, split
from gxr_batch.job import load_job
from gxr_batch.models.local_model import LocalModel

HERE = Path(__file__).parent
TRAINING, DEMO = HERE.parent / "jobs/demo_adapter.toml", HERE.parent / "jobs/demo.toml"
SETS = ("sample", "held-out")
HEADINGS = ("end token", "main finding named in the row", "main finding implied by the row", "swaps left and right")
JOB = """name = "teaching"
[input]
path = "{table}"
id_column = "case"
[prompt]
template_column = "template"
[model]
path = "demo"
[run]
output = "{output}"
"""
COLUMNS = ["case", "template", "age", "sex", "history", "presentation", "findings", "comparison", "topic"]
COLUMNS += ["condition_a", "condition_b"]
_INPUT_COLUMNS = (
    "age",
    "sex",
    "history",
    "presentation",
    "findings",
    "comparison",
    "topic",
    "condition_a",
    "condition_b",
)
_LATER_PARTS = re.compile(r"\b(?:differential|teaching point)s?\b[^:\n]{0,20}:", re.IGNORECASE)
# Before a finding, in its clause: "No effusion or pneumothorax", but not "No shift, but a pneumothorax".
_DENIES = re.compile(
    r"\b(?:no(?! doubt)|not(?! only)|without|never|absent|excludes?|rather than|against|free of|mistaken for)\b"
    r"(?:(?!\b(?:but|with|which|so|indicating|suggesting)\b)[^.;:\n])*$"
)
# After it: "Pneumothorax is not seen".
_DENIED = re.compile(
    r"^[^.,;:\n]{0,30}\b(?:is|are|was|were|been)\s+(?:not|absent|excluded|ruled out|unlikely|less likely)\b"
)


class Case(NamedTuple):
    """A row of main_findings.csv: its set, its name, and the spellings of its main finding."""

    set: str
    name: str
    spellings: tuple[str, ...]


class Share(NamedTuple):
    """A count and its total, printed with the percentage."""

    count: int
    of: int

    def __str__(self) -> str:
        return f"{self.count} of {self.of} ({self.count / self.of:.0%})" if self.of else "none"


class Score(NamedTuple):
    """Answers with an end token, with the main finding (named or only implied by the row), and with swapped sides."""

    ended: Share
    read_off: Share
    concluded: Share
    flipped: Share


def labels() -> dict[str, Case]:
    """Return the cases of main_findings.csv by id."""
    with (HERE / "main_findings.csv").open(encoding="utf-8", newline="") as file:
        return {
            row["case"]: Case(row["set"], row["case"], tuple(row["main_finding"].split(" | ")))
            for row in csv.DictReader(file)
        }


def held_out_rows() -> list[dict]:
    """Return the held-out rows of the training; `case` is the first 12 hex digits of the prompt's sha256."""
    job = load_job(TRAINING, table=False).with_values({"model.adapter": "none"})
    examples, files = read_examples(job)
    rows, _ = encode(examples, LocalModel(job, "finetune").encoder(), job.model.max_seq_length)
    _, held_out = split(rows, job.finetune.held_out, job.finetune.seed)
    prompts = {row.messages.turns[-1].text for row in held_out}
    lines = [json.loads(line) for file in files for line in file.path.read_text(encoding="utf-8").splitlines()]
    found = []
    for example, line in zip(examples, lines, strict=True):
        prompt = example.messages.turns[-1].text
        if prompt in prompts:
            found.append({"case": hashlib.sha256(prompt.encode()).hexdigest()[:12], **line})
    return found


def table_of(which: str) -> list[dict]:
    """Return the rows of a set, each with its `case` and its `template`."""
    if which == "held-out":
        return held_out_rows()
    with (HERE.parent / "inputs/findings.csv").open(encoding="utf-8", newline="") as file:
        return [{"case": row.pop("case_id"), "template": "clinical_case", **row} for row in csv.DictReader(file)]


def generate(which: str, adapter: str, overrides: list[str], folder: Path) -> list[dict]:
    """Run one set through the real command and return its result rows."""
    table, output = folder / f"{which}.csv", folder / f"{which}-{hashlib.sha256(adapter.encode()).hexdigest()[:8]}"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table_of(which))
    job = folder / f"{output.name}.toml"
    job.write_text(JOB.format(table=table, output=output))
    settings = [part for item in overrides for part in ("--set", item)]
    command = [sys.executable, "-m", "gxr_batch", "run", str(job), "--quiet", "--set", f"model.adapter={adapter}"]
    done = subprocess.run([*command, *settings], check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"the run exited with {done.returncode}")
    return pyarrow.parquet.read_table(output / "results.parquet").to_pylist()


def names(text: str, spellings: tuple[str, ...]) -> bool:
    """Return whether one of the spellings is asserted before the differential."""
    said = _LATER_PARTS.split(text, maxsplit=1)[0].lower()
    for spelling in (spelling.strip().lower() for spelling in spellings):
        negative = spelling.startswith(("no ", "without "))
        for found in re.finditer(rf"(?<!\w){re.escape(spelling)}(?!\w)", said):
            denied = _DENIES.search(said[: found.start()]) or _DENIED.search(said[found.end() :])
            if negative or not denied:
                return True
    return False


def named_by_row(row: dict, spellings: tuple[str, ...]) -> bool:
    """Return whether the row names its main finding."""
    return any(names(str(row[column]), spellings) for column in _INPUT_COLUMNS if row.get(column) is not None)


def score(rows: list[dict], cases: dict[str, Case]) -> Score:
    """Return the counts over all rows."""
    named: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        spellings = cases[row["gxr_row_id"]].spellings
        named[named_by_row(row, spellings)].append(names(row["gxr_text"], spellings))
    return Score(
        Share(sum(row["gxr_finish_reason"] == "stop" for row in rows), len(rows)),
        Share(sum(named[True]), len(named[True])),
        Share(sum(named[False]), len(named[False])),
        Share(sum("side_flipped" in row["gxr_flags"] for row in rows), len(rows)),
    )


def demo_sampling() -> list[str]:
    """Return the sampling of the demo job as overrides."""
    sampling = load_job(DEMO).sampling.model_dump(exclude_none=True)
    return [f"sampling.{key}={value}" for key, value in sampling.items()]


def main() -> None:
    """Print the table and the requested texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="", help="an adapter folder; default: the built-in one")
    parser.add_argument("--no-base", action="store_true", help="skip the base model")
    parser.add_argument("--texts", type=int, default=0, help="print the texts of this many rows")
    parser.add_argument(
        "--misses", action="store_true", help="print answers without the main finding or with swapped sides"
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", help="a setting, in place of the demo job's sampling"
    )
    given = parser.parse_args()
    overrides = demo_sampling() if given.overrides is None else given.overrides
    cases = labels()
    print(f"{' '.join(overrides)}\n\n| rows | model | {' | '.join(HEADINGS)} |\n|{'---|' * 6}")
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        for which in SETS:
            for model, adapter in (("base", "none"), ("adapter", given.adapter)):
                if model == "base" and given.no_base:
                    continue
                rows = generate(which, adapter, overrides, Path(folder))
                print(f"| {which} | {model} | {' | '.join(map(str, score(rows, cases)))} |", flush=True)
                shown += [(which, model, row) for row in rows[: given.texts]]
                if given.misses:
                    shown += [(which, model, row) for row in rows if missed(row, cases)]
    for which, model, row in shown:
        print(f"\n--- {which} {row['gxr_row_id']} {model} {cases[row['gxr_row_id']].spellings} {row['gxr_flags']}")
        print(f"{row['findings'] or row['topic'] or row['condition_a']}\n>>> {row['gxr_text']}")


def missed(row: dict, cases: dict[str, Case]) -> bool:
    """Return whether an answer lacks the main finding or swaps sides."""
    return not names(row["gxr_text"], cases[row["gxr_row_id"]].spellings) or "side_flipped" in row["gxr_flags"]


if __name__ == "__main__":
    main()
