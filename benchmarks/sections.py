"""Measures what a form does to the demo model's texts: form, length, main finding, flags; and to the speed.

The rows are the sample table, the rows held out of the demo adapter's training, and chest X-ray reports of the Indiana
University collection (Open-i, `indiana_reports.csv`), which are not in this repository and are left out without it. A
model has not seen the headings in training, unless its adapter has.

    python benchmarks/sections.py --reports indiana_reports.csv           # all settings; 15 minutes on two fast cores
    python benchmarks/sections.py --rows 20 --tokens 128 --temperatures 0.3 --texts 5
    python benchmarks/sections.py --speed                                 # tokens a second with and without a form

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
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from teaching import COLUMNS, labels, names, table_of

from gxr_batch import read_results
from gxr_batch.engines import create
from gxr_batch.engines.base import StopRequest
from gxr_batch.forms import form_of, parts_of
from gxr_batch.job import PromptSection, make_job
from gxr_batch.prompts import Templates
from gxr_batch.prompts.render import render
from gxr_batch.records import Completion, Key, Prompt

FORM = "teaching_case"
_SPEED_ROWS, _SHORTEST, _LONGEST = 128, 64, 128
ABOVE = """{# One request about the findings, with the form above them. #}
You are an expert radiologist. {{ form_sections }}

Analyze this chest X-ray showing {{ findings | clause(lead="the following: ") }}{{ findings | stop }}
"""
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


def prompts_of(encoder: Any, templates: Templates) -> list[Prompt]:
    """Return prompts about the findings of the sample table.

    Their token limits are spread: rows that all end in the same step would leave no slot empty, which no run does.
    """
    rows = table_of("sample")
    lengths = random.Random(21)
    found = []
    for number in range(_SPEED_ROWS):
        length = lengths.randint(_SHORTEST, _LONGEST)
        fields = {"findings": rows[number % len(rows)]["findings"]}
        messages = render(templates.default, fields, system="")
        found.append(Prompt(Key(str(number), 1), messages, encoder.encode(messages), number, length))
    return found


def tokens_a_second(session: Any, prompts: Sequence[Prompt]) -> float:
    """Return how fast these texts are generated, prefill included."""
    began = time.perf_counter()
    events = session.stream(iter(prompts), StopRequest())
    tokens = sum(event.new_tokens or 0 for event in events if isinstance(event, Completion))
    return tokens / (time.perf_counter() - began)


def speed(rounds: int) -> dict[str, Any]:
    """Return tokens a second with and without a form, in turns, and the ratios of the rounds.

    A form costs in two ways: in the draws, which are compared with free draws after the same prompts; and in the
    prompts, which are longer. A request above the findings is the same for all rows, and is computed once.
    """
    common = ["model.path=demo", "engine.kind=transformers", "engine.slots=64"]
    free_job, held_job = make_job("speed", common), make_job("speed", [*common, f"form.name={FORM}"])
    form = form_of(held_job)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "above.md.j2").write_text(ABOVE, encoding="utf-8")
        engine = create(free_job)
        encoder = engine.encoder()
        free = stack.enter_context(engine.open())
        held = stack.enter_context(create(held_job).open())
        asked = prompts_of(encoder, Templates(PromptSection(template="basic"), form))
        above = prompts_of(encoder, Templates(PromptSection(template=str(folder / "above.md.j2")), form))
        kinds = {
            "no form": (free, prompts_of(encoder, Templates(PromptSection(template="basic"), None))),
            "only asked for": (free, asked),
            "form": (held, asked),
            "form, request above the findings": (held, above),
        }
        found = [{name: tokens_a_second(*kind) for name, kind in kinds.items()} for _ in range(rounds)]
    compared = [("form", "only asked for"), ("form", "no form"), ("form, request above the findings", "no form")]
    ratios = {f"{one} / {other}": [each[one] / each[other] for each in found] for one, other in compared}
    return {
        "tokens a prompt": {
            name: mean(len(one.encoded.token_ids or ()) for one in kind[1]) for name, kind in kinds.items()
        },
        "tokens a second": {name: [round(each[name]) for each in found] for name in kinds},
        "ratios": {name: {"median": median(each), "min": min(each), "max": max(each)} for name, each in ratios.items()},
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
    parser.add_argument("--speed", action="store_true", help="only measure the speed")
    parser.add_argument("--rounds", type=int, default=3, help="of --speed")
    chosen = parser.parse_args()
    if chosen.speed:
        print(json.dumps(speed(chosen.rounds), indent=2))
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
