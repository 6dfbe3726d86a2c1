"""`run` with the real demo model, killed and resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from engine_contract import CANARY, EngineContract, Subject
from faulty_engine import faulty
from running import Workplace, without_times
from tiny import VOCAB, tiny_gemma

import gxr_batch
from gxr_batch.engines import create
from gxr_batch.engines.base import EngineInfo, Identity, Session, silent
from gxr_batch.engines.echo import EchoEngine
from gxr_batch.engines.slots.decode_loop import TransformersSession
from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.row_steps import LogitsSteps
from gxr_batch.job import Job
from gxr_batch.job.sampling import Sampling
from gxr_batch.records import Encoded, Key, Messages, Prompt, Turn

FINDINGS = ("clear lungs", "a large right pleural effusion", "a small left apical pneumothorax", "cardiomegaly")


def demo_job(work: Workplace, kind: str, dtype: str, *, new_tokens: int = 24) -> None:
    work.job(
        f"[engine]\nkind = '{kind}'\nslots = 8\n[model]\ndtype = '{dtype}'\n[run]\ncheckpoint_seconds = 0.2\n"
        f"[sampling]\ntemperature = 0\nmax_new_tokens = {new_tokens}\n"
    )
    work.table([(f"C{number}", f"{FINDINGS[number % 4]}, case {number}") for number in range(40)])


@pytest.mark.model
def test_the_demo_model_killed_twice_gives_the_texts_of_an_uninterrupted_run(
    tmp_path, demo_model_dir, tmp_path_factory
):
    whole = Workplace(tmp_path_factory.mktemp("whole"))
    # Few tokens: the resumed run generates up to 16 suspects one at a time.
    demo_job(whole, "transformers", "float32", new_tokens=8)
    whole.run()
    work = Workplace(tmp_path)
    demo_job(work, "transformers", "float32", new_tokens=8)
    for kills in (1, 2):
        child = work.start("run", "j.toml", "--quiet")
        deadline = time.monotonic() + 120
        while len(work.parts()) < kills:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.kill()
        child.communicate()
        assert not (work.folder / "outputs/j/results.parquet").exists()
    work.run()
    assert without_times(work.results()) == without_times(whole.results())


@pytest.mark.model
@pytest.mark.parametrize("kind", ["transformers", "generate"])
def test_every_column_of_a_real_run_is_filled_and_plausible(tmp_path, demo_model_dir, kind):
    work = Workplace(tmp_path)
    demo_job(work, kind, "auto")
    work.run("--set", "sampling.temperature=0.7", "--limit", "12")
    frame = gxr_batch.read_results(work.folder / "outputs/j")
    assert frame["gxr_status"].eq("ok").all()
    assert frame["gxr_text"].str.len().gt(0).all()
    assert (
        not frame["gxr_text"]
        .str.contains("<start_of_turn>|<end_of_turn>|You are an expert radiologist. Analyze this chest X-ray showing")
        .any()
    )
    assert frame["gxr_prompt_tokens"].between(20, 80).all()
    assert frame["gxr_new_tokens"].between(1, 24).all()
    assert (frame["gxr_seconds_to_first_token"] <= frame["gxr_seconds_generating"]).all()
    assert frame["gxr_rows_in_batch"].between(1, 16).all()
    invocation = work.manifest()["invocations"][-1]
    # Not closer: time that the machine spent on other things may count for no row.
    assert frame["gxr_seconds_share"].sum() == pytest.approx(invocation["generating_seconds"], rel=0.2)
    assert len(invocation["engine"]["identity"]["weights_sha256"]) == 64
    assert invocation["engine"]["identity"]["kind"] == kind
    assert invocation["packages"]["transformers"]
    assert json.dumps(invocation).count("clear lungs") == 0


class TestEchoContract(EngineContract):
    """The echo engine obeys the protocol of the real engines."""

    @pytest.fixture
    def subject(self) -> Subject:
        job = Job.model_validate(
            {
                "name": "x",
                "input": {"path": "x"},
                "engine": {"kind": "echo", "slots": 4},
                "echo": {"tokens_per_second": 20},
            }
        )
        assert isinstance(create(job), EchoEngine)

        def prompts(count: int) -> list[Prompt]:
            text = "word " * 24
            return [
                Prompt(Key(f"r{n}", 1), Messages((Turn("user", text),), "t"), Encoded(None, 24), n, 24)
                for n in range(count)
            ]

        def spoil(prompt: Prompt) -> Prompt:
            return prompt._replace(messages=Messages((Turn("user", f"{CANARY} word"),), "t"))

        engine = faulty({"fail_containing": CANARY})(job, silent)  # no text that echo itself produces fails a row
        return Subject(open=engine.open, prompts=prompts, spoil=spoil)


class _Numbers:
    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.mark.parametrize(("new_tokens", "finish"), [(500, "stop"), (5, "closed")])
def test_the_echo_engine_writes_every_kind_of_section(tmp_path, new_tokens, finish):
    work = Workplace(tmp_path)
    work.table(4)
    kinds = {"B": "bullets", "C": "choice", "D": "number", "E": "line"}
    sections = "".join(f"[form.section.{heading}]\nkind = '{kind}'\n" for heading, kind in kinds.items())
    sections = sections.replace("'choice'\n", "'choice'\nchoices = ['easy', 'hard']\n")
    engine = f"[engine]\nkind = 'echo'\n[sampling]\nmax_new_tokens = {new_tokens}\n"
    work.job(f"{engine}[form]\nsections = ['A', 'B', 'C', 'D', 'E']\n{sections}")
    work.run()
    for row in work.results():
        assert row["gxr_finish_reason"] == finish
        assert row["gxr_section_a"].startswith("[echo")
        assert 1 <= len(row["gxr_section_b"]) <= 3
        assert row["gxr_section_c"] in {"easy", "hard"}
        assert row["gxr_section_d"] in range(10)
        assert row["gxr_section_e"]


class TestTransformersContract(EngineContract):
    """The slot engine with a tiny model, slowed down so that a row takes a second."""

    @pytest.fixture
    def subject(self) -> Subject:
        model = tiny_gemma()

        class Slow(LibraryModel):
            def decode(self, *arguments):
                time.sleep(0.03)
                return super().decode(*arguments)

        @contextmanager
        def opened() -> Iterator[Session]:
            torch.set_num_threads(1)
            info = EngineInfo(
                identity=Identity(kind="transformers", model="tiny"),
                device="cpu",
                dtype="float32",
                quantization=None,
                slots=4,
                load_seconds=0.0,
                reproducible=True,
            )
            driver = Slow(model, slots=4, capacity=128)
            yield TransformersSession(info, LogitsSteps(driver, Sampling()), _Numbers(), frozenset())

        def prompts(count: int) -> list[Prompt]:
            ids = [3 + n % (VOCAB - 3) for n in range(10)]
            return [
                Prompt(Key(f"r{n}", 1), Messages((Turn("user", "x"),), "t"), Encoded(ids, 10), n, 40)
                for n in range(count)
            ]

        def spoil(prompt: Prompt) -> Prompt:
            return prompt._replace(encoded=Encoded([5] * 500, 500))

        return Subject(open=opened, prompts=prompts, spoil=spoil)
