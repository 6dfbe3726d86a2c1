"""Kills the real command, at random moments and at every write of its run folder, resumes it and checks the outcome.

The writes are found, not guessed: one uninterrupted run is traced, and every later run is killed at one of the calls
that it made. strace counts and kills if it is permitted to; else `killer/sitecustomize.py` does so inside the process.
A kill before a call is a kill after the previous one, so one kill per call covers both sides.
"""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from places import SUPPORT
from running import COMMAND, Workplace, without_times

from gxr_batch.errors import GxrError
from gxr_batch.run.status import statuses

CALLS = "openat,write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat"
READS = "read,pread64"
# Rows finish together, so that every tick of the engine seals a part; a run streams for about 0.3 s.
ROWS, SLOTS = 150, 30
JOB = f"[engine]\nkind = 'echo'\nslots = {SLOTS}\n[echo]\ntokens_per_second = 400\n"
CHECKPOINTS = "[run]\ncheckpoint_seconds = 0.05\n"
# One part per row, so that the newest are compacted twice.
COMPACTING_ROWS = 40
COMPACTING_JOB = "[engine]\nkind = 'echo'\nslots = 4\n[run]\ncheckpoint_seconds = 1e-9\n"
PARTS = COMPACTING_ROWS + 8
# strace must know the names of files: `killer/` puts this mark into temporary ones, which are random otherwise.
MARK = "0123456789abcdef"
_LINE = re.compile(r'(\d+) +(\w+)\((?:AT_FDCWD[^"]*, )?(?:\d+<([^>]*)>|"([^"]*)")')


def can_trace() -> bool:
    """Return whether strace is installed and permitted to trace and inject."""
    if shutil.which("strace") is None:
        return False
    probe = ["strace", "-qq", "-o", "/dev/null", "-e", "inject=fsync:error=EIO", sys.executable, "-c", ""]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Boundary:
    """The `number`th use of a system call under the run folder, and its file."""

    call: str
    number: int
    file: str


@dataclass(frozen=True)
class Kill:
    """One try: a command killed at a boundary, or a number of seconds after its run folder appears."""

    kind: str
    at: Boundary | float
    again: float | None = None


@dataclass
class Outcome:
    """The outcome of a try. `killed` is False if the command ended before; `trouble` describes what was wrong."""

    kill: Kill
    killed: bool
    trouble: str = ""


@dataclass
class Scenario:
    """A command on a folder, the command that resumes it, and the result rows of an uninterrupted run."""

    name: str
    base: Path
    command: tuple[str, ...]
    resume: tuple[str, ...]
    expected: list[dict] = field(default_factory=list)
    old: list[dict] | None = None


def traced(
    work: Workplace, *arguments: str, inject: str = "", log: str = "/dev/null", only: Sequence[str] = ()
) -> subprocess.CompletedProcess:
    """Run the command under strace, tracing only writes to the run folder, or reads of the files in `only`.

    `inject` is strace's expression for what to do at which of these calls.
    """
    folders = [Path("outputs/j/parts"), Path("outputs/j"), Path("outputs")]
    names = ["input.parquet", "run.json", "results.parquet", "failed.parquet", "run.lock"]
    files = [folders[1] / name for name in names]
    files += [folders[0] / f"part-{number:08d}.parquet" for number in range(1, PARTS)]
    paths = [*folders, *files, *(path.with_name(f"{path.name}.{MARK}.tmp") for path in files)]
    names = [*only] or [name for path in paths for name in (str(path), str(work.folder / path))]
    flags = [flag for name in names for flag in ("-P", name)]
    command = ["strace", "--quiet=all", "-f", "-y", "-o", log, "-e", f"trace={READS if only else CALLS}", *flags]
    command += [f"--inject={inject}"] if inject else []
    path = os.pathsep.join([str(SUPPORT / "killer"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, *COMMAND, *arguments],
        cwd=work.folder,
        env=os.environ | {"PYTHONPATH": path, "GXR_TEST_MARK": MARK},
        text=True,
        capture_output=True,
        check=False,
    )


def hooked(work: Workplace, *arguments: str, at: int = 0, log: str = "/dev/null") -> subprocess.CompletedProcess:
    """Run the command with the hook of `killer/`, which kills it at the `at`th moment."""
    path = os.pathsep.join([str(SUPPORT / "killer"), os.environ.get("PYTHONPATH", "")])
    folder = f"{work.folder.resolve()}/outputs/"
    hook = {"PYTHONPATH": path, "GXR_KILL_FOLDER": folder, "GXR_KILL_AT": str(at), "GXR_KILL_LOG": log}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=work.folder, env=os.environ | hook, text=True, capture_output=True, check=False
    )


def boundaries(work: Workplace, command: Sequence[str], *, trace: bool) -> list[Boundary]:
    """Run the command once to its end and return all its write boundaries."""
    log = work.folder / "calls.log"
    done = (traced if trace else hooked)(work, "run", "j.toml", *command, log=str(log))
    assert done.returncode == 0, done.stderr
    lines = log.read_text(errors="replace").splitlines()
    if not trace:
        words = (line.split(" ") for line in lines)
        return [Boundary(f"{when} {call}", at, _kind(name)) for at, (when, call, name) in enumerate(words, 1)]
    seen: Counter[str] = Counter()
    found, threads = [], set()
    for line in lines:
        if match := _LINE.match(line):
            thread, call, opened, named = match.groups()
            seen[call] += 1
            threads.add(thread)
            if call != "openat" or "O_CREAT" in line:
                found.append(Boundary(call, seen[call], _kind(opened or named)))
    assert len(threads) == 1, "strace counts by thread, but several threads write"
    return found


def _kind(path: str) -> str:
    name = re.sub(r"part-\d+", "part", Path(path).name)
    return re.sub(r"\.[0-9a-f]{16}\.tmp$", ".tmp", name)


def spread(found: Sequence[Boundary], count: int, rng: random.Random) -> list[Boundary]:
    """Choose `count` boundaries: first one of every call on every file, then any others."""
    groups: dict[tuple[str, str], list[Boundary]] = defaultdict(list)
    for boundary in rng.sample(list(found), len(found)):
        groups[boundary.call, boundary.file].append(boundary)
    rounds = [group[turn] for turn in range(len(found)) for group in groups.values() if turn < len(group)]
    return rounds[:count]


def workplace(folder: Path, base: Path | None = None, *, rows: int = ROWS, job: str = JOB + CHECKPOINTS) -> Workplace:
    """Return a folder with the job and the table; with `base` a copy of that one, in its current state."""
    if base is not None:
        shutil.copytree(base, folder)
        work = Workplace.__new__(Workplace)
        work.folder = folder
        return work
    folder.mkdir(parents=True)
    work = Workplace(folder)
    work.table([(f"C{number:03}", f"finding number {number:03}") for number in range(rows)])
    work.job(job)
    return work


def scenarios(root: Path) -> dict[str, Scenario]:
    """Make the folders that the kills start from, with the results of an uninterrupted command."""
    fresh = workplace(root / "empty")
    finished = workplace(root / "finished")
    finished.run()
    compacting = workplace(root / "compacting", rows=COMPACTING_ROWS, job=COMPACTING_JOB)
    failed = workplace(root / "failed")
    failed.run(expect=3, faults={"fail_containing": "number 1"})
    made = {
        "run": Scenario("run", fresh.folder, (), ()),
        "retry": Scenario("retry", failed.folder, ("--retry", "failed"), ("--retry", "failed")),
        "compact": Scenario("compact", compacting.folder, (), ()),
        "fresh": Scenario("fresh", finished.folder, ("--fresh",), (), old=without_times(finished.results())),
    }
    for scenario in made.values():
        whole = workplace(root / f"whole-{scenario.name}", scenario.base)
        whole.run(*scenario.command)
        scenario.expected = without_times(whole.results())
    return made


def attempt(scenario: Scenario, kill: Kill, folder: Path, *, trace: bool) -> Outcome:
    """Kill the scenario's command once or twice, resume it until it finishes, and return what was wrong."""
    work = workplace(folder, scenario.base)
    outcome = Outcome(kill, killed=_kill(work, scenario.command, kill.at, trace=trace))
    try:
        outcome.trouble = _status(work)
        if kill.again is not None:
            _kill(work, scenario.resume, kill.again, trace=trace)
            outcome.trouble = outcome.trouble or _status(work)
        sealed = {path: path.read_bytes() for path in work.parts()}
        done = work.run(*scenario.resume, expect=None)
        twice = kill.again is not None
        if done.returncode not in ({0, 3} if twice else {0}):
            outcome.trouble = outcome.trouble or f"resume: exit {done.returncode}: {done.stderr[-400:]}"
        outcome.trouble = outcome.trouble or compare(work, scenario, sealed, twice=twice) or left_behind(work)
    except Exception as error:  # a try that raises is also an outcome and must not stop the others
        outcome.trouble = f"{type(error).__name__}: {error}"
    if not outcome.trouble:
        shutil.rmtree(folder)
    return outcome


def left_behind(work: Workplace) -> str:
    """Return which temporary files of the killed command still exist, "" if none does."""
    names = [str(path.relative_to(work.folder)) for path in (work.folder / "outputs/j").rglob("*.tmp*")]
    return f"left behind: {', '.join(names)}" if names else ""


def _kill(work: Workplace, command: Sequence[str], at: Boundary | float, *, trace: bool) -> bool:
    arguments = ("run", "j.toml", *command)
    if isinstance(at, float):
        return _kill_later(work, arguments, at)
    if trace:
        done = traced(work, *arguments, inject=f"{at.call}:signal=SIGKILL:when={at.number}")
    else:
        done = hooked(work, *arguments, at=at.number)
    return done.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}


def _kill_later(work: Workplace, arguments: Sequence[str], seconds: float) -> bool:
    child = work.start(*arguments)
    lock = work.folder / "outputs/j/run.lock"
    before = lock.stat().st_mtime_ns if lock.exists() else 0
    while child.poll() is None and not (lock.exists() and lock.stat().st_mtime_ns != before):
        time.sleep(0.005)
    time.sleep(seconds)
    child.kill()
    child.communicate()
    return child.returncode == -signal.SIGKILL


def _status(work: Workplace) -> str:
    """Return what is wrong with `status` on the killed run; "no run yet" is accepted."""
    try:
        statuses(work.folder / "outputs/j")
    except GxrError:
        return ""
    except Exception as error:
        return f"status: {type(error).__name__}: {error}"
    return ""


def compare(work: Workplace, scenario: Scenario, sealed: dict[Path, bytes], *, twice: bool = False) -> str:
    """Return how a resumed run differs from an uninterrupted one, "" if it does not.

    If a run was killed `twice`, one row may be failed for it: the suspect that was alone in the engine both times.
    """
    results = without_times(work.results())
    blamed = {row["gxr_row_id"] for row in results if twice and row["gxr_error"] == "crashed the process"}
    ids = [row["gxr_row_id"] for row in results]
    if ids != [row["gxr_row_id"] for row in scenario.expected]:
        return f"{len(scenario.expected)} rows became {len(ids)}, {len(set(ids))} of them different"
    innocent = [[row for row in rows if row["gxr_row_id"] not in blamed] for rows in (results, scenario.expected)]
    if len(blamed) > 1 or innocent[0] != innocent[1]:
        return "the results differ from those of an uninterrupted run"
    columns = ["gxr_row_id", "gxr_sample", "gxr_attempt"]
    tables = (pq.read_table(path, columns=columns) for path in work.parts())
    keys = Counter(key for table in tables for key in zip(*table.to_pydict().values(), strict=True))
    if repeated := [key for key, count in keys.items() if count > 1]:
        return f"{len(repeated)} keys are in the parts twice, e.g. {repeated[0]}"
    if trouble := changed(work, sealed):
        return trouble
    if scenario.old is not None:
        kept = [*work.folder.glob("outputs/j.before-*/results.parquet"), work.folder / "outputs/j/results.parquet"]
        if without_times(pq.read_table(kept[0], partitioning=None).to_pylist()) != scenario.old:
            return "--fresh did not keep the earlier run"
    return ""


def changed(work: Workplace, sealed: dict[Path, bytes]) -> str:
    """Return what is wrong with sealed parts, "" if each is unchanged or its rows were compacted."""
    if any(path.exists() and path.read_bytes() != content for path, content in sealed.items()):
        return "a sealed part was changed"
    gone = [content for path, content in sealed.items() if not path.exists()]
    rows = [row for path in work.parts() for row in pq.read_table(path).to_pylist()] if gone else []
    lost = [row for content in gone for row in pq.read_table(io.BytesIO(content)).to_pylist() if row not in rows]
    return f"{len(lost)} sealed rows are missing" if lost else ""


def random_kills(kind: str, count: int, rng: random.Random) -> list[Kill]:
    """Return kills at random moments of a run, every third of which also kills the resumed command."""
    moments = [rng.uniform(0, 0.4) for _ in range(count)]
    return [Kill(kind, moment, rng.uniform(0, 0.3) if turn % 3 == 2 else None) for turn, moment in enumerate(moments)]


def attempts(scenario: Scenario, kills: Sequence[Kill], root: Path, *, trace: bool) -> list[Outcome]:
    """Make all attempts, two at a time."""
    folders = [root / f"{scenario.name}-{number}" for number in range(len(kills))]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda kill, folder: attempt(scenario, kill, folder, trace=trace), kills, folders))
