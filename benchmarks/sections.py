"""Measures what a form does to the demo model's texts: form, length, main finding, flags; and to the speed.

The rows are the sample table, the rows held out of the demo adapter's training, and chest X-ray reports of the Indiana
University collection (Open-i, `indiana_reports.csv`), which are not in this repository and are left out without it. A
model has not seen the headings in training, unless its adapter has.

    python benchmarks/sections.py --reports indiana_reports.csv           # all settings; hours on two CPU cores
    python benchmarks/sections.py --rows 20 --tokens 128 --temperatures 0.3 --texts 5
    python benchmarks/sections.py --speed                                 # tokens a second with a form / without

`--rows` is how many rows of each of the three sets to take. `--runs FOLDER` keeps the runs, and does not repeat those
that are there. Main findings are labelled in main_findings.csv (see `teaching.py`), for the first two sets.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from teaching import COLUMNS, labels, names, table_of

from gxr_batch import read_results
from gxr_batch.forms import form_of, parts_of
from gxr_batch.job import make_job

FORM = "teaching_case"
_SPEED_ROWS, _SPEED_TOKENS = 64, 96
JOB = """name = "sections"
[input]
path = "{table}"
id_column = "case"
null_values = "common"
[prompt]
template = "clinical_case"
template_column = "template"
[model]
path = "demo"
[sampling]
repetition_penalty = 1.0
"""


class Setting(NamedTuple):
    """The sampling of one run, and whether it has the form."""

    tokens: int
    temperature: float
    form: bool

    def __str__(self) -> str:
        return f"{self.tokens}-{self.temperature}-{'form' if self.form else 'free'}"


def of_reports(path: Path, count: int) -> list[dict[str, Any]]:
    """Return some reports with findings as rows, the same in every run."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["findings"].strip()]
    chosen = random.Random(21).sample(rows, min(count, len(rows)))
    return [
        {
            "case": f"report-{row['uid']}",
            "template": "clinical_case",
            "findings": row["findings"],
            "history": row["indication"],
            "comparison": row["comparison"],
        }
        for row in chosen
    ]


def write_table(folder: Path, reports: Path | None, count: int) -> None:
    """Write the table of all rows."""
    rows = table_of("sample")[:count] + table_of("held-out")[:count]
    rows += of_reports(reports, count) if reports else []
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "job.toml").write_text(JOB.format(table=folder / "rows.csv"), encoding="utf-8")


def run(folder: Path, setting: Setting) -> list[dict[str, Any]]:
    """Return the result rows of one setting, of an earlier run if there is one."""
    output = folder / str(setting)
    values = {
        "sampling.max_new_tokens": setting.tokens,
        "sampling.temperature": setting.temperature,
        "form.name": FORM if setting.form else "",
    }
    command = [sys.executable, "-m", "gxr_batch", "run", str(folder / "job.toml"), "--output", str(output), "--quiet"]
    command += [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if done.returncode not in {0, 3}:
        raise SystemExit(f"the run exited with {done.returncode}")
    return read_results(output).to_dict("records")


def measures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one run; a row that failed counts as one without form, end and findings."""
    form = form_of(make_job("x", [f"form.name={FORM}"]))
    cases = labels()
    texts = {row["gxr_row_id"]: row["gxr_text"] or "" for row in rows}
    named = [names(text, cases[row].spellings) for row, text in texts.items() if row in cases]
    kept = sum(len(row["gxr_findings_kept"]) for row in rows if row["gxr_findings_kept"] is not None)
    lost = sum(len(row["gxr_findings_lost"]) for row in rows if row["gxr_findings_lost"] is not None)
    flags = Counter(flag.partition(":")[0] for row in rows for flag in set(row["gxr_flags"]))
    return {
        "rows": len(rows),
        "has all sections": sum(parts_of(form, text) is not None for text in texts.values()) / len(rows),
        "ends by itself": sum(row["gxr_finish_reason"] == "stop" for row in rows) / len(rows),
        "names the main finding": mean(named) if named else None,
        "findings of the row kept": kept / (kept + lost) if kept + lost else None,
        "tokens": mean(row["gxr_new_tokens"] or 0 for row in rows),
        "flags": dict(sorted(flags.items())),
    }


def table(found: dict[Setting, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"{'tokens, temperature':<26}{'sections':>9}{'ends':>6}{'main finding':>14}{'kept':>6}{'tokens':>8}  flags"
    for setting, one in found.items():
        shares = [one[name] for name in ("has all sections", "ends by itself", "names the main finding")]
        shares.append(one["findings of the row kept"])
        cells = ["-" if value is None else f"{value:.0%}" for value in shares]
        flags = ", ".join(f"{flag} {count}" for flag, count in one["flags"].items())
        yield f"{setting!s:<26}{cells[0]:>9}{cells[1]:>6}{cells[2]:>14}{cells[3]:>6}{one['tokens']:>8.0f}  {flags}"


@contextmanager
def opened(overrides: Sequence[str]) -> Iterator[Any]:
    """Open the demo model's engine with these settings; yield a function that returns its tokens a second."""
    from gxr_batch.engines import create
    from gxr_batch.engines.base import StopRequest
    from gxr_batch.forms import form_of
    from gxr_batch.job import PromptSection
    from gxr_batch.prompts import Templates
    from gxr_batch.prompts.render import render
    from gxr_batch.records import Completion, Key, Prompt

    job = make_job("speed", ["model.path=demo", "engine.kind=transformers", "engine.slots=64", *overrides])
    templates = Templates(PromptSection(), form_of(job))
    rows = table_of("sample")
    engine = create(job)
    encoder = engine.encoder()
    prompts = []
    for number in range(_SPEED_ROWS):
        messages = render(templates.get("basic"), {"findings": rows[number % 48]["findings"]}, system="")
        prompts.append(Prompt(Key(str(number), 1), messages, encoder.encode(messages), number, _SPEED_TOKENS))
    with engine.open() as session:

        def measure() -> float:
            began = time.perf_counter()
            events = session.stream(iter(prompts), StopRequest())
            tokens = sum(event.new_tokens or 0 for event in events if isinstance(event, Completion))
            return tokens / (time.perf_counter() - began)

        yield measure


def speed(rounds: int) -> dict[str, Any]:
    """Return tokens a second without and with a form, in turns, and the ratio of each round."""
    with opened([]) as free, opened([f"form.name={FORM}"]) as held:
        found = [(free(), held()) for _ in range(rounds)]
    ratios = [with_form / without for without, with_form in found]
    return {
        "tokens a second without": [round(one) for one, _ in found],
        "tokens a second with": [round(one) for _, one in found],
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def main() -> None:
    """Print the tables as text, and all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, help="indiana_reports.csv")
    parser.add_argument("--rows", type=int, default=100, help="of each set")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.3, 0.7])
    parser.add_argument("--texts", type=int, default=0, help="print this many texts of each setting, with their rows")
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    parser.add_argument("--speed", action="store_true", help="only measure the speed, in three rounds")
    chosen = parser.parse_args()
    if chosen.speed:
        print(json.dumps(speed(3), indent=2))
        return
    with ExitStack() as stack:
        folder = chosen.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder, chosen.reports, chosen.rows)
        found = {}
        for tokens in chosen.tokens:
            for temperature in chosen.temperatures:
                for form in (False, True):
                    setting = Setting(tokens, temperature, form)
                    rows = run(folder, setting)
                    found[setting] = measures(rows)
                    print(f"{setting}: done", file=sys.stderr)
                    for row in rows[:: max(1, len(rows) // chosen.texts)] if chosen.texts else ():
                        print(f"--- {setting} {row['gxr_row_id']}: {row['findings']}\n{row['gxr_text']}\n")
    print("\n".join(table(found)))
    print(json.dumps({str(setting): one for setting, one in found.items()}, indent=2))


if __name__ == "__main__":
    main()
