"""`generate`: one prompt or a conversation, with the engine, the layout and the defaults of `run`."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fault_server import FaultServer
from running import COMMAND, Workplace

from gxr_batch.chat import Conversation, Question, filled, open_conversation
from gxr_batch.engines.base import StopRequest
from gxr_batch.errors import UserError
from gxr_batch.job import make_job
from gxr_batch.prompts import Templates
from gxr_batch.records import DISCLAIMER

ECHO = ("--engine", "echo")


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def ask(work: Workplace, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    return work.gxr("generate", *ECHO, *arguments, expect=expect)


def talk(work: Workplace, lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "generate", *ECHO, "--interactive", *arguments],
        cwd=work.folder,
        input=lines,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )


def test_one_prompt_is_answered_and_the_disclaimer_shown(work):
    done = ask(work, "--prompt", "a small effusion")
    assert "small" in done.stdout
    assert DISCLAIMER in done.stdout
    assert "echo engine" in done.stderr
    assert ask(work, "--prompt", "a small effusion", "--quiet").stderr == ""


def test_a_template_is_filled_as_for_a_row(work):
    text = ask(work, "--template", "clinical_case", "--field", "findings=a small effusion", "--field", "age=40").stdout
    assert "40-year-old" in text
    assert "a small effusion" in text


def test_json_tells_counts_and_times(work):
    told = json.loads(ask(work, "--prompt", "one two three", "--json").stdout)
    assert told["finish_reason"] == "stop"
    assert told["new_tokens"] >= 3
    assert told["ai_generated"] is True
    assert told["disclaimer"] == DISCLAIMER


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Give --prompt"),
        (("--prompt", " "), "--prompt is empty"),
        (("--prompt", "x", "--template", "basic"), "give one of them"),
        (("--prompt", "x", "--field", "findings=y"), "--field goes with --template"),
        (("--template", "basic", "--field", "foo=y"), "the template basic has findings"),
        (("--template", "basic"), "needs findings"),
        (("--prompt", "x", "--temperature", "-1"), "sampling.temperature: must be at least 0"),
        (("--prompt", "x", "--top-p", "0"), "sampling.top_p: must be above 0"),
        (("--prompt", "x", "--preset", "wild"), "sampling.preset"),
        (("--interactive", "--json"), "--json goes with one prompt"),
    ],
)
def test_what_cannot_be_meant_is_refused(work, arguments, said):
    assert said in ask(work, *arguments, expect=2).stderr


def test_settings_outside_the_guides_ranges_are_warned_of_with_range_and_reason(work):
    told = ask(work, "--prompt", "x", "--temperature", "1.9").stderr
    assert "outside the guide's range 0.1 to 1.5" in told
    assert "become incoherent" in told


@pytest.mark.parametrize("spelling", ["--hub", "--model-id", "--model"])
def test_the_old_spellings_of_options_mean_what_they_meant(work, spelling):
    done = ask(work, "--prompt", "one two three four", spelling, "someone/model", "--max-tokens", "2", "--json")
    assert json.loads(done.stdout)["new_tokens"] == 2
    assert "no meaning here" in ask(work, "--prompt", "x", "--batch-size", "4").stderr
    assert "no meaning" not in ask(work, "--prompt", "x", "--batch-size", "1", "--no-do-sample").stderr


def test_model_names_the_servers_where_a_server_generates(work):
    with FaultServer() as server:
        work.job(f"[engine]\nkind = 'api'\n[api]\nbase_url = '{server.url}'\n")
        told = work.gxr("generate", "--job", "j.toml", "--prompt", "x", "--model", "own/name")
        assert server.rows[-1].body["model"] == "own/name"
    assert "no effect" not in told.stderr
    refused = work.gxr("generate", "--engine", "api", "--prompt", "x", expect=2)
    assert "--model" in refused.stderr


@pytest.mark.parametrize(("asked", "opened"), [("auto", 1), (3, 3)])
def test_a_conversation_opens_one_worker_of_a_pool_unless_told_otherwise(monkeypatch, asked, opened):
    class Made(Exception):
        pass

    def create(job, say):
        raise Made(job.ray.workers)

    monkeypatch.setattr("gxr_batch.chat.create", create)
    job = make_job("generate", (), {"engine.kind": "ray", "ray.worker": "echo", "ray.workers": asked})
    with pytest.raises(Made) as made, open_conversation(job, print):
        pass
    assert made.value.args == (opened,)


def test_a_conversation_remembers_until_it_is_reset(work):
    done = talk(work, "first words\n/system Be kind.\nsecond\n/system\n/save talk.json\n/wrong\n/quit\nnever\n")
    assert done.returncode == 0
    assert DISCLAIMER in done.stdout
    assert "Be kind." in done.stdout
    assert "There is no /wrong" in done.stderr
    assert "never" not in done.stdout
    saved = json.loads((work.folder / "talk.json").read_text())
    assert [turn["role"] for turn in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["disclaimer"] == DISCLAIMER
    again = talk(work, "x\n/save talk.json\n")
    assert "exists; choose another name" in again.stderr
    assert json.loads((work.folder / "talk.json").read_text()) == saved


def test_ctrl_c_stops_the_answer_and_not_the_conversation(work):
    slow = ("--set", "echo.tokens_per_second=1")
    arguments = [*COMMAND, "generate", *ECHO, "--interactive", *slow, "--prompt", "word " * 40]
    with subprocess.Popen(
        arguments, cwd=work.folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while "> word" not in (line := process.stdout.readline()):
            assert line, "it ended without a question"
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "\n"
        assert "[stopped]" in process.stdout.readline()
        rest, _ = process.communicate("/reset\n/quit\n", timeout=60)
    assert "[anew]" in rest
    assert process.returncode == 0


def test_a_conversation_that_no_longer_fits_is_said_and_can_go_on(work):
    done = talk(work, "word " * 40 + "\n/reset\nshort\n", "--max-seq-length", "40", "--max-tokens", "20")
    assert "The conversation is too long" in done.stderr
    assert "short" in done.stdout


def test_a_prompt_with_identifiers_is_told_or_kept_from_the_engine(work):
    told = ask(work, "--prompt", "MRN 4455667: effusion").stderr
    assert "Identifier screening hits this prompt: mrn" in told
    held = ask(work, "--prompt", "MRN 4455667: effusion", "--set", "privacy.identifiers=hold", expect=2)
    assert "holds this prompt back: mrn" in held.stderr
    assert "4455667" not in held.stdout + held.stderr


def test_fields_and_system_text_are_screened_and_a_templates_own_words_are_not(work):
    own = work.folder / "own.md.j2"
    own.write_text("Report of 12 March 2019, MRN 4455667. Findings: {{ findings }}")
    given = {"engine.kind": "echo", "prompt.template": str(own), "privacy.identifiers": "hold"}
    job = make_job("generate", given=given)
    template = Templates(job.prompt).default
    said: list[str] = []

    def asked(conversation: Conversation, findings: str) -> None:
        conversation.ask(filled(template, {"findings": findings}), lambda piece: None, StopRequest())

    with open_conversation(job, said.append) as conversation:
        asked(conversation, "effusion")
        with pytest.raises(UserError, match="holds this prompt back: mrn\\."):
            asked(conversation, "effusion, MRN 7654321")
        conversation.reset()
        conversation.system = "For MRN 7654321."
        with pytest.raises(UserError, match="holds the system text back: mrn\\."):
            asked(conversation, "effusion")
    with open_conversation(job.with_values({"privacy.identifiers": "flag"}), said.append) as conversation:
        conversation.system = "For MRN 7654321."
        for _ in range(2):
            asked(conversation, "effusion, MRN 7654321")
    hits = [sentence.removeprefix("Identifier screening hits ") for sentence in said if "screening" in sentence]
    assert hits == ["this prompt: mrn.", "the system text: mrn.", "this prompt: mrn."]
    field = ("--template", str(own), "--field", "findings=MRN 7654321", "--set", "privacy.identifiers=hold")
    refused = ask(work, *field, expect=2)
    assert "holds this prompt back: mrn." in refused.stderr
    assert "7654321" not in refused.stderr


@pytest.mark.model
def test_an_answer_is_bit_for_bit_what_run_gives_the_row_of_that_name(work, demo_model_dir):
    work.table([("generate", "a small left pleural effusion")])
    work.job("[prompt]\ntemplate = 'basic'\n[sampling]\nmax_new_tokens = 24\n")
    work.run()
    fields = ("--template", "basic", "--field", "findings=a small left pleural effusion")
    done = work.gxr("generate", *fields, "--max-tokens", "24", "--json")
    assert json.loads(done.stdout)["text"] == work.results()[0]["gxr_text"]


@pytest.mark.model
def test_tokens_are_shown_as_they_come_and_add_up_to_the_answer(demo_model_dir):
    job = make_job("generate", given={"sampling.max_new_tokens": 12})
    pieces: list[str] = []
    with open_conversation(job, lambda sentence: None) as conversation:
        first = conversation.ask(Question("Name three lobes."), pieces.append, StopRequest())
        assert first is not None
        assert "".join(pieces) == first.text
        assert len(pieces) > 3
        second = conversation.ask(Question("And two more?"), lambda piece: None, StopRequest())
        assert second is not None
        assert second.prompt_tokens > first.prompt_tokens + first.new_tokens
        assert [turn.role for turn in conversation.turns] == ["user", "model", "user", "model"]
