"""`generate`: one prompt or a conversation, with the engine, prompt layout and defaults of `run`."""

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


def test_one_prompt_is_answered_with_the_disclaimer(work):
    done = ask(work, "--prompt", "a small effusion")
    assert "small" in done.stdout
    assert DISCLAIMER in done.stdout
    assert "echo engine" in done.stderr
    assert ask(work, "--prompt", "a small effusion", "--quiet").stderr == ""


def test_a_template_is_filled_like_a_rows(work):
    text = ask(work, "--template", "clinical_case", "--field", "findings=a small effusion", "--field", "age=40").stdout
    assert "40-year-old" in text
    assert "a small effusion" in text


def test_json_has_counts_and_times(work):
    shown = json.loads(ask(work, "--prompt", "one two three", "--json").stdout)
    assert shown["finish_reason"] == "stop"
    assert shown["new_tokens"] >= 3
    assert shown["ai_generated"] is True
    assert shown["disclaimer"] == DISCLAIMER


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give --prompt"),
        (("--prompt", " "), "--prompt is empty"),
        (("--prompt", "x", "--template", "basic"), "give one of them"),
        (("--prompt", "x", "--field", "findings=y"), "--field requires --template"),
        (("--template", "basic", "--field", "foo=y"), "the fields of template basic are findings"),
        (("--template", "basic"), "needs findings"),
        (("--prompt", "x", "--temperature", "-1"), "sampling.temperature: must be at least 0"),
        (("--prompt", "x", "--top-p", "0"), "sampling.top_p: must be above 0"),
        (("--prompt", "x", "--preset", "wild"), "sampling.preset"),
        (("--interactive", "--json"), "--json cannot be combined with --interactive"),
    ],
)
def test_invalid_arguments_are_refused(work, arguments, message):
    assert message in ask(work, *arguments, expect=2).stderr


def test_a_setting_outside_the_guides_range_gives_a_warning_with_range_and_reason(work):
    warning = ask(work, "--prompt", "x", "--temperature", "1.9").stderr
    assert "outside the guide's range 0.1 to 1.5" in warning
    assert "become incoherent" in warning


@pytest.mark.parametrize("spelling", ["--hub", "--model-id", "--model"])
def test_the_old_spellings_of_options_still_work(work, spelling):
    done = ask(work, "--prompt", "one two three four", spelling, "someone/model", "--max-tokens", "2", "--json")
    assert json.loads(done.stdout)["new_tokens"] == 2
    assert "--batch-size has no effect here" in ask(work, "--prompt", "x", "--batch-size", "4").stderr
    assert "--batch-size" not in ask(work, "--prompt", "x", "--batch-size", "1", "--no-do-sample").stderr


def test_model_names_the_servers_model_with_the_api_engine(work):
    with FaultServer() as server:
        work.job(f"[engine]\nkind = 'api'\n[api]\nbase_url = '{server.url}'\n")
        done = work.gxr("generate", "--job", "j.toml", "--prompt", "x", "--model", "own/name")
        assert server.rows[-1].body["model"] == "own/name"
    assert "no effect" not in done.stderr
    refused = work.gxr("generate", "--engine", "api", "--prompt", "x", expect=2)
    assert "--model" in refused.stderr


@pytest.mark.parametrize(("asked", "opened"), [("auto", 1), (3, 3)])
def test_a_conversation_opens_one_ray_worker_unless_the_job_sets_more(monkeypatch, asked, opened):
    class Made(Exception):
        pass

    def create(job, say):
        raise Made(job.ray.workers)

    monkeypatch.setattr("gxr_batch.chat.create", create)
    job = make_job("generate", (), {"engine.kind": "ray", "ray.worker": "echo", "ray.workers": asked})
    with pytest.raises(Made) as made, open_conversation(job, print):
        pass
    assert made.value.args == (opened,)


def test_a_conversation_keeps_its_turns_until_reset(work):
    done = talk(work, "first words\n/system Be kind.\nsecond\n/system\n/save talk.json\n/wrong\n/quit\nnever\n")
    assert done.returncode == 0
    assert DISCLAIMER in done.stdout
    assert "Be kind." in done.stdout
    assert "Unknown command /wrong" in done.stderr
    assert "never" not in done.stdout
    saved = json.loads((work.folder / "talk.json").read_text())
    assert [turn["role"] for turn in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["disclaimer"] == DISCLAIMER
    again = talk(work, "x\n/save talk.json\n")
    assert "exists; choose another name" in again.stderr
    assert json.loads((work.folder / "talk.json").read_text()) == saved


def test_ctrl_c_stops_the_answer_but_not_the_conversation(work):
    slow = ("--set", "echo.tokens_per_second=1")
    arguments = [*COMMAND, "generate", *ECHO, "--interactive", *slow, "--prompt", "word " * 40]
    with subprocess.Popen(
        arguments, cwd=work.folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while "> word" not in (line := process.stdout.readline()):
            assert line, "ended before the question was shown"
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "\n"
        assert "[stopped]" in process.stdout.readline()
        rest, _ = process.communicate("/reset\n/quit\n", timeout=60)
    assert "[new conversation]" in rest
    assert process.returncode == 0


def test_a_conversation_that_is_too_long_is_reported_and_can_be_reset(work):
    done = talk(work, "word " * 40 + "\n/reset\nshort\n", "--max-seq-length", "40", "--max-tokens", "20")
    assert "The conversation is too long" in done.stderr
    assert "short" in done.stdout


def test_a_prompt_with_identifiers_is_reported_or_held(work):
    notices = ask(work, "--prompt", "MRN 4455667: effusion").stderr
    assert "Identifier screening found mrn in this prompt." in notices
    held = ask(work, "--prompt", "MRN 4455667: effusion", "--set", "privacy.identifiers=hold", expect=2)
    assert "holds this prompt: mrn" in held.stderr
    assert "4455667" not in held.stdout + held.stderr


def test_fields_and_system_text_are_screened_but_the_templates_own_words_are_not(work):
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
        with pytest.raises(UserError, match="holds this prompt: mrn\\."):
            asked(conversation, "effusion, MRN 7654321")
        conversation.reset()
        conversation.system = "For MRN 7654321."
        with pytest.raises(UserError, match="holds the system text: mrn\\."):
            asked(conversation, "effusion")
    with open_conversation(job.with_values({"privacy.identifiers": "flag"}), said.append) as conversation:
        conversation.system = "For MRN 7654321."
        for _ in range(2):
            asked(conversation, "effusion, MRN 7654321")
    hits = [sentence.removeprefix("Identifier screening found ") for sentence in said if "screening" in sentence]
    assert hits == ["mrn in this prompt.", "mrn in the system text.", "mrn in this prompt."]
    field = ("--template", str(own), "--field", "findings=MRN 7654321", "--set", "privacy.identifiers=hold")
    refused = ask(work, *field, expect=2)
    assert "holds this prompt: mrn." in refused.stderr
    assert "7654321" not in refused.stderr


@pytest.mark.model
def test_an_answer_is_identical_to_that_of_a_run(work, demo_model_dir):
    work.table([("generate", "a small left pleural effusion")])
    work.job("[prompt]\ntemplate = 'basic'\n[sampling]\nmax_new_tokens = 24\n")
    work.run()
    fields = ("--template", "basic", "--field", "findings=a small left pleural effusion")
    done = work.gxr("generate", *fields, "--max-tokens", "24", "--json")
    assert json.loads(done.stdout)["text"] == work.results()[0]["gxr_text"]


@pytest.mark.model
def test_streamed_pieces_add_up_to_the_answer(demo_model_dir):
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
