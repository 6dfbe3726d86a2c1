"""Our forward pass gets more slots during a run once the GPU has memory for them: no text changes, no row is lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import tiny_gemma, tiny_llama
from tiny_sessions import GREEDY, Ids, info_of, prompt, prompts, session, texts

from gxr_batch.engines.base import Pulse, StopRequest
from gxr_batch.engines.slots.decode_loop import TransformersSession
from gxr_batch.engines.slots.decoding_row import RowState
from gxr_batch.engines.slots.gpu import compare_forward, forward, memory_plan, open_gpu, paged_cache
from gxr_batch.engines.slots.gpu.compare_forward import Comparison
from gxr_batch.engines.slots.gpu.memory_plan import plan
from gxr_batch.engines.slots.gpu.open_gpu import OpenedGpu, sizes_of
from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.row_steps import LogitsSteps
from gxr_batch.job import EngineSection
from gxr_batch.job.sampling import Sampling
from gxr_batch.records import Completion

pytestmark = pytest.mark.usefixtures("interpreted")

SAMPLED = Sampling(temperature=1.0)
CAPACITY = 128
VOCAB = 256
NOTICE = "The GPU has more free memory: 4 slots instead of 2."


@pytest.fixture(autouse=True)
def _asked_at_every_step(monkeypatch):
    monkeypatch.setattr(memory_plan, "_SPARE_BYTES", 0)  # as much as hundreds of the tiny model's rows
    monkeypatch.setattr(open_gpu, "_LOOK_SECONDS", 0.0)


@pytest.fixture(scope="module")
def model():
    return tiny_gemma(vocab=VOCAB)


def bytes_of(model, slots: int) -> int:
    """Return the memory of so many slots, and of one row of the full capacity more."""
    return plan(sizes_of(model.config, model.dtype), capacity=CAPACITY, budget=2**40, slots=slots).bytes


def opened(model, sampling, *budgets: int, graphs: bool = False) -> OpenedGpu:
    """Open with the memory of so many slots; later questions are answered with the next ones, then with the last."""
    answers = itertools.chain(budgets, itertools.repeat(budgets[-1]))
    settings = EngineSection(self_check=False, reproducible=False, cuda_graphs=graphs)
    return open_gpu.open_gpu(
        model, settings, sampling, capacity=CAPACITY, budget=lambda held: bytes_of(model, next(answers))
    )


def session_of(made: OpenedGpu, fallback=None) -> TransformersSession:
    return TransformersSession(info_of(made.plan.slots), made.steps, Ids(), frozenset(), fallback, grow=made.grow)


def written(session, work):
    """Return the texts and the notices."""
    events = list(session.stream(iter(work), StopRequest()))
    notices = [notice for event in events if isinstance(event, Pulse) for notice in event.notices]
    done = [event for event in events if isinstance(event, Completion)]
    assert len(done) == len(work)
    return {event.key.row_id: event.text for event in done}, notices


def library(model, sampling, work):
    return texts(session(LibraryModel(model, slots=8, capacity=CAPACITY), 8, sampling), work)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_texts_are_those_of_a_run_that_never_grew(model, monkeypatch, sampling):
    work = prompts([1, 17, 9, 5], new=4, vocab=VOCAB)
    made = opened(model, sampling, 2, 2, 4)
    assert made.plan.slots == 2
    together, decode = [], made.steps.decode
    monkeypatch.setattr(made.steps, "decode", lambda rows: together.append(len(rows)) or decode(rows))
    session = session_of(made)
    found, notices = written(session, work)
    assert notices == [NOTICE]
    assert session.info.slots == 4
    assert max(together) > 2
    assert (found, []) == written(session_of(opened(model, sampling, 2)), work)
    assert found == library(model, sampling, work)


def test_with_less_memory_or_the_same_nothing_changes(model):
    made = opened(model, SAMPLED, 2, 1, 2)
    made.steps.grow = lambda *_: pytest.fail("there is no more memory")
    assert made.grow() == made.grow() == (2, [])


def test_memory_is_asked_for_again_after_minutes_not_at_every_step(model, monkeypatch):
    monkeypatch.setattr(open_gpu, "_LOOK_SECONDS", 300)
    made = opened(model, SAMPLED, 2, 16)
    assert made.grow() == (2, [])
    made.grow.asked_at -= 301
    assert made.grow() == (16, [])
    assert made.grow.asked_at > 0


def test_a_look_gives_no_memory_back_and_counts_what_the_allocator_keeps(model, monkeypatch):
    asked = []
    settings = EngineSection(self_check=False, reproducible=False)
    budget = bytes_of(model, 2)
    made = open_gpu.open_gpu(
        model, settings, SAMPLED, capacity=CAPACITY, budget=lambda held: asked.append(held) or budget
    )
    monkeypatch.setattr(open_gpu, "cached_bytes", lambda device: 7)
    monkeypatch.setattr(open_gpu, "release_cached", lambda: pytest.fail("a step may need it"))
    assert made.grow() == (2, [])
    assert asked == [0, made.plan.reserved + 7]


@pytest.mark.parametrize(("set_to", "fit", "same"), [("auto", 1, False), ("auto", 2, True), (1, 1, True)])
def test_the_bits_of_several_rows_are_not_promised_after_a_comparison_of_one(model, monkeypatch, set_to, fit, same):
    monkeypatch.setattr(compare_forward, "compare", lambda *_: Comparison("", same_bits=True))
    settings, budget = EngineSection(slots=set_to), bytes_of(model, fit)
    made = open_gpu.open_gpu(model, settings, SAMPLED, capacity=CAPACITY, budget=lambda held: budget)
    assert (made.plan.slots, made.same_bits) == (fit, same)


def test_slots_that_were_set_stay(model):
    settings = EngineSection(slots=2, self_check=False, reproducible=False)
    made = open_gpu.open_gpu(model, settings, SAMPLED, capacity=CAPACITY, budget=lambda held: 2**30)
    assert made.grow is None


@pytest.mark.parametrize("fails_in", ["third layer", "buffers"])
def test_without_memory_in_the_middle_of_it_the_run_continues_as_it_was(model, monkeypatch, fails_in):
    work = prompts([1, 17, 9, 5], new=4, vocab=VOCAB)
    monkeypatch.setattr(open_gpu, "cuda_recorder", lambda: lambda run: (run(), run))  # which must not advance a row
    made = opened(model, SAMPLED, 2, 2, 2, 4, graphs=True)
    resized, reserve, grow = paged_cache._resized, forward.Forward.reserve, made.steps.grow
    attempts, copies = [], []

    def failing(place, plain, *arguments):
        copies.append(place)
        if len(attempts) == 1 and fails_in == place and copies.count(place) == (3 if place == "third layer" else 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*arguments)

    def growing(slots, pages):
        attempts.append(slots)
        before = memory_of(made)
        grown, notices = grow(slots, pages)
        assert grown == (len(attempts) > 1)
        assert (memory_of(made) == before) != grown
        return grown, notices

    monkeypatch.setattr(paged_cache, "_resized", lambda *given: failing("third layer", resized, *given))
    monkeypatch.setattr(forward.Forward, "reserve", lambda *given: failing("buffers", reserve, *given))
    monkeypatch.setattr(made.steps, "grow", growing)
    found, notices = written(session_of(made), work)
    assert attempts == [4, 4]
    assert notices == [NOTICE]
    assert found == library(model, SAMPLED, work)


def memory_of(made):
    """Return the sizes of pages, tables and buffers."""
    cache, pages = made.steps._cache, [one for group in made.steps._cache.groups for one in group.of_layer.values()]
    buffers = [
        *vars(made.steps._forward).values(),
        *vars(made.steps._state).values(),
        *(one.table for one in cache.groups),
    ]
    return [one.nbytes for one in (*pages, *buffers) if isinstance(one, torch.Tensor)]


def test_if_it_fails_in_another_way_the_rows_continue_with_the_library(monkeypatch):
    llama = tiny_llama()
    work = prompts([5, 20, 9], new=3)
    made = opened(llama, SAMPLED, 2, 4)

    def fell_back(why):
        made.steps.close()
        return LogitsSteps(LibraryModel(llama, slots=2, capacity=CAPACITY), SAMPLED), 2, "library"

    monkeypatch.setattr(paged_cache, "_resized", lambda *_: 1 / 0)
    found, (said,) = written(session_of(made, fell_back), work)
    assert "a kernel failed (ZeroDivisionError)" in said
    assert found == library(llama, SAMPLED, work)


def test_a_row_that_waits_for_pages_gets_new_ones_and_shares_a_prefix(model, monkeypatch):
    monkeypatch.setattr(memory_plan, "_USUAL_TOKENS", 64)
    common = [7 * step % 200 + 3 for step in range(115)]
    work = [prompt(f"r{row}", [*common, 50 + row], 4, seed=row, shared=115) for row in range(3)]
    made = opened(model, SAMPLED, 1, 2)
    assert made.plan.slots == 2
    assert made.plan.rows == 1  # so that the second slot is empty
    session = session_of(made)
    found, notices = written(session, work)
    assert notices == [NOTICE]
    assert found == library(model, SAMPLED, work)
    (prefix,) = made.steps._prefixes.values()
    assert (prefix.tokens, prefix.users, prefix.ready) == (112, 0, True)


def test_rows_move_to_new_slots_while_their_tokens_are_on_the_way(model):
    work = prompts([20, 37], new=5, vocab=VOCAB)
    made = opened(model, SAMPLED, 2, 4)
    steps = made.steps
    rows = [RowState(each, 0.0, slot) for slot, each in enumerate(work)]
    assert all(steps.reserve(row) for row in rows)
    steps.prefill(rows, 0)
    steps.decode(rows)
    assert made.grow() == (4, [])
    assert len(steps._calls) == 2
    steps.move(rows[0], 3)
    rows[0].slot = 3
    for _ in range(3):
        steps.decode(rows)
    drawn = [*steps.drawn(), *steps.drawn()]
    found = {row.prompt.key.row_id: " ".join(str(one.token) for one in drawn if one.row is row) for row in rows}
    assert found == library(model, SAMPLED, work)


def test_steps_are_recorded_again_without_the_rows_in_them(model, monkeypatch):
    work = prompts([1, 17, 40], new=4, vocab=VOCAB)
    recorded = []
    monkeypatch.setattr(open_gpu, "cuda_recorder", lambda: lambda run: recorded.append(run.args) or (run(), run))
    made = opened(model, SAMPLED, 2, 2, 4, graphs=True)
    found, notices = written(session_of(made), work)
    assert recorded == [(2,), (4,)]
    assert set(made.steps._recorded) == {4}
    assert notices == [NOTICE]
    assert found == library(model, SAMPLED, work)


def test_if_they_cannot_be_recorded_again_they_are_launched(model, monkeypatch):
    work = prompts([1, 17, 40], new=3, vocab=VOCAB)

    def record(run):
        if run.args == (4,):
            raise RuntimeError("planted: operation not permitted when stream is capturing")
        return run(), run

    monkeypatch.setattr(open_gpu, "cuda_recorder", lambda: record)
    made = opened(model, SAMPLED, 2, 2, 4, 4, graphs=True)
    found, notices = written(session_of(made), work)
    assert notices == ["Decode steps are not recorded: the recording failed (RuntimeError).", NOTICE]
    assert not made.steps._recorded
    assert found == library(model, SAMPLED, work)
