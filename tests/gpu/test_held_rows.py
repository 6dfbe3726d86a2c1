"""Rows held to a form on the GPU's steps: their texts are those of the library's, and each has the form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_checks import TYPES
from test_paged_engine import forward_of
from tiny import tiny_gemma, tiny_tokenizer
from tiny_sessions import GREEDY, complete, info_of, prompt, prompts, session

from gxr_batch.engines.slots import decode_loop, slot_schedule
from gxr_batch.engines.slots.decode_loop import TransformersSession
from gxr_batch.engines.slots.gpu import open_gpu
from gxr_batch.engines.slots.gpu.device_steps import DeviceSteps
from gxr_batch.engines.slots.gpu.kernels import sampling as kernels
from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.row_steps import KernelsFailed, LogitsSteps
from gxr_batch.forms import Form, parts_of
from gxr_batch.forms.form import Part
from gxr_batch.job import EngineSection
from gxr_batch.job.sampling import Sampling
from gxr_batch.models import form_tokens
from gxr_batch.models.form_tokens import FormTokens, forbid

VOCAB = 288
ENDS = frozenset({1})
FORM = Form((Part("A", "a", "text"), Part("B", "b", "bullets"), Part("C", "c", "choice", choices=("x", "y"))))
SAMPLED = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens(tokenizer) -> FormTokens:
    return FormTokens(FORM, tokenizer, ENDS, VOCAB)


def gpu_session(model, sampling, tokenizer, tokens, *, fallback=None, slots=3, pages=60) -> TransformersSession:
    steps = DeviceSteps(forward_of(model, slots=slots, pages=pages), sampling, runs_ahead=False)
    return TransformersSession(info_of(slots), steps, tokenizer, ENDS, fallback, form=tokens)


def by_the_library(model, sampling, work, tokenizer, tokens):
    made = session(LibraryModel(model, slots=8, capacity=128), 8, sampling, ENDS, tokenizer=tokenizer, form=tokens)
    return {name: done.text for name, done in complete(made, work).items()}


# The last setting is drawn from the sorted vocabulary, without the kernel.
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY, Sampling(temperature=1.0, top_k=0)], ids=str)
def test_texts_are_those_of_the_library_and_each_has_the_form(sampling, tokenizer, tokens):
    model = tiny_gemma(vocab=VOCAB)
    work = prompts([1, 17, 40, 5], new=tokens.least_tokens + 4, vocab=VOCAB)
    done = complete(gpu_session(model, sampling, tokenizer, tokens), work)
    found = {name: one.text for name, one in done.items()}
    assert found == by_the_library(model, sampling, work, tokenizer, tokens)
    assert all(parts_of(FORM, text) is not None for text in found.values())
    assert {one.finish_reason for one in done.values()} <= {"stop", "closed"}


def rows_of(limits):
    return [prompt(f"r{at}", [3 + at, 70, 9, 40, 8 * at + 5], new, seed=at * 7919) for at, new in enumerate(limits)]


@pytest.mark.usefixtures("interpreted")
def test_texts_have_the_form_at_any_limit_and_depend_on_neither_order_nor_slots(tokenizer, tokens):
    model = tiny_gemma(vocab=VOCAB)
    work = rows_of([tokens.least_tokens + more for more in (0, 1, 2, 6)] + [64])
    expected = by_the_library(model, SAMPLED, work, tokenizer, tokens)
    done = complete(gpu_session(model, SAMPLED, tokenizer, tokens), work[::-1])
    assert {name: one.text for name, one in done.items()} == expected
    assert all(parts_of(FORM, text) is not None for text in expected.values())
    assert {one.finish_reason for one in done.values()} <= {"stop", "closed"}


def tied(made, monkeypatch):
    """Let every second draw find more ties than the kernel holds, and leave its rows as they were."""
    state, calls = made._steps._state, []
    plain = state.draw

    def draw(logits, slots):
        calls.append(1)
        if len(calls) % 2:
            return plain(logits, slots)
        state.results[: len(slots)].fill_(kernels.TOO_MANY_TIES)
        return state.results[: len(slots)]

    monkeypatch.setattr(state, "draw", draw)
    return lambda: len(calls) > 4


def short_of_memory(made, monkeypatch):
    """Let the second call of a prefill fail, after the first one has drawn."""
    monkeypatch.setattr(decode_loop, "_PULSE_SECONDS", 0.0)
    made._steps._forward.chunk = 8
    forward, calls = made._steps._forward, []
    plain = forward.prefill

    def prefill(packed):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(packed)

    monkeypatch.setattr(forward, "prefill", prefill)
    return lambda: made.splits == 1


def short_of_memory_in_a_step(made, monkeypatch):
    """Let the third decode step run out of memory before any row has advanced."""
    calls, plain = [], made._steps._forward.decode

    def decode(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*arguments)

    monkeypatch.setattr(made._steps._forward, "decode", decode)
    return lambda: made.splits == 1


def growing(made, monkeypatch):
    """Let the steps get more slots while rows are inside their forms."""
    steps, asked = made._steps, []

    def grow():
        asked.append(1)
        if len(asked) == 3:
            assert steps.grow(4, [80] * len(steps._cache.groups)) == (True, [])
        return (4 if len(asked) > 2 else 2), []

    made._grow = grow
    return lambda: made.info.slots == 4


def moving(made, monkeypatch):
    """Let rows move closer together as soon as a slot is free."""
    monkeypatch.setattr(slot_schedule, "BUCKETS", (1, 2))
    moves, plain = [], made._steps.move
    monkeypatch.setattr(made._steps, "move", lambda row, target: moves.append(len(row.ids)) or plain(row, target))
    return lambda: any(moves)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "disturb", [tied, short_of_memory, short_of_memory_in_a_step, growing, moving], ids=lambda one: one.__name__
)
def test_what_happens_to_a_row_changes_no_token_of_it(tokenizer, monkeypatch, disturb):
    form = Form((Part("A", "a", "line"), Part("C", "c", "choice", choices=("x", "y"))))
    tokens = FormTokens(form, tokenizer, ENDS, VOCAB)
    model = tiny_gemma(vocab=VOCAB)
    work = rows_of([tokens.least_tokens + more for more in (0, 9, 4, 7)])
    expected = by_the_library(model, SAMPLED, work, tokenizer, tokens)
    made = gpu_session(model, SAMPLED, tokenizer, tokens, slots=2)
    happened = disturb(made, monkeypatch)
    assert {name: one.text for name, one in complete(made, work).items()} == expected
    assert all(parts_of(form, text) is not None for text in expected.values())
    assert happened()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("with_form", [True, False])
def test_steps_with_a_form_are_not_recorded_and_all_their_kernels_are_compiled_first(with_form, monkeypatch):
    monkeypatch.setattr(open_gpu, "cuda_recorder", lambda: lambda run: (run(), run))
    model, settings = tiny_gemma(vocab=VOCAB), EngineSection(slots=2, self_check=False, cuda_graphs=True)
    made = open_gpu.open_gpu(model, settings, SAMPLED, capacity=128, budget=lambda held: 2**30, with_form=with_form)
    assert any("engine.cuda_graphs has no effect" in notice for notice in made.notices) == with_form
    assert bool(made.steps._recorded) != with_form
    assert made.steps.runs_ahead != with_form
    assert bool(made.steps._forward.launch.launches["forbid_ids"]) == with_form


@pytest.mark.usefixtures("interpreted")
def test_rows_continue_inside_their_form_without_our_kernels(tokenizer, tokens, monkeypatch):
    model = tiny_gemma(vocab=VOCAB)
    work = prompts([9, 4], new=tokens.least_tokens, vocab=VOCAB)

    def library(_why):
        return LogitsSteps(LibraryModel(model, slots=3, capacity=128), GREEDY), 3, "library"

    made = gpu_session(model, GREEDY, tokenizer, tokens, fallback=library)
    decode, calls = made._steps.decode, []

    def broken(rows):
        calls.append(1)
        if len(calls) == 9:
            raise KernelsFailed("a test")
        decode(rows)

    monkeypatch.setattr(made._steps, "decode", broken)
    found = {name: one.text for name, one in complete(made, work).items()}
    assert found == by_the_library(model, GREEDY, work, tokenizer, tokens)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_kernel_forbids_what_torch_forbids(launch, device, dtype):
    rows, vocab = 11, 5_003
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    masks = torch.randint(-(2**31), 2**31 - 1, (rows, -(-vocab // 32)), generator=generator, dtype=torch.int32)
    masks[1], masks[2], masks[3, :100] = -1, 0, 0
    wide = torch.zeros(rows, vocab + 9, dtype=dtype, device=device)
    wide[:, :vocab] = logits
    kernels.forbid(launch, wide[:, :vocab], masks.to(device))
    expected = logits.clone()
    forbid(expected, masks.numpy())
    assert torch.equal(wide[:, :vocab].cpu(), expected)
    in_pieces = logits.to(device)
    form_tokens._forbid_in_pieces(in_pieces, masks.to(device))
    assert torch.equal(in_pieces.cpu(), expected)
    assert not wide[:, vocab:].any(), "nothing is written next to the vocabulary"


def test_what_other_rows_may_draw_is_not_changed(tokens):
    row = tokens.row(60)
    spread = tokens.allowed([row, row]).spread([3, 1], 5)
    assert (spread.masks[[0, 2, 4]] == -1).all()
    assert np.array_equal(spread.masks[3], spread.masks[1])
    assert not (spread.masks[1] == -1).all()
