"""The api engine against a server that stalls, drops, overloads, lies and refuses: every case ends correctly."""

from __future__ import annotations

import email.utils
import gzip
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from engine_contract import CANARY, EngineContract, Subject, Watched
from fault_server import Act, FaultServer, completion, repeated, streamed

from gxr_batch.engines import create
from gxr_batch.engines.api import outage
from gxr_batch.engines.api.retries import Meter, Throttle
from gxr_batch.engines.api.server_faults import retry_after
from gxr_batch.engines.api.session import ApiSession
from gxr_batch.engines.base import StopRequest
from gxr_batch.errors import ApiOutage, EngineUnavailable, ModelUnavailable, RowError
from gxr_batch.job import Job
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt, Turn

WORDS = "a small pleural effusion on the left and a normal heart"


def job(url: str, **api: object) -> Job:
    patience = {"first_wait": "0.01s", "longest_wait": "0.05s", "give_up_after": "20s", "timeout": "10s"}
    sampling, form = api.pop("sampling", {}), api.pop("form", {})
    settings = {"model": "m", "base_url": url, "concurrency": 4, "max_retries": 2} | patience | api
    return Job.model_validate(
        {
            "name": "j",
            "input": {"path": "f.csv"},
            "engine": {"kind": "api"},
            "api": settings,
            "sampling": {"max_new_tokens": 32} | sampling,
            "form": form,
        }
    )


def prompt(number: int, text: str = WORDS, **more: object) -> Prompt:
    turns = (Turn("system", "Be brief."), Turn("user", f"{text} {number}"))
    return Prompt(Key(f"C{number}", 1), Messages(turns, "t"), Encoded(None, None), 1000 + number, 32)._replace(**more)


def prompts(count: int) -> list[Prompt]:
    return [prompt(number) for number in range(count)]


@contextmanager
def session(server: FaultServer, said: list[str] | None = None, **api: object) -> Iterator[ApiSession]:
    with create(job(server.url, **api), (said if said is not None else []).append).open() as opened:
        yield opened


def one(server: FaultServer, **api: object) -> Completion:
    """Return the completion of one row."""
    with session(server, **api) as opened:
        return Watched().watch(opened, prompts(1)).completions[0]


def about_rows(act: Callable[[int], Act | None]) -> Callable[[dict, int], Act | None]:
    """Apply `act` to the rows' requests, counted from 1, and answer the engine's test questions normally."""
    count = iter(range(1, 10**6))

    def behave(body: dict, _: int) -> Act | None:
        return None if body["messages"][-1]["content"] == "Say OK." else act(next(count))

    return behave


def about(row: int, act: Act) -> Callable[[dict, int], Act | None]:
    """Apply `act` to one row and answer all others normally."""
    return lambda body, _: act if body["messages"][-1]["content"].endswith(f" {row}") else None


class TestApiContract(EngineContract):
    @pytest.fixture
    def subject(self):
        def behave(body: dict, _: int) -> Act | None:
            text = body["messages"][-1]["content"]
            if CANARY in text:
                return Act(400, {"error": {"message": f"cannot read: {text}"}})
            return Act(body=repeated(body), delay=1.3 if "slow" in text else 0.0)

        with FaultServer(behave) as server:
            yield Subject(
                open=lambda: create(job(server.url), lambda _: None).open(),
                prompts=prompts,
                lasting=lambda count: [prompt(number, f"slow {WORDS}") for number in range(count)],
                spoil=lambda spoiled: prompt(int(spoiled.key.row_id[1:]), CANARY),
                sees_first_token=False,
            )


def test_a_row_is_sent_as_chat_messages_with_its_own_seed_and_the_jobs_sampling():
    with FaultServer() as server:
        completion = one(server)
    (seen,) = server.rows
    assert seen.path == "/v1/chat/completions"
    assert seen.body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"{WORDS} 0"},
    ]
    wanted = {"model": "m", "seed": 1000, "max_tokens": 32, "temperature": 0.7, "top_p": 0.9, "top_k": 50}
    assert wanted.items() <= seen.body.items()
    assert seen.body["repetition_penalty"] == seen.body["repeat_penalty"] == 1.1
    assert not seen.body["stream"]
    assert completion.text == f"{WORDS} 0"
    assert (completion.finish_reason, completion.error) == ("stop", None)
    assert (completion.prompt_tokens, completion.new_tokens) == (16, 12)


def test_a_greedy_job_sends_no_seed_and_no_sampling_parameters():
    with FaultServer() as server:
        one(server, sampling={"temperature": 0})
    assert server.rows[0].body["temperature"] == 0
    assert not {"seed", "top_p", "top_k"} & set(server.rows[0].body)


# --- a server that has trouble and recovers


@pytest.mark.parametrize(
    "act",
    [
        Act(500, {"error": CANARY}),
        Act(503, b"<html>busy</html>"),
        Act(429, {}, headers={"Retry-After": "0"}),
        Act(408),
        Act(cut=0),
        Act(body=completion("half"), cut=40),
        Act(body=b"{not json"),
        Act(body=b"[]"),
        Act(body=b"\xff\xfe"),
        Act(body=[1, 2]),
        Act(body={"choices": []}),
        Act(body={"choices": "none"}),
        Act(body={"choices": [7]}),
        Act(body={"choices": {"0": {}}}),
        Act(body={"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}),
        Act(body={"choices": [{"message": "text", "finish_reason": "stop"}]}),
        Act(body={"error": {"message": CANARY}}),
        Act(body=b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}'),
        Act(body=b"[" * 200_000),
        Act(body={"_fields_set": 7, "choices": [{"_fields_set": 7, "message": {"_fields_set": 7, "content": 1}}]}),
        Act(body=gzip.compress(b"{}", mtime=0), headers={"Content-Encoding": "gzip"}),
        Act(body=b" " * 2_000_000 + b"{}"),
        Act(body=b" " * 65536, endless=True),
        Act(body=completion("half", reason="abort")),
        Act(body=completion(None, reason="error")),
    ],
    ids=lambda act: f"{act.status}-{str(act.body)[:24]}-{act.cut}",
)
def test_a_fault_that_may_pass_is_retried(act):
    with FaultServer(about_rows(lambda number: act if number == 1 else None)) as server:
        completion = one(server)
    assert completion.error is None
    assert completion.text == f"{WORDS} 0"
    assert len(server.rows) == 2


def test_a_server_that_stalls_is_retried_after_the_timeout():
    with FaultServer(about_rows(lambda number: Act(delay=60) if number == 1 else None)) as server:
        completion = one(server, timeout="2s")
    assert completion.error is None
    assert completion.seconds_queued >= 2
    assert completion.seconds_generating < 2


def test_the_timeout_also_holds_for_a_server_that_drips():
    drip = Act(pieces=[b" "] * 1000, gap=0.05)
    with FaultServer(about_rows(lambda number: drip if number == 1 else None)) as server:
        completion = one(server, timeout="2s")
    assert completion.error is None
    assert completion.seconds_queued < 40


def test_retry_after_holds_for_every_row():
    flood = Act(429, {}, headers={"Retry-After": "1"})
    with FaultServer(about_rows(lambda number: flood if number <= 4 else None)) as server, session(server) as opened:
        seen = Watched().watch(opened, prompts(12))
    assert all(completion.error is None for completion in seen.completions)
    # At most four were in flight; the eight rows that were not refused wait too.
    times = sorted(row.at for row in server.rows)
    assert len(times) == 16
    assert all(at >= times[0] + 0.95 for at in times[4:])


def test_retry_after_as_a_date():
    later = email.utils.formatdate(time.time() + 1000, usegmt=True)
    assert 900 < retry_after({"retry-after": later}) <= 1000
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": " 7 "}) == 7
    for nonsense in ("", "soon", "-3", "1.5", "Wed, 99 Oct 2015 07:28:00 GMT", "٣"):
        assert retry_after({"retry-after": nonsense}) is None


def test_an_overloaded_server_gets_fewer_requests_at_a_time():
    throttle = Throttle(8)
    for _ in range(3):
        throttle.overloaded(0.0, None)  # three requests in flight together
    assert throttle.limit == 4
    throttle.overloaded(time.monotonic(), None)
    assert throttle.limit == 2
    for _ in range(2 + 3 + 4):
        throttle.answered()
    assert throttle.limit == 5


def test_a_server_that_answers_one_row_at_a_time_is_slow_and_no_row_is_at_fault():
    """It answers three in time. Eight at once are too many, and so are those that later answers allow again."""
    seconds, timeout = 0.4, 1.5
    busy_until, lock = 0.0, threading.Lock()

    def behave(body: dict, _: int) -> Act:
        nonlocal busy_until
        with lock:
            now = time.monotonic()
            begins = max(now, busy_until)
            ends = begins + (seconds if body["max_tokens"] > 1 else 0)
            busy_until = max(begins, min(ends, now + timeout))  # the client closes what is late
        return Act(body=repeated(body), delay=ends - now)

    with FaultServer(behave) as server, session(server, timeout=f"{timeout}s", concurrency=8) as opened:
        seen = Watched().watch(opened, prompts(20))
    assert {completion.error for completion in seen.completions} == {None}
    assert len(seen.completions) == 20
    assert seen.pulses[-1].retries > 3


@pytest.mark.parametrize("count", [2, 8], ids=["alone", "among others"])
def test_rows_that_are_always_late_fail_and_no_others(count):
    def behave(body: dict, _: int) -> Act | None:
        return Act(delay=60) if body["messages"][-1]["content"].endswith((" 0", " 1")) else None

    with FaultServer(behave) as server, session(server, timeout="1s", give_up_after="6s") as opened:
        seen = Watched().watch(opened, prompts(count))
    errors = {completion.key.row_id: completion.error for completion in seen.completions}
    late = "the server gave no answer in time, again and again, while it answered others"
    assert {errors.pop("C0"), errors.pop("C1")} == {late}
    assert list(errors.values()) == [None] * (count - 2)


# --- a row at fault, and rows that are not


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (Act(400, {"error": f"bad {CANARY}"}), "the server refused this row (HTTP 400)"),
        (Act(413), "the server refused this row (HTTP 413)"),
        (Act(422, {"error": CANARY}), "the server refused this row (HTTP 422)"),
        (Act(403, {"error": CANARY}), "the server refused this row (HTTP 403)"),
        (Act(body=completion(CANARY, reason="content_filter")), "the server's content filter stopped the answer"),
        (Act(body=completion(None, reason="tool_calls")), "answered with a call of a tool"),
        (Act(body=completion(CANARY, reason="recitation")), "ended the answer for a reason of its own"),
        (Act(500, {"error": CANARY}), "answered HTTP 500, again and again, while it answered others"),
        (Act(cut=0), "broke off the connection, again and again, while it answered others"),
        (Act(body=b"{"), "sent something that is no chat completion, again and again"),
        (
            Act(body=completion(CANARY, reason="abort")),
            "broke off its answer, again and again, while it answered others",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("count", [1, 6], ids=["alone", "among others"])
def test_a_row_that_the_server_cannot_answer_fails_alone_without_quoting_anything(act, reason, count):
    with FaultServer(about(0, act)) as server, session(server) as opened:
        seen = Watched().watch(opened, prompts(count))
    errors = {completion.key.row_id: completion.error for completion in seen.completions}
    assert reason in errors.pop("C0")
    assert set(errors.values()) <= {None}
    assert len(seen.completions) == count
    assert all(CANARY not in (completion.error or "") + completion.text for completion in seen.completions)


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_a_row_gets_as_many_tries_as_the_job_allows(tries):
    with FaultServer(about(0, Act(500))) as server:
        made = one(server, max_retries=tries - 1)
    assert "HTTP 500" in made.error
    assert len(server.rows) == tries


def test_a_row_is_not_blamed_for_an_outage_that_ends_between_its_try_and_the_question():
    """The server is down except for the last try: the question after one of them is answered, then the row is too."""
    down = Act(503)

    def behave(body: dict, _: int) -> Act | None:
        is_test = body["messages"][-1]["content"] == "Say OK."
        return None if is_test or len(server.rows) > 3 else down

    with FaultServer(behave) as server:
        made = one(server, max_retries=3)
    assert made.error is None
    assert len(server.rows) == 4


def test_an_empty_answer_is_passed_to_the_runner():
    with FaultServer(about(0, Act(body=completion("", usage={"prompt_tokens": 4, "completion_tokens": 1})))) as server:
        made = one(server)
    assert (made.text, made.error, made.finish_reason) == ("", None, "stop")


def message(content: object, **fields: object) -> dict:
    """Return a completion whose message has this content and more fields."""
    made = completion(None)
    made["choices"][0]["message"] |= {"content": content, **fields}
    return made


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "Heart first."}]}
SAID = {"type": "text", "text": "Clear."}


@pytest.mark.parametrize(
    ("answer", "reasoning"),
    [
        (message([SAID]), None),
        (message(["Cle", {"text": "ar."}]), None),
        (message([{"type": "output_text", "text": "Clear."}]), None),
        (message([{"type": "text", "text": {"value": "Clear.", "annotations": []}}]), None),
        (message([THOUGHT, SAID]), "Heart first."),
        (message([{"type": "thinking", "thinking": "Heart first."}, SAID]), "Heart first."),
        (message([{"type": "reasoning", "text": "Heart first."}, SAID]), "Heart first."),
        (message("Clear.", reasoning_content="Heart first."), "Heart first."),
        (message("Clear.", reasoning="Heart first.", reasoning_details=[{"text": "Heart first."}]), "Heart first."),
        (message("Clear.", thinking="Heart first.", reasoning_content=None), "Heart first."),
        (message("Clear.", reasoning_content=""), None),
        (message("Clear.", reasoning={"effort": "low"}), None),
    ],
    ids=str,
)
def test_text_parts_are_text_and_reasoning_is_kept_apart(answer, reasoning):
    with FaultServer(about(0, Act(body=answer))) as server:
        made = one(server)
    assert (made.text, made.reasoning, made.error) == ("Clear.", reasoning, None)


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": {"url": "x"}}], [4], {"text": "Clear."}], ids=str
)
def test_parts_that_are_no_text_are_no_answer(content):
    with FaultServer(about(0, Act(body=message(content)))) as server:
        made = one(server, max_retries=0)
    assert "sent something that is no chat completion" in made.error


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        "many",
        {},
        {"prompt_tokens": -1, "completion_tokens": -5},
        {"prompt_tokens": "4", "completion_tokens": "12"},
        {"prompt_tokens": 2**40, "completion_tokens": 2**40},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": True, "completion_tokens": 33},
        {"prompt_tokens": 1.5, "completion_tokens": 1.5},
    ],
    ids=str,
)
def test_missing_or_impossible_counts_are_unknown_and_the_text_is_kept(usage):
    with FaultServer(about(0, Act(body=completion("Some text.", usage=usage)))) as server:
        made = one(server)
    assert made.text == "Some text."
    assert (made.prompt_tokens, made.new_tokens, made.error) == (None, None, None)


@pytest.mark.parametrize(
    ("reason", "tokens", "means"),
    [
        ("eos_token", 5, "stop"),
        ("max_tokens", 32, "length"),
        (None, 5, "stop"),
        (None, 32, "length"),
        ("", 32, "length"),
    ],
)
def test_finish_reasons_are_mapped_to_ours(reason, tokens, means):
    usage = {"prompt_tokens": 4, "completion_tokens": tokens}
    with FaultServer(about(0, Act(body=completion("Text.", reason=reason, usage=usage)))) as server:
        assert one(server).finish_reason == means


# --- a server that is unusable


@pytest.mark.parametrize(
    ("act", "part"),
    [
        (Act(401, {"error": CANARY}), "requires a token (HTTP 401)"),
        (Act(402), "no credit left (HTTP 402)"),
        (Act(403, {"error": CANARY}), "does not let this token use the model (HTTP 403)"),
        (Act(404, {"error": CANARY}), "knows no such model or address (HTTP 404)"),
        (Act(307, headers={"Location": "http://127.0.0.1:9/v1"}), "redirects to another address (HTTP 307)"),
        (Act(400, {"error": CANARY}), "refused even a test question (HTTP 400)"),
        (Act(body=b"<html>Welcome</html>"), "sent something that is no chat completion"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_token_model_or_address_gives_one_message_and_fails_no_row(act, part):
    with FaultServer(lambda body, _: act) as server:
        with pytest.raises(ModelUnavailable) as caught, session(server):
            pass
        assert part in caught.value.what
        assert server.url in caught.value.where
        assert caught.value.next_step
        assert CANARY not in str(caught.value)
        assert not server.rows


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_an_account_that_runs_out_ends_the_engine_and_fails_no_row(status):
    with FaultServer(lambda body, number: Act(status, {}) if number > 3 else None) as server:
        seen = Watched()
        with session(server, concurrency=1) as opened, pytest.raises(EngineUnavailable):
            seen.watch(opened, prompts(9))
    assert len(seen.completions) == 2
    assert all(completion.error is None for completion in seen.completions)


def test_prompts_and_tokens_never_follow_a_redirect(monkeypatch):
    monkeypatch.setenv("SERVER_TOKEN", "secret-token")
    with FaultServer() as other, FaultServer() as server:
        server.behave = about_rows(lambda _: Act(307, headers={"Location": f"{other.url}/chat/completions"}))
        with (
            session(server, token_env="SERVER_TOKEN") as opened,
            pytest.raises(EngineUnavailable, match="another address"),
        ):
            Watched().watch(opened, prompts(2))
    assert other.requests == []


def test_a_server_with_a_base_url_gets_only_the_token_that_the_job_names(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    monkeypatch.setenv("SERVER_TOKEN", "secret-token")
    with FaultServer() as server:
        one(server)
        assert "authorization" not in server.requests[-1].headers
        one(server, token_env="SERVER_TOKEN")
        assert server.requests[-1].headers["authorization"] == "Bearer secret-token"


def test_a_proxy_in_the_environment_is_not_used_for_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FaultServer() as server:
        assert one(server).error is None


def test_the_librarys_environment_variables_have_no_effect(monkeypatch):
    """They could send prompts, or a user's key, to a server that no job names."""
    with FaultServer() as other, FaultServer() as server:
        for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
            monkeypatch.setenv(f"OPENAI_{name}", CANARY)
        monkeypatch.setenv("OPENAI_BASE_URL", other.url)
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {CANARY}\nX-{CANARY}: 1\nHost: {CANARY}")
        assert one(server).error is None
    assert other.requests == []
    assert {seen.path for seen in server.requests} == {"/v1/chat/completions"}
    for seen in server.requests:
        assert CANARY not in str(seen).lower()
        wanted = {"host", "accept", "accept-encoding", "connection", "content-length", "content-type", "user-agent"}
        assert set(seen.headers) == wanted


def test_the_library_is_imported_only_when_the_engine_opens():
    code = (
        "import sys\nfrom gxr_batch.engines import create\nfrom gxr_batch.job import Job\n"
        f"engine = create(Job.model_validate({job('http://127.0.0.1:9/v1').model_dump(mode='json')!r}), print)\n"
        "engine.identity(), engine.encoder()\nprint('openai' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_may_be_the_server_its_v1_or_the_full_url(path):
    with FaultServer() as server:
        server.url = server.url.removesuffix("/v1") + path
        one(server)
    assert {seen.path for seen in server.requests} == {"/v1/chat/completions"}


def test_an_address_that_is_too_long_gives_one_message():
    engine = create(job("http://localhost/" + "a" * 70_000), lambda _: None)
    with pytest.raises(ModelUnavailable, match="The server cannot be used"), engine.open():
        pass


@pytest.mark.parametrize("token", ["", "two\nlines", "naïve"])
def test_an_invalid_token_gives_one_message_that_does_not_show_it(monkeypatch, token):
    monkeypatch.setenv("SERVER_TOKEN", token)
    with FaultServer() as server:
        with pytest.raises(ModelUnavailable) as caught, session(server, token_env="SERVER_TOKEN"):
            pass
        assert "export SERVER_TOKEN=..." in caught.value.next_step
        assert token or "The environment variable SERVER_TOKEN is empty." in str(caught.value)
        assert not token or token not in str(caught.value)
        assert not server.requests


def test_a_failed_tls_handshake_gives_one_message_at_once():
    with FaultServer() as server:
        server.url = server.url.replace("http://", "https://")
        with pytest.raises(ModelUnavailable, match="does not complete a TLS handshake"), session(server):
            pass


# --- an outage


def test_the_engine_waits_for_a_server_that_is_not_up_yet_and_reports_it_once(monkeypatch):
    monkeypatch.setattr(outage, "_SAID_AFTER_SECONDS", 0.3)
    said: list[str] = []
    told_at: list[int] = []

    def behave(body: dict, number: int) -> Act | None:
        if said and not told_at:
            told_at.append(number)
        return None if told_at and number > told_at[0] + 8 else Act(503)

    with FaultServer(behave) as server:
        with session(server, said, give_up_after="60s") as opened:
            seen = Watched().watch(opened, prompts(2))
        assert all(completion.error is None for completion in seen.completions)
    assert len([sentence for sentence in said if "HTTP 503" in sentence]) == 1


def test_an_outage_ends_the_stream_and_fails_no_row(monkeypatch):
    monkeypatch.setattr(outage, "_SAID_AFTER_SECONDS", 0.5)
    said: list[str] = []
    with FaultServer(lambda body, number: Act(cut=0) if number > 3 else None) as server:
        seen = Watched()
        patience = {"give_up_after": "4s", "concurrency": 2}
        with session(server, said, **patience) as opened, pytest.raises(ApiOutage) as caught:
            seen.watch(opened, prompts(9))
    assert len(seen.completions) == 2
    assert all(completion.error is None for completion in seen.completions)
    assert seen.pulses
    assert seen.pulses[-1].retries > 2
    assert seen.longest_silence < 1.0 + seen.stall
    assert len(said) == 1
    assert "broke off the connection" in said[0]
    assert "broke off the connection" in caught.value.what


def test_an_outage_that_ends_in_time_fails_no_row(monkeypatch):
    monkeypatch.setattr(outage, "_SAID_AFTER_SECONDS", 1.0)
    said: list[str] = []

    def behave(body: dict, number: int) -> Act | None:
        return Act(503) if number > 2 and not said else None

    with FaultServer(behave) as server, session(server, said, give_up_after="60s") as opened:
        seen = Watched().watch(opened, prompts(9))
    assert len(seen.completions) == 9
    assert all(completion.error is None for completion in seen.completions)
    assert len(said) == 2
    assert said[1] == "The server is answering again."


@pytest.mark.parametrize("status", [429, 500], ids=["for all", "for one row"])
def test_a_wait_of_hours_is_an_outage_even_if_other_rows_are_answered(status):
    both = threading.Event()

    def behave(body: dict, _: int) -> Act | None:
        if body["messages"][-1]["content"].endswith(" 0"):
            both.wait(60)  # a row that has not been sent by then would wait too
            return Act(status, {}, headers={"Retry-After": "7200"})
        if body["messages"][-1]["content"].endswith(" 1"):
            both.set()
        return Act(body=repeated(body), delay=0.3)

    with FaultServer(behave) as server:
        seen = Watched()
        with session(server, concurrency=2, give_up_after="4s") as opened, pytest.raises(ApiOutage) as caught:
            seen.watch(opened, prompts(2))
    assert [completion.key.row_id for completion in seen.completions] == ["C1"]
    assert f"answered HTTP {status} and asked to wait 120 min" in caught.value.what


def test_a_server_that_never_comes_up_is_an_outage_while_opening():
    with FaultServer() as server:
        closed = server.url
    engine = create(job(closed, give_up_after="3s"), lambda _: None)
    with pytest.raises(ApiOutage, match="cannot be reached"), engine.open():
        pass


def test_a_server_that_aborts_every_answer_is_an_outage():
    shut = Act(body=completion("half", reason="abort"))
    with FaultServer(lambda body, number: shut if number > 2 else None) as server:
        seen = Watched()
        with session(server, give_up_after="3s") as opened, pytest.raises(ApiOutage, match="broke off its answer"):
            seen.watch(opened, prompts(5))
    assert [completion.error for completion in seen.completions] == [None]


# --- parameters that a server does not know


PENALTIES = {"repetition_penalty", "repeat_penalty"}


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "unknown", [{"top_k"}, {"seed"} | PENALTIES, {"seed", "top_k"} | PENALTIES, {"repeat_penalty"}]
)
def test_parameters_that_a_server_refuses_are_left_out_and_named(unknown, status):
    with FaultServer(lambda body, _: Act(status, {"error": CANARY}) if unknown & set(body) else None) as server:
        with session(server) as opened:
            seen = Watched().watch(opened, prompts(3))
        notices = " ".join(opened.info.notices)
    assert all(completion.error is None for completion in seen.completions)
    for names in ({"seed"}, {"top_k"}, PENALTIES):  # one of the penalty's two names is enough
        (key,) = names - {"repeat_penalty"}
        assert (f"sampling.{key}" in notices) == (names <= unknown)
        assert all(names & set(row.body) == names - unknown for row in server.rows)


# --- showing text as it arrives


def watched_row(server: FaultServer, said: list[str] | None = None, **api: object) -> tuple[Completion, list[str]]:
    shown: list[str] = []
    with session(server, said, **api) as opened:
        seen = Watched().watch(opened, [prompt(0, on_text=shown.append)])
    return seen.completions[0], shown


def test_a_text_is_shown_as_it_arrives():
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    act = Act(pieces=streamed(["Left ", "lung ", "clear."], usage=usage))
    with FaultServer(about(0, act)) as server:
        made, shown = watched_row(server)
        assert server.rows[0].body["stream_options"] == {"include_usage": True}
    assert shown == ["Left ", "lung ", "clear."]
    assert (made.text, made.finish_reason, made.new_tokens) == ("Left lung clear.", "stop", 3)
    assert 0 < made.seconds_to_first_token <= made.seconds_generating


def test_reasoning_that_arrives_in_pieces_is_not_shown_and_kept():
    deltas = [
        {"reasoning_content": "Heart "},
        {"reasoning_content": "first."},
        {"content": "Clear"},
        {"content": [{"type": "text", "text": "."}]},
    ]
    pieces = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n".encode() for delta in deltas]
    with FaultServer(about(0, Act(pieces=[*pieces, *streamed([])]))) as server:
        made, shown = watched_row(server)
    assert shown == ["Clear", "."]
    assert (made.text, made.reasoning, made.finish_reason) == ("Clear.", "Heart first.", "stop")


@pytest.mark.parametrize("refuses", [True, False], ids=["refuses", "ignores"])
def test_a_server_that_does_not_stream_shows_the_whole_text_at_the_end_with_a_notice(refuses):
    said: list[str] = []
    refusal = Act(422, {})
    with FaultServer(lambda body, _: refusal if refuses and body.get("stream") else None) as server:
        made, shown = watched_row(server, said)
    assert shown == [f"{WORDS} 0"] == [made.text]
    assert said == ["The server does not stream: texts are shown once they are complete."]


@pytest.mark.parametrize(
    "pieces",
    [
        streamed(["Left "], reason=None, done=False),
        [*streamed(["Left "], reason=None, done=False), b'data: {"error": "zebrafish"}\n\n'],
        [*streamed(["Left "], reason=None, done=False), b"data: {\n\n"],
        [*streamed(["Left "], reason=None, done=False), b'data: {"choices": [{"delta": {"content": 4}}]}\n\n'],
        streamed(["Left "], reason="abort"),
    ],
    ids=["ends", "error", "no json", "no text", "abort"],
)
def test_a_stream_that_ends_early_fails_the_row_and_shows_no_second_beginning(pieces):
    with FaultServer(about(0, Act(pieces=pieces))) as server:
        made, shown = watched_row(server)
    assert shown == ["Left "]
    assert "in the middle of a text that was being shown" in made.error
    assert CANARY not in made.error


def test_a_stream_that_ends_before_its_first_word_is_retried():
    acts = {1: Act(pieces=[b'data: {"error": "busy"}\n\n']), 2: Act(pieces=streamed(["Clear."]))}
    with FaultServer(about_rows(acts.get)) as server:
        made, shown = watched_row(server)
    assert (shown, made.text, made.error) == (["Clear."], "Clear.", None)


# --- stopping


def test_a_request_that_is_given_up_is_closed():
    stop = StopRequest()

    def drip(number: int) -> Act:
        if number == 4:
            stop.now()
        return Act(pieces=[b" "] * 2000, gap=0.05)

    with FaultServer(about_rows(drip)) as server, session(server, timeout="90s", give_up_after="90s") as opened:
        seen = Watched().watch(opened, prompts(4), stop)
        assert seen.completions == []
        # Long before the requests would end.
        deadline = time.monotonic() + 30
        while server.dropped < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_meter_assigns_every_moment_to_some_request():
    meter = Meter()
    before = time.monotonic()
    first = meter.enter()
    began = time.monotonic()
    time.sleep(0.02)
    second = meter.enter()
    time.sleep(0.02)
    shares = [meter.leave(first)]
    time.sleep(0.02)
    least = time.monotonic() - began
    shares.append(meter.leave(second))
    most = time.monotonic() - before
    assert least - 1e-6 <= sum(share for _, share, _ in shares) <= most + 1e-6
    assert all(1 <= rows <= 2 for _, _, rows in shares)
    assert all(share <= seconds for seconds, share, _ in shares)


# --- Hugging Face Inference


@pytest.fixture
def router(monkeypatch):
    """What is sent to Hugging Face, which tests cannot reach."""
    sent: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        body = json.loads(request.content)
        if body["model"].endswith(":nobody"):
            return httpx2.Response(400, json={"error": {"code": "model_not_supported", "message": CANARY}})
        return httpx2.Response(200, json=repeated(body))

    class Connection(httpx2.AsyncClient):
        def __init__(self, **settings: Any) -> None:
            super().__init__(transport=httpx2.MockTransport(answer), **settings)

    monkeypatch.setattr(httpx2, "AsyncClient", Connection)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    return sent


def test_hugging_face_is_asked_for_the_model_with_the_users_token(router):
    with create(job("", model="google/gemma-3-4b-it"), lambda _: None).open() as opened:
        seen = Watched().watch(opened, prompts(1))
    assert seen.completions[0].text == f"{WORDS} 0"
    assert str(router[-1].url) == "https://router.huggingface.co/v1/chat/completions"
    assert router[-1].headers["authorization"] == "Bearer hf_of_somebody"
    assert json.loads(router[-1].content)["model"] == "google/gemma-3-4b-it"
    assert "https://router.huggingface.co, and from there to a provider" in opened.info.notices[0]


def test_a_providers_token_is_never_sent_to_hugging_face(router, monkeypatch):
    """The router cannot use it, and a token is sent only to the server that issued it."""
    monkeypatch.setenv("GROQ_KEY", "gsk_of_somebody")
    engine = create(job("", provider="groq", token_env="GROQ_KEY"), lambda _: None)
    with pytest.raises(ModelUnavailable, match="not a Hugging Face token") as caught, engine.open():
        pass
    assert "api.base_url" in caught.value.next_step
    assert not router


def test_an_unknown_provider_gives_one_message(router):
    engine = create(job("", provider="nobody"), lambda _: None)
    with pytest.raises(ModelUnavailable, match="does not serve this model") as caught, engine.open():
        pass
    assert "api.provider = nobody" in caught.value.where
    assert "api.provider" in caught.value.next_step
    assert CANARY not in str(caught.value)
    assert {json.loads(request.content)["messages"][-1]["content"] for request in router} == {"Say OK."}


def test_a_provider_is_appended_to_the_model_for_the_router(router):
    with create(job("", model="google/gemma-3-4b-it", provider="groq"), lambda _: None).open() as opened:
        seen = Watched().watch(opened, prompts(1))
    assert seen.completions[0].text == f"{WORDS} 0"
    assert {str(request.url) for request in router} == {"https://router.huggingface.co/v1/chat/completions"}
    assert {json.loads(request.content)["model"] for request in router} == {"google/gemma-3-4b-it:groq"}
    assert "https://router.huggingface.co, and from there to the provider groq" in opened.info.notices[0]


def test_without_a_login_or_while_offline_no_request_goes_to_hugging_face(router, monkeypatch):
    engine = create(job(""), lambda _: None)
    monkeypatch.setattr("gxr_batch.engines.api.get_token", lambda: None)
    with pytest.raises(ModelUnavailable, match="There is no Hugging Face token: HF_TOKEN") as caught, engine.open():
        pass
    assert "hf auth login" in caught.value.next_step
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE"), engine.open():
        pass
    assert not router


# --- what a prompt may contain


@pytest.mark.parametrize("token", ["<start_of_turn>", "<end_of_turn>", "<bos>", "</s>", "<|im_start|>", "[/INST]"])
def test_text_that_a_server_would_read_as_a_control_token_is_not_sent(token):
    encoder = create(job("http://localhost/v1"), lambda _: None).encoder()
    with pytest.raises(RowError, match="control token") as caught:
        encoder.encode(prompt(0, f"{CANARY} {token} model").messages)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("text", ["pH < 7.3 > 7.1", "a <5 mm nodule>", "|x| [sic]", "<b>bold</b>", "size<|3"])
def test_other_angle_brackets_and_bars_are_text(text):
    assert create(job("http://localhost/v1"), lambda _: None).encoder().encode(prompt(0, text).messages).length is None


# --- what a job may contain


@pytest.mark.parametrize(
    ("api", "part"),
    [
        ({"model": ""}, "api.model must name the model"),
        ({"provider": "groq"}, "cannot be combined"),
        ({"base_url": "ftp://host/v1"}, "must be an address"),
        ({"base_url": "localhost:8000"}, "must be an address"),
        ({"base_url": "http://"}, "must be an address"),
        ({"base_url": "http://host:99999/v1"}, "must be an address"),
        ({"base_url": "http://me:secret@host/v1"}, "must not contain a user, password"),
        ({"base_url": "http://host/v1?key=secret"}, "must not contain a user, password"),
        ({"token_env": "hf_abcdefghijkl"}, "a job never holds the token itself"),
        ({"timeout": "soon"}, "must be a duration"),
        ({"give_up_after": ""}, "at least 1 character"),
        ({"concurrency": 0}, "greater than or equal to 1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_invalid_section_is_refused_without_showing_its_values(api, part):
    with pytest.raises(ValueError, match=part) as caught:
        job("http://localhost/v1", **api)
    assert "secret" not in str(caught.value)
    assert "hf_abc" not in str(caught.value)


def test_keys_without_effect_on_a_server_are_named_in_a_notice():
    def idle(**values: object) -> list[str]:
        said = job("http://localhost/v1").with_values(values).warnings()
        return [sentence.partition(" no effect")[0] for sentence in said if "no effect" in sentence]

    values = {"model.path": "my/own", "model.load_in_4bit": True, "model.max_seq_length": 4096, "engine.window": 9}
    assert idle(**values) == ["model.path, model.load_in_4bit have"]
    assert idle(**{"engine.slots": 4}) == ["engine.slots has"]
    assert idle() == []


@pytest.mark.parametrize("values", [{"prompt.format": "literal"}, {"prompt.too_long": "truncate"}])
def test_what_needs_a_local_tokenizer_is_refused_with_the_reason(values):
    with pytest.raises(ValueError, match="needs a local engine"):
        job("http://localhost/v1").with_values(values)


# --- texts with a form: the prompt asks for it, and the answer may come in another dress

FORM = {
    "sections": ["Impression", "Key findings", "Grade"],
    "section": {"Key findings": {"kind": "bullets"}, "Grade": {"kind": "choice", "choices": ["easy", "hard"]}},
}
LAID_OUT = "Impression: No effusion.\n\nKey findings:\n- normal heart\n- clear lungs\n\nGrade: easy"
DRESSES = {
    "the layout": LAID_OUT,
    "blank lines and Windows line ends": "\nImpression:\r\n\r\nNo effusion.\r\n\r\n\r\nKey findings:\r\n"
    "* normal heart\r\n* clear lungs\r\n\r\nGrade: easy\r\n",
    "Markdown": "**Impression:**\nNo effusion.\n\n## Key findings\n- normal heart\n\n- clear lungs\n\n**Grade**: Easy.",
    "lower case": "impression: No effusion.\nkey findings:\n- normal heart\n- clear lungs\ngrade: EASY",
    "a fence": f"```markdown\n{LAID_OUT}\n```",
    "reasoning first": f"<think>Impression: none yet.</think>\n{LAID_OUT}",
    "JSON": '{"Impression": "No effusion.", "key findings": ["normal heart", "clear lungs"], "Grade": "easy"}',
    "JSON in a fence": '```json\n{"Grade": "easy", "Key findings": "normal heart\\nclear lungs", '
    '"Impression": "No effusion."}\n```',
}
NOT_THE_FORM = {
    "a heading is missing": LAID_OUT.replace("Key findings:\n", ""),
    "a heading is there twice": LAID_OUT.replace("- clear lungs", "- clear lungs\n\nImpression: none"),
    "another order": "Key findings:\n- normal heart\n\nImpression: No effusion.\n\nGrade: easy",
    "prose first": f"Here is the case you asked for.\n\n{LAID_OUT}",
    "an empty section": "Impression:\n\nKey findings:\n- normal heart\n\nGrade: easy",
    "a choice that is none": LAID_OUT.replace("easy", "simple"),
    "no text": "",
    "JSON with another key": '{"Impression": "x", "Key findings": ["y"], "Difficulty": "easy"}',
    "JSON with one key more": '{"Impression": "x", "Key findings": ["y"], "Grade": "easy", "Note": "z"}',
    "JSON with a key twice": '{"Impression": "x", "impression": "y", "Key findings": ["y"], "Grade": "easy"}',
    "JSON of another kind": '{"Impression": {"x": 1}, "Key findings": ["y"], "Grade": true}',
    "half of a JSON": '{"Impression": "No effusion.", "Key findings": ["normal heart", "clear',
    "deep JSON": '{"Impression": ' + "[" * 20000,
}


@pytest.mark.parametrize("dress", DRESSES)
def test_an_answer_with_the_forms_headings_is_put_into_its_layout(dress):
    with FaultServer(about_rows(lambda _: Act(body=completion(DRESSES[dress])))) as server:
        made = one(server, form=FORM)
    assert (made.text, made.finish_reason, made.error, made.cut_sections) == (LAID_OUT, "stop", None, ())
    assert len(server.rows) == 1


@pytest.mark.parametrize("answer", NOT_THE_FORM)
def test_an_answer_without_the_forms_headings_is_asked_for_once_again(answer):
    answers = [Act(body=completion(NOT_THE_FORM[answer])), Act(body=completion(LAID_OUT))]
    with FaultServer(about_rows(lambda number: answers[number - 1])) as server:
        made = one(server, form=FORM)
    assert (made.text, made.finish_reason, made.error) == (LAID_OUT, "stop", None)
    first, second = (seen.body for seen in server.rows)
    assert first["seed"] != second["seed"]
    assert first | {"seed": 0} == second | {"seed": 0}


def test_a_row_whose_second_answer_lacks_the_form_too_fails_without_a_word_of_it():
    bad = completion(f"{CANARY} all clear.", usage={"prompt_tokens": 9, "completion_tokens": 4})
    with FaultServer(about_rows(lambda _: Act(body=bad))) as server, session(server, form=FORM) as opened:
        seen = Watched().watch(opened, prompts(3))
        again = opened._calls.retries
    assert [made.error for made in seen.completions] == [
        "the server's answer does not have the form's headings, twice in a row"
    ] * 3
    assert all((made.text, made.finish_reason, made.new_tokens) == ("", "error", 4) for made in seen.completions)
    assert (len(server.rows), again) == (6, 3)


@pytest.mark.parametrize(("ends", "asked"), [("Grade: easy", 1), ("Grade: ea", 2), ("", 2)])
def test_the_token_limit_closes_the_last_section_if_all_are_there(ends, asked):
    cut = completion(LAID_OUT.replace("Grade: easy", ends), reason="length")
    with FaultServer(about_rows(lambda _: Act(body=cut))) as server:
        made = one(server, form=FORM)
    assert len(server.rows) == asked
    if asked == 1:
        assert (made.text, made.finish_reason, made.cut_sections) == (LAID_OUT, "closed", (2,))
    else:
        assert "does not have the form's headings" in made.error


def test_a_text_with_a_form_is_shown_whole_and_in_its_layout():
    shown: list[str] = []
    answers = [Act(body=completion("No headings.")), Act(body=completion(DRESSES["Markdown"]))]
    with FaultServer(about_rows(lambda number: answers[number - 1])) as server, session(server, form=FORM) as opened:
        Watched().watch(opened, [prompt(0, on_text=shown.append)])
    assert shown == [LAID_OUT]


def test_requests_are_the_same_with_and_without_a_form():
    with FaultServer(about_rows(lambda _: Act(body=completion(LAID_OUT)))) as server:
        one(server)
        one(server, form=FORM)
    without, with_form = (seen.body for seen in server.rows)
    assert without == with_form
