"""Bad rows in real processes: one that kills the process, one that is too long, one that was not foreseen."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from running import Workplace, without_times

from gxr_batch.errors import RowError
from gxr_batch.job import Job, PromptSection
from gxr_batch.ledger.inflight import InFlight
from gxr_batch.models.tokens import ChatEncoder
from gxr_batch.prompts import Templates
from gxr_batch.records import Encoded, Key, Row
from gxr_batch.run.pipeline import TRUNCATED, Fitter

KILLER = "[engine]\nkind = 'echo'\nslots = 4\n[echo]\ntokens_per_second = 400\n[run]\ncheckpoint_seconds = 0.1\n"
POISON = {"kill_containing": "number 7 "}


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    made = Workplace(tmp_path)
    made.table([(f"C{number}", f"finding number {number} of many") for number in range(40)])
    return made


def hint(work: Workplace) -> dict:
    return json.loads((work.folder / "outputs/j/inflight.json").read_text())


def test_a_row_that_kills_the_process_twice_is_marked_as_failed_in_the_third_invocation(work, tmp_path_factory):
    whole = Workplace(tmp_path_factory.mktemp("whole"))
    whole.table([(f"C{number}", f"finding number {number} of many") for number in range(40)])
    whole.job(KILLER)
    whole.run()
    work.job(KILLER)
    work.faults = POISON
    work.run(expect=-signal.SIGKILL)
    assert ["C7", 1] in hint(work)["in_flight"]
    second = work.run(expect=-signal.SIGKILL)
    assert "one at a time" in second.stderr
    assert hint(work)["in_flight"] == [["C7", 1]], "the suspects run alone, so only one can be blamed"
    third = work.run(expect=3)
    assert "died twice while generating C7" in third.stderr
    assert "39 generated, 1 failed" in third.stdout
    bad = [row for row in work.results() if row["gxr_status"] != "ok"]
    assert [(row["case_id"], row["gxr_error"]) for row in bad] == [("C7", "crashed the process")]
    good = [row for row in without_times(work.results()) if row["case_id"] != "C7"]
    assert good == [row for row in without_times(whole.results()) if row["case_id"] != "C7"]
    assert work.run(expect=3).stdout.startswith("j: nothing left")
    for attempt in (2, 3):  # each retry is an attempt that begins without a death
        work.run("--retry", "failed", expect=-signal.SIGKILL)
        assert "one at a time" in work.run("--retry", "failed", expect=-signal.SIGKILL).stderr
        assert "died twice while generating C7" in work.run("--retry", "failed", expect=3).stderr
        (bad,) = [row for row in work.results() if row["gxr_status"] != "ok"]
        assert (bad["gxr_error"], bad["gxr_attempt"]) == ("crashed the process", attempt)
    assert "1 not tried again: run.max_attempts = 3 is reached" in work.run("--retry", "failed", expect=3).stderr


def test_rows_next_to_a_killer_are_done_before_the_suspects(work):
    work.job(KILLER.replace("checkpoint_seconds = 0.1", "checkpoint_seconds = 1000"))
    work.faults = POISON
    work.run(expect=-signal.SIGKILL)
    suspects = len(hint(work)["in_flight"])
    assert 1 <= suspects <= 4
    work.run(expect=-signal.SIGKILL)
    status = json.loads(work.gxr("status", "outputs/j", "--json").stdout)[0]
    assert status["left"] <= suspects, "finished rows are sealed before the first suspect"


def test_an_orderly_end_leaves_no_suspect(work):
    work.job(KILLER.replace("400", "20"))
    process = work.start("run", "j.toml")
    deadline = time.monotonic() + 60
    while not work.parts():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (hint(work)["crashes"], hint(work)["in_flight"]) == ([], [])
    assert "one at a time" not in work.run("--set", "echo.tokens_per_second=0").stderr


def test_an_engine_that_failed_leaves_its_rows_as_suspects(work):
    work.job(KILLER)
    work.run(expect=4, faults={"crash_after": 10})
    assert len(hint(work)["in_flight"]) >= 1
    done = work.run()
    assert "one at a time" in done.stderr
    assert len(work.results()) == 40


def test_rows_in_other_processes_are_suspects_if_their_engine_gave_up_but_not_if_this_one_was_killed(tmp_path):
    held = InFlight(tmp_path)
    held.take(Key("C1", 1), deadly=False)
    assert InFlight(tmp_path).known == [], "as the next invocation would find it after SIGKILL"
    held.close(in_order=False)
    assert InFlight(tmp_path).known == [Key("C1", 1)]


@pytest.mark.parametrize("content", ["", "{", '{"crashes": [["C1"]]}', "[]", '{"in_flight": 3, "crashes": []}'])
def test_a_torn_hint_is_harmless(work, content):
    work.job(KILLER.replace("400", "0"))
    work.run("--limit", "5")
    (work.folder / "outputs/j/inflight.json").write_text(content)
    work.run()
    assert len(work.results()) == 40


def test_a_reboot_makes_no_row_a_suspect(work):
    work.job(KILLER)
    work.faults = POISON
    work.run(expect=-signal.SIGKILL)
    content = hint(work)
    assert content["in_flight"]
    (work.folder / "outputs/j/inflight.json").write_text(json.dumps(content | {"boot": "another boot"}))
    assert "one at a time" not in work.run(expect=-signal.SIGKILL).stderr


def test_suspects_that_are_no_longer_in_the_table_are_forgotten(work):
    work.job(KILLER.replace("400", "0"))
    work.run("--limit", "5")
    crashes = [["gone", 1, 1], ["C20", 9, 1], ["C21", 1, 1]]
    (work.folder / "outputs/j/inflight.json").write_text(json.dumps({"crashes": crashes, "in_flight": []}))
    assert "with 1 unfinished row in the engine" in work.run().stderr


def test_an_invocation_for_only_some_rows_keeps_the_other_suspects(work):
    work.job(KILLER)
    work.faults = POISON
    work.run(expect=-signal.SIGKILL)
    suspects = {row_id for row_id, _ in hint(work)["in_flight"]}
    first = work.run("--limit", "3", expect=None)
    assert first.returncode in {0, -signal.SIGKILL}
    kept = {row_id for row_id, *_ in hint(work)["crashes"]}
    assert {row_id for row_id in suspects if int(row_id[1:]) >= 3} <= kept


def test_a_condemned_row_stays_condemned_until_its_result_is_recorded(work):
    work.job(KILLER.replace("checkpoint_seconds = 0.1", "checkpoint_seconds = 1000"))
    work.faults = POISON
    work.run(expect=-signal.SIGKILL)
    work.run(expect=-signal.SIGKILL)
    process = work.start("run", "j.toml", "--set", "echo.tokens_per_second=1")
    # A whole window of rows is read before the engine gets the first, so the row is rejected by then.
    rejected, deadline = re.compile(r'\["C7", 1, 2\].*"in_flight": \[\['), time.monotonic() + 60
    while not rejected.search((work.folder / "outputs/j/inflight.json").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    by_hand = {row_id for row_id, _ in hint(work)["in_flight"]}
    assert ["C7", 1, 2] in hint(work)["crashes"], "its row was rejected, which was not yet sealed"
    work.run(expect=3)
    failed = {row["case_id"] for row in work.results() if row["gxr_status"] != "ok"}
    assert "C7" in failed
    assert failed <= {"C7", *by_hand}, "a suspect that was alone when this test killed the process is blamed for it"


# ---------------------------------------------------------------------- too long


LONG = "[engine]\nkind = 'echo'\n[model]\nmax_seq_length = 64\n[sampling]\nmax_new_tokens = 16\n[prompt]\n"
TEMPLATE = "template = 'own.md.j2'\n"


@pytest.fixture
def long_rows(work) -> Workplace:
    (work.folder / "own.md.j2").write_text("Look {% if note %}{{ note }} {% endif %}at {{ findings }}")
    words = " ".join(f"w{number}" for number in range(200))
    work.table(
        [("short", "clear lungs", "a"), ("long", words, "b"), ("note", "clear", words), ("giant", "x" * 900, words)],
        ("case_id", "findings", "note"),
    )
    return work


def test_a_prompt_that_is_too_long_fails_alone(long_rows):
    long_rows.job(LONG + TEMPLATE)
    long_rows.run(expect=3)
    by_id = {row["case_id"]: row for row in long_rows.results()}
    assert by_id["short"]["gxr_status"] == "ok"
    for name in ("long", "note", "giant"):
        assert by_id[name]["gxr_status"] == "failed"
        assert "too long" in by_id[name]["gxr_error"]
        assert "leaves room for 48" in by_id[name]["gxr_error"]


def test_truncating_cuts_the_longest_cell_at_a_word_and_reports_it(long_rows):
    long_rows.job(LONG + TEMPLATE + "too_long = 'truncate'\n")
    long_rows.run("--set", "sampling.max_new_tokens=16", expect=3)
    by_id = {row["case_id"]: row for row in long_rows.results()}
    assert TRUNCATED not in by_id["short"]["gxr_flags"]
    for name in ("long", "note"):
        assert by_id[name]["gxr_status"] == "ok"
        assert by_id[name]["gxr_flags"][0] == TRUNCATED
        assert by_id[name]["gxr_prompt_tokens"] == 48, "as many words as fit"
    assert by_id["giant"]["gxr_status"] == "failed", "its longest cell is one word"
    assert by_id["giant"]["gxr_error"] == "the prompt is too long even with one word of findings"
    assert by_id["long"]["findings"].endswith("w199"), "the input is unchanged"
    assert "2 prompts too long: the end of the longest cell was cut" in long_rows.run("--fresh", expect=3).stdout
    checked = json.loads(long_rows.gxr("check", "j.toml", "--json").stdout)
    assert (checked["cut"], checked["usable"], checked["unusable"]) == (2, 3, 1)


def test_with_the_real_tokenizer_the_cut_prompt_fits_and_one_word_more_would_not(gemma_tokenizer):
    job = Job.model_validate(
        {
            "name": "j",
            "input": {"path": "x"},
            "prompt": {"too_long": "truncate", "template": "basic"},
            "model": {"max_seq_length": 160},
            "sampling": {"max_new_tokens": 64},
        }
    )
    templates = Templates(PromptSection(template="basic"))
    fitter = Fitter(templates, job, ChatEncoder(gemma_tokenizer))
    words = [f"opacity {number} mm," for number in range(90)]
    text = " ".join(words)
    fitted = fitter.fit(Row("r", "h", 0, "basic", {"findings": text}))
    assert fitted.flags == (TRUNCATED,)
    assert fitted.encoded.length <= 96
    kept = fitted.messages.turns[-1].text.count(" mm,")
    shorter = " ".join(text.split()[: text.split().index(f"{kept}") + 2])
    longer = fitter._attempt(Row("r", "h", 0, "basic", {}), {"findings": shorter})[1]
    assert longer.length > 96


class Broken:
    def encode(self, messages) -> Encoded:
        raise ZeroDivisionError("zebrafish")


def test_an_exception_for_one_row_names_its_kind_and_never_its_text():
    job = Job.model_validate({"name": "j", "input": {"path": "x"}})
    fitter = Fitter(Templates(PromptSection(template="basic")), job, Broken())
    with pytest.raises(RowError) as caught:
        fitter.fit(Row("r", "h", 0, "basic", {"findings": "zebrafish"}))
    assert "ZeroDivisionError" in str(caught.value)
    assert "zebrafish" not in str(caught.value)
    assert os.path.basename(__file__) in str(caught.value)
