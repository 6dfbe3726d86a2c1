"""The vllm engine with the real vLLM: the contract, its draws, adapters, and recovery.

vLLM pins its own torch, so it has a separate environment: `make test-vllm` creates it and runs this file there.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from engine_contract import CANARY, EngineContract, Subject, Watched
from running import Workplace
from tiny import save_adapter, tiny_gemma

from gxr_batch.engines import create
from gxr_batch.engines.vllm import VllmEngine
from gxr_batch.errors import ModelUnavailable
from gxr_batch.forms import form_of, parts_of
from gxr_batch.job import Job
from gxr_batch.records import Encoded, Key, Messages, Prompt, Turn

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not in this environment; make test-vllm runs these tests"
)
GREEDY = {"temperature": 0, "repetition_penalty": 1.0}
PROMPTS = ([2, 5, 9], [2, *range(100, 140)], [2, *range(300, 560)])
NEW = 24


def job(path: Path | str, **sections) -> Job:
    model = {"path": str(path), "max_seq_length": 512} | sections.pop("model", {})
    engine = {"kind": "vllm", "slots": 4, "memory_limit": "256MiB"} | sections.pop("engine", {})
    vllm = {"eager": True} | sections.pop("vllm", {})
    data = {"name": "j", "input": {"path": "none"}, "model": model, "engine": engine, "vllm": vllm, **sections}
    return Job.model_validate(data)


def prompts(count: int, new: int = 4, first: int = 0) -> list[Prompt]:
    messages = Messages((Turn("user", CANARY),), "t")
    return [
        Prompt(Key(f"r{row}", 1), messages, Encoded([2, *range(1000 + row, 1030 + row)], 31), 7919 * row, new)
        for row in range(first, first + count)
    ]


def of_ids(*ids: list[int], new: int = NEW) -> list[Prompt]:
    rows = enumerate(ids)
    return [Prompt(Key(f"r{row}", 1), Messages((), "t"), Encoded(one, len(one)), row, new) for row, one in rows]


def complete(session, work: list[Prompt]) -> list[str]:
    done = {completion.key: completion for completion in Watched().watch(session, work).completions}
    assert [done[prompt.key].error for prompt in work] == [None] * len(work)
    return [done[prompt.key].text for prompt in work]


@pytest.fixture(scope="class")
def demo(demo_model_dir):
    """One opened vLLM for all tests of a class: opening takes longer than the tests."""
    said: list[str] = []
    with VllmEngine(job(demo_model_dir), said.append).open() as session:
        yield session, said


class TestOnTheDemoModel(EngineContract):
    @pytest.fixture
    def session(self, demo):
        return demo[0]

    @pytest.fixture
    def subject(self, session):
        return Subject(
            open=lambda: nullcontext(session),
            prompts=prompts,
            lasting=lambda count: prompts(count, new=16),
            spoil=lambda prompt: prompt._replace(max_new_tokens=0),  # vLLM itself refuses it
        )

    def test_it_reports_its_vllm_version_and_is_not_reproducible(self, session):
        assert session.info.versions["vllm"]
        assert not session.info.reproducible
        assert any("not reproducible" in notice for notice in session.info.notices)

    def test_a_rows_seed_decides_its_draws(self, session):
        (one,) = prompts(1, new=12)
        alone = [complete(session, [one._replace(row_seed=seed)])[0] for seed in (1, 1, 2)]
        assert alone[0] == alone[1] != alone[2]

    def test_a_text_is_shown_as_it_arrives(self, session):
        pieces: list[str] = []
        (text,) = complete(session, [prompts(1, new=12)[0]._replace(on_text=pieces.append)])
        assert len(pieces) > 3
        assert "".join(pieces) == text

    def test_rows_of_a_killed_engine_core_start_again_in_another(self, demo):
        session, said = demo
        old = psutil.Process(session._host._process.pid).children(recursive=True)
        killed = []

        def kill_once(seen: Watched) -> None:
            if seen.completions and not killed:
                (core,) = [process for process in old if "EngineCore" in process.name()]
                core.kill()
                killed.append(core)

        seen = Watched().watch(session, prompts(6, new=12), after=kill_once)
        assert sorted(completion.key.row_id for completion in seen.completions) == [f"r{row}" for row in range(6)]
        assert all(completion.error is None for completion in seen.completions)
        assert seen.pulses[-1].retries >= 1
        assert seen.longest_silence < 1 + seen.stall
        assert "1 of 3" in said[0]
        assert not psutil.wait_procs(old, timeout=20)[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_model_dir):
    """A tiny float32 model that ends at a token that it is known to draw, its tokens, and an adapter for it."""
    model = tiny_gemma()
    drawn = greedily(model)
    end = drawn[0][5]
    folder = tmp_path_factory.mktemp("vllm") / "tiny"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    adapted = save_adapter(model, folder.parent / "adapter")
    return folder, end, drawn, folder.parent / "adapter", greedily(adapted)


def greedily(model) -> list[list[int]]:
    found = []
    for ids in PROMPTS:
        given = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                do_sample=False,
                max_new_tokens=NEW,
                eos_token_id=None,
                pad_token_id=0,
            )
        found.append(out[0, len(ids) :].tolist())
    return found


def until(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def test_greedy_tokens_equal_transformers_and_an_answer_ends_at_each_of_the_models_end_ids(tiny, gemma_tokenizer):
    folder, end, drawn, _, _ = tiny
    asked = job(folder, model={"dtype": "float32"}, sampling=GREEDY)
    with VllmEngine(asked).open() as session:
        seen = Watched().watch(session, of_ids(*PROMPTS))
    by_row = {completion.key.row_id: completion for completion in seen.completions}
    expected = [until(end, ids) for ids in drawn]
    decoded = [gemma_tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert [by_row[f"r{row}"].text for row in range(3)] == decoded
    assert (by_row["r0"].finish_reason, by_row["r0"].new_tokens) == ("stop", len(expected[0]) + 1)


FORM = {
    "sections": ["Impression", "Key findings", "Grade", "Size", "Point"],
    "section": {
        "Key findings": {"kind": "bullets"},
        "Grade": {"kind": "choice", "choices": ["high", "high grade", "low"]},
        "Size": {"kind": "number"},
        "Point": {"kind": "line"},
    },
}
FORM_NEW = 110


@pytest.mark.parametrize("sampling", [GREEDY, {"temperature": 2.0, "top_k": 0, "top_p": 1.0}])
def test_every_text_has_the_form_with_rows_coming_and_going(demo_model_dir, sampling):
    asked = job(demo_model_dir, model={"dtype": "float32"}, sampling=sampling | {"max_new_tokens": FORM_NEW}, form=FORM)
    form = form_of(asked)
    work = [one._replace(max_new_tokens=FORM_NEW + 7 * (row % 5)) for row, one in enumerate(prompts(14))]
    pieces: list[str] = []
    work[3] = work[3]._replace(on_text=pieces.append)
    with VllmEngine(asked).open() as session:
        done = {completion.key: completion for completion in Watched().watch(session, work).completions}
        (short,) = Watched().watch(session, prompts(1, new=30)).completions
    for prompt in work:
        completion = done[prompt.key]
        assert completion.error is None
        assert parts_of(form, completion.text)
        assert completion.finish_reason == ("closed" if completion.cut_sections else "stop")
        assert completion.new_tokens <= prompt.max_new_tokens
        assert set(completion.cut_sections) <= {0, 1, 3, 4}
    assert "".join(pieces) == done[work[3].key].text
    assert len(pieces) > 3
    assert "form needs at least" in short.error
    if sampling == GREEDY:
        with create(asked.with_values({"engine.kind": "transformers"})).open() as own:
            ours = {completion.key: completion for completion in Watched().watch(own, work).completions}
        same = [
            (done[key].text, done[key].cut_sections) == (made.text, made.cut_sections) for key, made in ours.items()
        ]
        assert sum(same) >= 12, "almost all: the last bits of the logits differ"


def test_an_adapter_applied_by_vllm_gives_pefts_tokens(tiny, gemma_tokenizer):
    folder, end, drawn, adapter, adapted = tiny
    asked = job(folder, model={"dtype": "float32", "adapter": str(adapter)}, sampling=GREEDY)
    with VllmEngine(asked).open() as session:
        texts = complete(session, of_ids(*PROMPTS))
        assert "8 LoRA modules, rank 4" in session.info.adapter
    assert texts == [gemma_tokenizer.decode(until(end, ids), skip_special_tokens=True) for ids in adapted]
    assert adapted != drawn


def test_a_model_that_does_not_fit_gives_one_message_with_the_reason(tiny_model_dir):
    asked = job(tiny_model_dir, model={"max_seq_length": 4096}, engine={"memory_limit": "1MiB"})
    with pytest.raises(ModelUnavailable, match=r"could not open the model: .*cache") as caught:
        VllmEngine(asked).open().__enter__()
    assert "Traceback" not in str(caught.value)


def test_a_killed_run_ends_vllm_and_resumes_with_the_remaining_rows(tmp_path, demo_model_dir):
    work = Workplace(tmp_path)
    work.table(12)
    work.job(
        "[model]\nmax_seq_length = 512\n[sampling]\nmax_new_tokens = 12\n[engine]\nkind = 'vllm'\nslots = 2\n"
        "memory_limit = '256MiB'\n[run]\ncheckpoint_seconds = 0.5\n[vllm]\neager = true\n"
    )
    child = work.start("run", "j.toml", "--quiet")
    try:
        deadline = time.monotonic() + 400
        while not work.parts():
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.05)
        family = psutil.Process(child.pid).children(recursive=True)
        assert any("EngineCore" in process.name() for process in family)
    finally:
        child.kill()
        out, err = child.communicate()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert not (work.folder / "outputs/j/inflight.json").exists(), "no row in vLLM can kill our process"
    summary = work.run_json()
    assert summary["ok"] == 12
    assert 0 < summary["generated_now"] < 12
    assert out == ""
    assert "finding number" not in err
