"""Runs the command with unlikely input, and checks its behaviour against the contract.

`try_case(kind, seed, folder)` plays one case in this process, always the same for a kind and seed, and returns what is
wrong with it. `fuzz_inputs` makes the inputs. Each case has a separate folder and uses the echo engine.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fuzz_files as files
import fuzz_inputs as inputs
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from faulty_engine import playing
from fuzz_tables import Wanted
from running import Faults

from gxr_batch.cli import main

EXITS = {0, 2, 3, 4, 5, 75, 130}
# CPU time, so that a busy machine does not look like a hang; for a sleeping process wall-clock time decides.
HANG_SECONDS = 10.0
ASLEEP_SECONDS = 90.0

EXPORTS = [(), ("--partial",), ("--format", "csv"), ("--format", "jsonl"), ("--format", "parquet")]


class Hang(BaseException):
    """The command did not return in time; no `except Exception` in the command may swallow this."""


@dataclass
class Verdict:
    """The outcome of one case: the exit codes of its commands, and a sentence for each breach of the contract."""

    kind: str
    seed: int
    codes: list[int] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def troubles(self) -> list[str]:
        return [f"{self.kind} {self.seed}: {trouble}" for trouble in self.tracebacks + self.hangs + self.lost]


@dataclass
class Case:
    """One case as its kind sees it: its folder, its random numbers, and how it runs the command."""

    folder: Path
    rng: random.Random
    verdict: Verdict
    ids: list[str] | None = None  # what the results must contain, if known
    rows: int | None = None
    output: str = ""  # of the last command

    def gxr(self, *arguments: str, faults: Faults | None = None) -> int:
        """Run a verb in this process and check how it ends; a `run` that reports success has lost no row."""
        try:
            with timed(), playing(faults or {}):
                result = CliRunner().invoke(main, arguments)
        except Hang:
            self.verdict.hangs.append(f"{' '.join(arguments)} did not end")
            return -1
        code, self.output = int(result.exit_code), result.output
        self.verdict.codes.append(int(code))
        if code not in EXITS or "Traceback (most recent call last)" in result.output:
            raised = result.exception if not isinstance(result.exception, SystemExit) else None
            shown = "".join(traceback.format_exception(raised)) if raised else result.output
            self.verdict.tracebacks.append(f"{' '.join(arguments)} ended {code}: {shown[-2500:]}")
        elif code and not result.output.strip():
            self.verdict.tracebacks.append(f"{' '.join(arguments)} ended {code} without a word")
        if arguments[:2] == ("run", "j.toml") and code in {0, 3}:
            limit = int(arguments[arguments.index("--limit") + 1]) if "--limit" in arguments else None
            self.verdict.lost += self.lost_rows(result.stdout, limit)
        return code

    def lost_rows(self, said: str, limit: int | None) -> list[str]:
        """Return what the run with this summary lost, nothing if only chosen rows were generated."""
        found = re.search(r"^  results\s+(.*?)/results\.parquet$", said, re.MULTILINE | re.DOTALL)
        ids = self.ids[:limit] if self.ids is not None else None
        rows = min(self.rows, limit or self.rows) if self.rows is not None else None
        if found is None:
            return [f"no results are named: {said[:300]}"]
        return lost_rows(Path(re.sub(r"\n +", " ", found[1])), ids, rows)  # a long path is wrapped


@contextmanager
def timed() -> Iterator[None]:
    """Raise Hang if the block takes too long, and restore the test runner's timer."""

    def late(number: int, frame: object) -> None:
        raise Hang

    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    runners = signal.setitimer(signal.ITIMER_REAL, ASLEEP_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, *runners)
        for number, handler in before.items():
            signal.signal(number, handler)


def lost_rows(run: Path, ids: Sequence[str] | None = None, rows: int | None = None) -> list[str]:
    """Return what is wrong with the results of a finished run: every row id must occur exactly once per sample."""
    try:
        return _compare(run, ids, rows)
    except (OSError, pa.ArrowException) as error:
        return [f"{run} cannot be read after it finished: {error}"]


def _compare(run: Path, ids: Sequence[str] | None, rows: int | None) -> list[str]:
    table = pq.read_table(run / "results.parquet", columns=["gxr_row_id", "gxr_sample"], partitioning=None)
    found = Counter(table["gxr_row_id"].to_pylist())
    samples = max(table["gxr_sample"].to_pylist(), default=1)
    wanted = pq.read_table(run / "input.parquet", columns=["gxr_row_id"], partitioning=None)["gxr_row_id"].to_pylist()
    troubles = []
    if len(set(wanted)) != len(wanted):
        troubles.append("row ids repeat in input.parquet")
    if found != Counter(dict.fromkeys(wanted, samples)):
        troubles.append(f"{sum(found.values())} results for {len(wanted)} rows of {samples} samples")
    if ids is not None and sorted(wanted) != sorted(ids):
        troubles.append(f"the table had {len(ids)} rows, and the run's copy has other ids ({len(wanted)})")
    if rows is not None and len(wanted) != rows:
        troubles.append(f"the table had {rows} rows, the run's copy has {len(wanted)}")
    return troubles


def table_case(suffix: str, make: Callable[[random.Random], tuple[bytes, int | None]]) -> Callable[[Case], None]:
    """Return the kind of case that runs a strange table; `make` gives its bytes, and its row count if known."""

    def play(case: Case) -> None:
        content, case.rows = make(case.rng)
        Path(f"f{suffix}").write_bytes(content)
        Path("j.toml").write_text(inputs.table_job(case.rng, f"f{suffix}"))
        case.gxr("run", "j.toml")
        case.gxr(*case.rng.choice(inputs.other_commands()))

    return play


def known_case(make: Callable[[random.Random], Wanted]) -> Callable[[Case], None]:
    """Return the kind of case that runs a table of which every cell is known; `make` writes it and its job."""

    def play(case: Case) -> None:
        wanted = make(case.rng)
        code = case.gxr("run", "j.toml")
        case.verdict.lost += wanted.troubles(code, case.output, Path("outputs/j"))
        case.gxr(*case.rng.choice(inputs.other_commands()))

    return play


def job_case(case: Case) -> None:
    """A job file that was mistyped, truncated, or filled with values of other types."""
    inputs.plain_table()
    Path("j.toml").write_bytes(inputs.broken_job(case.rng))
    case.gxr(case.rng.choice(["run", "check"]), "j.toml", "--set", "engine.kind=echo")


def set_case(case: Case) -> None:
    """Overrides of any key with any value, sometimes with an engine that fails."""
    inputs.plain_table()
    Path("j.toml").write_text(inputs.JOB)
    overrides = [part for _ in range(case.rng.randint(1, 3)) for part in ("--set", inputs.override(case.rng))]
    faults = inputs.faults(case.rng)
    case.gxr(case.rng.choice(["run", "check"]), "j.toml", *overrides, "--set", "engine.kind=echo", faults=faults)


def template_case(case: Case) -> None:
    """A template made of pieces of templates, some of them unsafe or without an end."""
    inputs.plain_table()
    Path("own.j2").write_text(inputs.template(case.rng), encoding="utf-8")
    Path("j.toml").write_text(inputs.JOB + "[prompt]\ntemplate = 'own.j2'\n")
    case.gxr("run", "j.toml")
    case.gxr(
        *case.rng.choice([("check", "j.toml"), ("templates", "render", "j.toml"), ("templates", "show", "own.j2")])
    )


def folder_case(case: Case) -> None:
    """A run folder with lost, broken or swapped files, finished or not, that is read and then resumed."""
    inputs.plain_table()
    case.ids = [f"C{number}" for number in range(inputs.ROWS)]
    Path("j.toml").write_text(inputs.JOB)
    if case.gxr("run", "j.toml", faults={"crash_after": case.rng.choice([0, 7])}) == 4 and case.rng.random() < 0.3:
        case.gxr("run", "j.toml", "--limit", "12")
    if inputs.second_run(case.rng):
        case.gxr("run", "other.toml")
    for _ in range(case.rng.randint(1, 2)):
        inputs.damage(Path("outputs/j"), case.rng)
    case.gxr("status", case.rng.choice(["outputs/j", "outputs"]), *case.rng.choice([(), ("--json",)]))
    case.gxr(
        "export",
        "outputs/j",
        *case.rng.choice(EXPORTS),
    )
    case.gxr("check", "j.toml")
    code = case.gxr("run", "j.toml")
    if code == 2:  # rename what messages ask to rename, as often as they ask
        for _ in range(4):
            if code != 2 or not inputs.follow_advice(Path("outputs/j")):
                break
            code = case.gxr("run", "j.toml")
    case.gxr("run", "j.toml", *case.rng.choice([(), ("--retry", "failed"), ("--fresh",)]))


KINDS: dict[str, Callable[[Case], None]] = {
    "csv": table_case(".csv", inputs.csv_bytes),
    "parquet": table_case(".parquet", inputs.parquet_bytes),
    "text": known_case(files.text_case),
    "jsonl": known_case(files.jsonl_case),
    "types": known_case(files.types_case),
    "workbook": known_case(files.workbook_case),
    "parts": known_case(files.parts_case),
    "job": job_case,
    "set": set_case,
    "template": template_case,
    "folder": folder_case,
}


def try_case(kind: str, seed: int, folder: Path) -> Verdict:
    """Play one case in `folder` (created here, removed if nothing is wrong) and check it."""
    verdict = Verdict(kind, seed)
    work = folder / f"{kind}-{seed}" / "work"  # two levels deep, so that an output of "../x" stays inside
    work.mkdir(parents=True)
    with chdir(work):
        KINDS[kind](Case(work, random.Random(f"{kind} {seed}"), verdict))
    if not verdict.troubles:
        shutil.rmtree(work.parent)
    return verdict
