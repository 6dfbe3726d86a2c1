"""Whole runs against a server: exit codes, what the run folder holds, and what leaves the machine."""

from __future__ import annotations

import json
import threading
import time

import pytest
from fault_server import Act, FaultServer, completion
from running import Workplace

PATIENCE = "first_wait = '0.01s'\nlongest_wait = '0.1s'\ntimeout = '30s'\ngive_up_after = '60s'\n"
SHORT = ("--set", "api.give_up_after=6s")  # for outages that last


@pytest.fixture
def work(tmp_path):
    return Workplace(tmp_path)


def job(work: Workplace, server: FaultServer, more: str = "", sections: str = "") -> None:
    api = f"model = 'm'\nbase_url = '{server.url}'\n{PATIENCE}{more}"
    work.job(f"[engine]\nkind = 'api'\n[run]\nmax_failed = 'off'\n[api]\n{api}{sections}")


def everything_written(work: Workplace) -> bytes:
    files = [path for path in (work.folder / "outputs").rglob("*") if path.is_file()]
    return b"\n".join(path.read_bytes() for path in files)


def test_a_run_generates_every_row_with_the_servers_model_named(work, monkeypatch):
    monkeypatch.setenv("SERVER_TOKEN", "token-of-the-tests")
    with FaultServer() as server:
        job(work, server, "token_env = 'SERVER_TOKEN'\n")
        summary = work.run_json()
        again = work.run("--json")
    assert (summary["ok"], summary["reason"]) == (60, None)
    assert json.loads(again.stdout)["generated_now"] == 0
    rows = work.results()
    assert {row["gxr_model"] for row in rows} == {"m"}
    assert all("finding number" in row["gxr_text"] for row in rows)
    assert all(row["gxr_seconds_share"] <= row["gxr_seconds_generating"] + 1e-6 for row in rows)
    assert all(row["gxr_seconds_to_first_token"] is None for row in rows)
    assert server.requests[-1].headers["authorization"] == "Bearer token-of-the-tests"
    manifest = work.manifest()
    assert manifest["fingerprint"]["api.base_url"] == server.url
    assert manifest["fingerprint"]["api.model"] == "m"
    assert manifest["invocations"][0]["engine"]["reproducible"] is False
    assert b"token-of-the-tests" not in everything_written(work)


def test_reasoning_has_its_own_column_and_used_up_tokens_are_a_reason(work):
    answers = {
        0: completion("<think>Heart first.</think>\nImpression: clear."),
        1: completion("<think>Heart first, then", reason="length"),
        2: completion("<think>Seen by Dr. Anna Berger, phone 030 1234567.</think>Impression: clear."),
    }

    def behave(body: dict, _: int) -> Act | None:
        asked = body["messages"][-1]["content"]
        return next((Act(body=made) for at, made in answers.items() if f"finding number {at}" in asked), None)

    with FaultServer(behave) as server:
        work.table(4)
        job(work, server, sections="[privacy]\nidentifiers = 'hold'\n")
        work.run(expect=3)
        rows = work.results()
        assert (rows[0]["gxr_text"], rows[0]["gxr_reasoning"]) == ("Impression: clear.", "Heart first.")
        assert (rows[1]["gxr_status"], rows[1]["gxr_text"], rows[1]["gxr_reasoning"]) == ("failed", None, None)
        assert "were used up by reasoning" in rows[1]["gxr_error"]
        assert (rows[2]["gxr_status"], rows[2]["gxr_text"], rows[2]["gxr_reasoning"]) == ("held", None, None)
        assert rows[3]["gxr_reasoning"] is None
        work.gxr("export", "outputs/j", "--format", "jsonl")
        exported = (work.folder / "outputs/j/results.jsonl").read_text()
        assert "Heart first." in exported
        assert "Berger" not in exported
        del answers[1]
        work.run("--retry", "failed", "--set", "sampling.max_new_tokens=900", expect=3)
    assert [row["gxr_status"] for row in work.results()][:3] == ["ok", "ok", "held"]


def test_the_librarys_log_switch_has_no_effect(work, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG", "debug")
    with FaultServer(lambda body, number: Act(500) if number == 3 else None) as server:
        job(work, server)
        done = work.run("--limit", "3")
    assert "openai" not in done.stdout + done.stderr
    assert "DEBUG" not in done.stdout + done.stderr


def test_another_server_or_model_is_another_run(work):
    with FaultServer() as server:
        job(work, server)
        work.run("--limit", "3")
        job(work, server, sections="")
        for changed in ("api.model=other", f"api.base_url=http://127.0.0.1:{server.port}/v2"):
            refused = work.run("--set", changed, expect=2)
            assert changed.partition("=")[0] in refused.stderr
        work.run("--set", "api.concurrency=2", "--set", "api.timeout=2s")


def test_an_outage_is_exit_75_and_the_run_resumes_later(work):
    with FaultServer() as server:
        server.behave = lambda body, number: Act(503) if number > 21 else None
        job(work, server, "concurrency = 4\n")
        done = work.run("--json", *SHORT, expect=75)
        summary = json.loads(done.stdout)
        assert summary["reason"] == "api_outage"
        assert summary["ok"] >= 17
        assert summary["failed"] == 0
        assert "HTTP 503" in done.stderr
        assert done.stderr.count("Retrying") == 1
        assert "Traceback" not in done.stderr
        entry = work.manifest()["invocations"][-1]
        assert entry["outcome"] == "api_outage"
        assert entry["retries"] > 0
        assert sum(len(part.read_bytes()) > 0 for part in work.parts()) >= 1
        server.behave = lambda body, number: None
        assert work.run_json()["ok"] == 60
    answered = [row.body["messages"][-1]["content"] for row in server.rows]
    assert len(set(answered)) == 60
    assert {entry["error"] for entry in work.manifest()["invocations"] if "error" in entry} == set()


def test_a_server_that_is_not_there_is_exit_75_before_the_first_row(work):
    with FaultServer() as server:
        pass
    job(work, server, "")
    done = work.run(*SHORT, expect=75)
    assert "no answer from the server for api.give_up_after" in done.stdout
    assert "cannot be reached" in done.stderr
    assert "more time" not in done.stdout
    assert "Traceback" not in done.stderr


def test_waiting_for_a_server_ends_when_the_run_must_end(work):
    with FaultServer() as server:
        pass
    job(work, server)
    began = time.monotonic()
    done = work.run("--time-limit", "1s", "--set", "api.give_up_after=10m", expect=75)
    assert time.monotonic() - began < 30
    assert "stopped at its time limit" in done.stdout


def test_a_run_in_an_outage_looks_alive_from_outside(work):
    with FaultServer() as server:
        server.behave = lambda body, number: Act(503) if number > 5 else None
        job(work, server, "concurrency = 1\n")
        child = work.start("run", "j.toml", "--set", "api.give_up_after=10m")
        deadline = time.monotonic() + 60
        while len(server.requests) < 12:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (state,) = json.loads(work.gxr("status", "--json", "outputs/j").stdout)
        child.kill()
        child.communicate()
    assert state["state"] == "running"


def test_a_wrong_token_is_exit_4_with_one_message(work, monkeypatch):
    monkeypatch.setenv("SERVER_TOKEN", "token-of-the-tests")
    with FaultServer(lambda body, number: Act(401, {"error": "zebrafish"})) as server:
        job(work, server, "token_env = 'SERVER_TOKEN'\n")
        done = work.run(expect=4)
    assert "does not accept the token (HTTP 401)" in done.stderr
    assert "zebrafish" not in done.stderr + done.stdout
    assert work.manifest()["invocations"][-1]["counts"]["failed"] == 0


def test_a_token_that_expires_makes_no_row_a_suspect(work, monkeypatch):
    monkeypatch.setenv("SERVER_TOKEN", "token-of-the-tests")
    with FaultServer(lambda body, number: Act(401) if number > 21 else None) as server:
        job(work, server, "token_env = 'SERVER_TOKEN'\n")
        work.run(expect=4)
        server.behave = lambda body, number: None
        done = work.run()
    assert "one at a time" not in done.stderr
    assert len(work.results()) == 60


def test_a_row_that_is_refused_fails_alone_and_no_file_quotes_the_server(work):
    refusal = Act(400, {"error": {"message": "zebrafish: context too long"}})
    with FaultServer() as server:
        server.behave = lambda body, number: refusal if body["messages"][-1]["content"].count("number 7") else None
        job(work, server)
        summary = json.loads(work.run("--json", expect=3).stdout)
    assert (summary["ok"], summary["failed"]) == (59, 1)
    (failed,) = [row for row in work.results() if row["gxr_status"] == "failed"]
    assert failed["gxr_error"] == "the server refused this row (HTTP 400)"
    assert failed["gxr_seconds_generating"] is None
    assert b"zebrafish" not in everything_written(work)


def test_empty_answers_fail_and_unknown_counts_stay_unknown(work):
    def behave(body: dict, number: int) -> Act | None:
        text = body["messages"][-1]["content"]
        return Act(body=completion("" if "number 7" in text else "Some text."))

    with FaultServer(behave) as server:
        job(work, server)
        work.run("--limit", "12", expect=3)
    rows = {row["case_id"]: row for row in work.results()}
    assert rows["C7"]["gxr_error"] == "the model returned empty text"
    assert rows["C5"]["gxr_new_tokens"] is None
    assert rows["C5"]["gxr_tokens_per_second"] is None
    assert rows["C5"]["gxr_seconds_generating"] > 0
    work.gxr("export", "outputs/j")
    work.gxr("export", "outputs/j", "--format", "openai-batch")


def test_rows_whose_answers_lack_the_form_fail_and_count_as_one_attempt(work):
    def behave(body: dict, number: int) -> Act | None:
        text = body["messages"][-1]["content"]
        assert "Impression:\nTeaching point: one line" in text or text == "Say OK."
        return Act(
            body=completion("zebrafish" if "number 7" in text else "**Impression**\nClear.\n# teaching point\nA")
        )

    with FaultServer(behave) as server:
        sections = (
            "[form]\nsections = ['Impression', 'Teaching point']\n[form.section.'Teaching point']\nkind = 'line'\n"
        )
        job(work, server, sections=sections)
        work.run("--limit", "12", expect=3)
    rows = {row["case_id"]: row for row in work.results()}
    failed = rows.pop("C7")
    assert (failed["gxr_status"], failed["gxr_attempt"]) == ("failed", 1)
    assert failed["gxr_error"] == "the server's answer does not have the form's headings, twice in a row"
    assert sum("number 7" in seen.body["messages"][-1]["content"] for seen in server.rows) == 2
    assert b"zebrafish" not in everything_written(work)
    assert {row["gxr_text"] for row in rows.values()} == {"Impression: Clear.\n\nTeaching point: A"}
    assert {(row["gxr_section_impression"], row["gxr_section_teaching_point"]) for row in rows.values()} == {
        ("Clear.", "A")
    }


def test_a_server_that_ignores_the_form_fails_every_row(work):
    with FaultServer() as server:
        job(work, server, sections="[form]\nsections = ['Impression', 'Teaching point']\n")
        summary = json.loads(work.run("--json", "--limit", "5", expect=3).stdout)
    assert (summary["ok"], summary["failed"]) == (0, 5)


def test_ctrl_c_lets_requests_in_flight_finish(work):
    with FaultServer(lambda body, number: Act(body=completion("Text."), delay=0.5)) as server:
        job(work, server, "concurrency = 3\n")
        child = work.start("run", "j.toml", "--json")
        deadline = time.monotonic() + 60
        while len(server.rows) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(2)
        out, _ = child.communicate(timeout=60)
        sent = len(server.rows)
    assert child.returncode == 130
    assert json.loads(out)["ok"] == sent


def test_check_contacts_no_server_and_reports_that_it_cannot_count(work):
    with FaultServer() as server:
        job(work, server)
        shown = work.gxr("check", "j.toml", "--limit", "4").stdout
        counts = json.loads(work.gxr("check", "j.toml", "--json").stdout)
        assert server.requests == []
    assert "4 usable" in shown
    assert "counted only by the server" in shown
    assert counts["prompt_tokens"] is None


def test_a_time_limit_holds_in_an_outage_too(work):
    down = threading.Event()

    def behave(body: dict, number: int) -> Act | None:
        if number > 9:
            down.set()
        return Act(503) if down.is_set() else None

    with FaultServer(behave) as server:
        job(work, server, "concurrency = 1\n")
        work.run("--time-limit", "6s", "--set", "api.give_up_after=10m", expect=75)
    assert work.manifest()["invocations"][-1]["outcome"] == "time_limit"
