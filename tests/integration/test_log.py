"""log.jsonl records a run's events, one object per line, and status --json its state."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import pytest
from places import ROOT
from running import Workplace

from gxr_batch.ledger import log

EVENTS = ROOT / "docs" / "run-folder.md"


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def lines(work: Workplace) -> list[dict]:
    return [json.loads(line) for line in (work.folder / "outputs/j/log.jsonl").read_text().splitlines()]


def test_a_run_is_logged_from_its_start_to_its_end(work):
    work.faults = {"fail_containing": "number 7"}
    work.run("--limit", "9", expect=3)
    work.run(expect=3)
    work.run(expect=3)
    found = lines(work)
    starts = list(dict.fromkeys(line["start"] for line in found))
    assert len(starts) == 3
    assert [line["event"] for line in found if line["start"] == starts[0]] == [
        "started", "table_read", "notice", "engine_opened", "part_sealed", "row_failed", "ended",
    ]  # fmt: skip
    assert [line["event"] for line in found if line["start"] == starts[2]] == ["started", "nothing_to_do"]
    assert [entry["start"] for entry in work.manifest()["invocations"]] == starts[:2]
    moments = [datetime.fromisoformat(line["at"]) for line in found]
    assert moments == sorted(moments)
    failed = next(line for line in found if line["event"] == "row_failed")
    assert (failed["row_id"], failed["sample"], failed["attempt"]) == ("C7", 1, 1)
    assert found[-1] | {"at": ""} == {
        "at": "", "start": starts[2], "event": "nothing_to_do", "ok": 59, "failed": 1, "held": 0, "left": 0,
    }  # fmt: skip


def test_every_invocation_has_an_end_or_the_next_one_records_that_it_is_missing(work):
    speed = "slots = 2\n[echo]\ntokens_per_second = 30\n"  # 20 s for all, 1 s for a row
    work.job(f"[engine]\nkind = 'echo'\n{speed}[run]\ncheckpoint_seconds = 0.1\n")
    process = work.start("run", "j.toml")
    deadline = time.monotonic() + 60
    while not work.parts():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    work.run("--set", "sampling.top_k=3", expect=2)
    work.run("--set", "echo.tokens_per_second=0")
    found = lines(work)
    refused = next(line for line in found if line["event"] == "broke_off")
    assert refused["error"] == "FingerprintError"
    assert "top_k" in refused["message"]
    assert refused["where"].endswith("outputs/j")
    starts = {line["start"]: line["event"] for line in found if line["event"] in {"ended", "broke_off"}}
    lost = [line["earlier"] for line in found if line["event"] == "earlier_start_without_end"]
    assert {line["start"] for line in found} == {*starts, *lost}
    assert [entry["outcome"] for entry in work.manifest()["invocations"]] == ["no end recorded", "finished"]


def test_a_torn_last_line_loses_no_other(work):
    work.run("--limit", "5")
    path = work.folder / "outputs/j/log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    work.run()
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["event"] for line in whole].count("started") == 2


def test_every_event_is_documented(work):
    work.run(expect=4, faults={"crash_after": 5})
    work.run("--set", "run.max_failed=3", expect=5, faults={"fail_every": 2})
    text = EVENTS.read_text()
    events = {line["event"] for line in lines(work)}
    assert {"broke_off", "stop_requested"} <= events
    assert [event for event in sorted(events) if f"`{event}`" not in text] == []


def test_it_stops_listing_failed_rows_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_ROWS_NAMED", 3)
    made = log.RunLog(tmp_path)
    for number in range(6):
        made.row_failed(f"C{number}", 1, 1, "reason")
    made.close()
    events = [json.loads(line)["event"] for line in made.path.read_text().splitlines()]
    assert events == ["row_failed"] * 3 + ["more_rows_failed"]


def test_a_log_that_cannot_be_written_is_exit_4(work):
    work.run("--limit", "5")
    log_file = work.folder / "outputs/j/log.jsonl"
    log_file.rename(log_file.with_suffix(".old"))
    log_file.mkdir()
    assert "log.jsonl" in work.run(expect=4).stderr
