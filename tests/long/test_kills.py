"""Killed at random moments and at each of its writes, a command resumes and ends like an uninterrupted one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from faults import (
    Boundary,
    Kill,
    Outcome,
    Scenario,
    attempts,
    boundaries,
    can_trace,
    compare,
    hooked,
    random_kills,
    scenarios,
    spread,
    workplace,
)

from gxr_batch.ledger.compaction import PARTS_PER_COMPACTION


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Scenario]:
    return scenarios(tmp_path_factory.mktemp("scenarios"))


@pytest.fixture(scope="module")
def trace() -> bool:
    return can_trace()


@pytest.fixture(scope="module")
def crossed(made, trace, tmp_path_factory) -> dict[str, list[Boundary]]:
    """Every write boundary of each scenario."""
    root = tmp_path_factory.mktemp("crossed")
    return {
        name: boundaries(workplace(root / name, scenario.base), scenario.command, trace=trace)
        for name, scenario in made.items()
    }


def troubles(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.trouble]


def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(made, trace, tmp_path):
    outcomes = attempts(made["run"], random_kills("random", 12, random.Random(7)), tmp_path, trace=trace)
    assert not troubles(outcomes)
    assert sum(outcome.killed for outcome in outcomes) >= 8, "the run ends before most kills"


def test_a_run_killed_at_its_writes_ends_like_an_uninterrupted_one(made, crossed, trace, tmp_path):
    chosen = spread(crossed["run"], 22, random.Random(8))
    outcomes = attempts(made["run"], [Kill("write", boundary) for boundary in chosen], tmp_path, trace=trace)
    assert not troubles(outcomes)
    # How many calls a run makes depends on how fast it is: a slower one seals more parts.
    assert sum(outcome.killed for outcome in outcomes) >= 12, "the boundaries were not there in the next run"


def test_a_run_killed_during_compaction_ends_like_an_uninterrupted_one(made, crossed, trace, tmp_path):
    """At each kind of write of a compaction, including between the deletions of its sources."""
    start = next(at for at, boundary in enumerate(crossed["compact"]) if "unlink" in boundary.call)
    around = [boundary for boundary in crossed["compact"][start - 60 : start + 17] if boundary.file != "part.parquet"]
    drops = [boundary for boundary in crossed["compact"] if "unlink" in boundary.call]
    assert len(drops) >= 2 * PARTS_PER_COMPACTION
    chosen = spread(around, 7, random.Random(11)) + drops[::9]
    outcomes = attempts(made["compact"], [Kill("compact", boundary) for boundary in chosen], tmp_path, trace=trace)
    assert not troubles(outcomes)
    assert all(outcome.killed for outcome in outcomes), "the boundaries were not there in the next run"


@pytest.mark.parametrize("name", ["retry", "fresh"])
def test_retry_and_fresh_killed_at_a_write_and_at_random(made, crossed, trace, tmp_path, name):
    renames = [boundary for boundary in crossed[name] if "rename" in boundary.call or "replace" in boundary.call]
    chosen = spread(renames[:5], 1, random.Random(9))  # however few parts it seals, a run reaches the first ones
    kills = [Kill(name, boundary) for boundary in chosen] + random_kills(name, 1, random.Random(10))
    outcomes = attempts(made[name], kills, tmp_path, trace=trace)
    assert not troubles(outcomes)
    assert outcomes[0].killed


def test_the_boundaries_cover_the_ledgers_writes(crossed, trace):
    files = {boundary.file for boundary in crossed["run"]}
    assert {"input.parquet.tmp", "run.json.tmp", "part.parquet.tmp", "results.parquet.tmp", "parts", "j"} <= files
    synced = [boundary.file for boundary in crossed["run"] if "fsync" in boundary.call]
    assert "outputs" in synced, "the name of a new run folder is not durable"
    # Files are written through a buffer, so that a small part is four writes.
    assert len(crossed["run"]) > (60 if trace else 80)
    renames = [boundary for boundary in crossed["fresh"] if boundary.file == "j" and "rename" in boundary.call]
    assert len(renames) >= 1


def test_the_hook_kills_before_and_after_a_rename(made, tmp_path):
    """Without strace the hook kills the command."""
    found = boundaries(workplace(tmp_path / "count"), (), trace=False)
    at = {boundary.call: boundary for boundary in found if boundary.file == "input.parquet.tmp"}
    for call, there in (("before replace", False), ("after replace", True)):
        work = workplace(tmp_path / call.replace(" ", "-"))
        assert hooked(work, "run", "j.toml", at=at[call].number).returncode == -9
        assert (work.folder / "outputs/j/input.parquet").exists() == there


@pytest.mark.parametrize(
    "wrong", ["a row lost", "a row twice", "another text", "a part changed", "the old run missing"]
)
def test_the_comparison_detects(made, tmp_path, wrong):
    scenario = made["fresh"]
    work = workplace(tmp_path / "w", scenario.base)
    work.run("--fresh")
    sealed = {path: path.read_bytes() for path in work.parts()}
    assert compare(work, scenario, sealed) == ""
    first, *others = work.parts()
    if wrong == "a row lost":
        work.table(60)
        work.run()
    elif wrong == "a row twice":
        shutil.copy(first, first.with_name("part-00000099.parquet"))
    elif wrong == "another text":
        scenario = Scenario("", Path(), (), (), [row | {"gxr_text": ""} for row in scenario.expected])
    elif wrong == "a part changed":
        shutil.copy(others[0], first)
        others[0].unlink()
    else:
        scenario = Scenario("", Path(), (), (), scenario.expected, old=scenario.expected[1:])
    assert compare(work, scenario, sealed) != ""
