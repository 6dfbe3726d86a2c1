"""The api engine against a real server: `transformers serve` with the demo model, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from running import Workplace

from gxr_batch.engines import create
from gxr_batch.engines.base import Pulse, StopRequest
from gxr_batch.job import load_job
from gxr_batch.records import Encoded, Key, Messages, Prompt, Turn

pytestmark = pytest.mark.model
# The demo model has no chat template, and a server needs one.
TEMPLATE = """{{ bos_token }}{% for turn in messages %}<start_of_turn>{{ turn['role'] }}
{{ turn['content'] if turn['content'] is string else turn['content'][0]['text'] }}<end_of_turn>
{% endfor %}<start_of_turn>model
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory, demo_model_dir):
    """The address of a server with the demo model, and the model's name there."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install 'transformers[serving]'")
    folder = tmp_path_factory.mktemp("served") / "demo"
    folder.mkdir()
    for file in Path(demo_model_dir).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text('{"do_sample": true, "eos_token_id": [1, 106], "pad_token_id": 0}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    log = (folder.parent / "log").open("w")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=log, stderr=log
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, folder.parent / "log")
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        server.kill()
        server.wait()
        log.close()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"transformers serve did not come up:\n{log.read_text()[-2000:]}")


def settings(served: tuple[str, str]) -> list[str]:
    url, model = served
    return ["engine.kind=api", f"api.base_url={url}", f"api.model={model}", "api.concurrency=2"]


def test_a_run_through_a_real_server(served, tmp_path):
    work = Workplace(tmp_path)
    work.job("[sampling]\nmax_new_tokens = 8\n")
    work.table(3)
    done = work.run(*(part for setting in settings(served) for part in ("--set", setting)))
    assert "refuses sampling.top_k, sampling.repetition_penalty" in done.stderr
    rows = work.results()
    assert [row["gxr_status"] for row in rows] == ["ok"] * 3
    assert all(row["gxr_text"].strip() and 0 < row["gxr_new_tokens"] <= 8 for row in rows)
    assert all(row["gxr_prompt_tokens"] > 20 for row in rows)
    assert all(0 < row["gxr_seconds_share"] <= row["gxr_seconds_generating"] for row in rows)


def test_a_run_with_a_form_through_a_real_server(served, tmp_path):
    work = Workplace(tmp_path)
    form = "[form]\nsections = ['Impression', 'Teaching point']\n"
    work.job(f"[sampling]\nmax_new_tokens = 64\n[run]\nmax_failed = 'off'\n{form}")
    work.table(3)
    work.run(*(part for setting in settings(served) for part in ("--set", setting)), expect=None)
    rows = work.results()
    assert len(rows) == 3
    for row in rows:  # the demo model may or may not write the headings
        if row["gxr_status"] == "ok":
            assert row["gxr_section_impression"]
            assert row["gxr_section_teaching_point"]
            assert row["gxr_finish_reason"] in {"stop", "closed"}
        else:
            assert row["gxr_error"] == "the server's answer does not have the form's headings, twice in a row"


def test_a_real_server_streams_its_answer(served, tmp_path):
    (tmp_path / "j.toml").write_text("name = 'j'\n[input]\npath = 'f.csv'\n[sampling]\nmax_new_tokens = 8\n")
    job = load_job(tmp_path / "j.toml", settings(served))
    shown: list[str] = []
    messages = Messages((Turn("user", "What is a pleural effusion?"),), "t")
    prompt = Prompt(Key("a", 1), messages, Encoded(None, None), 7, 8, shown.append)
    said: list[str] = []
    with create(job, said.append).open() as session:
        events = [event for event in session.stream(iter([prompt]), StopRequest()) if not isinstance(event, Pulse)]
    (made,) = events
    assert made.error is None
    assert "".join(shown) == made.text
    assert len(shown) > 1
    assert 0 < made.seconds_to_first_token < made.seconds_generating
    assert said == []
