"""Every value of a run's JSON files replaced by others: each verb ends with one message, or does its work."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from json_mutations import Mutation, damages, mutations, sample
from running import Workplace

from gxr_batch.cli import main
from gxr_batch.ledger.boot import boot_id

VERBS = (
    ("status", "outputs"),
    ("status", "outputs/j", "--json"),
    ("show", "outputs/j"),
    ("export", "outputs/j", "--format", "csv", "--partial"),
    ("report", "outputs/j"),
    ("compare", "outputs/j", "outputs/other"),
    ("run", "j.toml", "--quiet", "--retry", "failed"),
    ("check", "j.toml", "--quiet"),
)
SECONDS = 10.0  # for one verb, on a machine with other work


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An unfinished run with failed, held and released rows, exports and suspects."""
    work = Workplace(tmp_path_factory.mktemp("base"))
    rows = [(f"C{number}", f"finding number {number}") for number in range(4)]
    work.table([*rows, ("C9", "Patient: John Smith, MRN 1234567, phone 555-123-4567")])
    work.job("[engine]\nkind = 'echo'\n[privacy]\nidentifiers = 'hold'\n")
    work.run(expect=3, faults={"fail_containing": "number 1"})
    work.run("--retry", "held", expect=3, faults={"fail_containing": "number 1"})
    shutil.copytree(work.folder / "outputs/j", work.folder / "outputs/other")
    run = work.folder / "outputs/j"
    keys = [["C0", 1, 1]], [["C1", 1]]
    (run / "inflight.json").write_text(json.dumps({"boot": boot_id(), "crashes": keys[0], "in_flight": keys[1]}))
    for form in ("csv", "jsonl"):
        assert CliRunner().invoke(main, ["export", str(run), "--format", form]).exit_code == 0
    return work.folder


HOLDER = {"host": "node-7", "pid": 12, "started": 1.5, "since": "2026-01-01T00:00:00+00:00", "boot": "b", "file": "1:2"}


def cases(base: Path, name: str) -> list[Mutation]:
    document = HOLDER if name == "run.lock" else json.loads((base / "outputs/j" / name).read_text())
    return [*damages(document), *mutations(document)]


class Desk:
    """A copy of the folders, in which one file of the run is broken."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        shutil.copytree(base, folder)
        self.seen: Counter[int] = Counter()
        self.slowest = 0.0

    def troubles(self, name: str, case: Mutation, verbs: tuple[tuple[str, ...], ...]) -> Iterator[str]:
        shutil.rmtree(self.folder / "outputs/j")
        shutil.copytree(self.base / "outputs/j", self.folder / "outputs/j")
        (self.folder / "outputs/j" / name).write_bytes(case.text())
        for verb in verbs:
            began = time.monotonic()
            done = CliRunner().invoke(main, verb)
            seconds = time.monotonic() - began
            self.seen[done.exit_code] += 1
            self.slowest = max(self.slowest, seconds)
            said = done.stderr
            if done.exit_code not in {0, 2, 3, 4} or said.count("Error:") != (done.exit_code in {2, 4}):
                yield f"{name}: {case.name}: {verb[0]}: exit {done.exit_code}: {said[-600:]}"
            elif len(said) > 4000 or len(done.stdout) > 100_000:
                yield f"{name}: {case.name}: {verb[0]}: {len(said)} and {len(done.stdout)} characters"
            elif seconds > SECONDS:
                yield f"{name}: {case.name}: {verb[0]}: {seconds:.1f} s"
            elif verb == VERBS[0] and (done.exit_code or "outputs/other" not in done.stdout):
                yield f"{name}: {case.name}: status does not show the other run"


@pytest.fixture
def desk(base, tmp_path, monkeypatch) -> Desk:
    made = Desk(base, tmp_path / "desk")
    monkeypatch.chdir(made.folder)
    return made


def test_a_broken_json_file_of_a_run_ends_in_one_message(base, desk):
    found = []
    for name, count in (("run.json", 14), ("run.lock", 5), ("inflight.json", 4), ("exports.json", 4)):
        for number, case in enumerate(sample(cases(base, name), count, seed=3)):
            verbs = VERBS if number < 2 else (VERBS[0], VERBS[1 + number % 7])
            found += desk.troubles(name, case, verbs)
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["run.json", "run.lock", "inflight.json", "exports.json"])
def test_many_broken_json_files_end_in_one_message(base, desk, name):
    count = int(os.environ.get("GXR_BROKEN", "800"))
    found = []
    for number, case in enumerate(sample(cases(base, name), count, seed=4)):
        found += desk.troubles(name, case, (VERBS[0], VERBS[1 + number % 7]))
    print(f"{name}: {sum(desk.seen.values()):,} commands, exits {dict(desk.seen)}, slowest {desk.slowest:.1f} s")
    assert not found, f"{len(found)}:\n" + "\n".join(found[:40])
