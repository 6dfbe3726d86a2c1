"""The whole engine over the GPU's forward pass, on tiny models: its texts are those of the library's.

In Triton's interpreter on a CPU this shows numbers and bookkeeping, not speed, compilation or a GPU's manners.
"""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from tiny import tiny_gemma, tiny_llama
from tiny_sessions import GREEDY, Ids, complete, info_of, prompt, prompts, session, texts

from gxr_batch.engines.base import Pulse, StopRequest
from gxr_batch.engines.slots.decode_loop import TransformersSession
from gxr_batch.engines.slots.decoding_row import RowState
from gxr_batch.engines.slots.gpu import compare_forward, device_steps, slot_state
from gxr_batch.engines.slots.gpu.compare_forward import Comparison, compare
from gxr_batch.engines.slots.gpu.device_steps import DeviceSteps
from gxr_batch.engines.slots.gpu.forward import Forward
from gxr_batch.engines.slots.gpu.fused_weights import fuse, why_not
from gxr_batch.engines.slots.gpu.memory_plan import buffer_bytes
from gxr_batch.engines.slots.gpu.open_gpu import sizes_of
from gxr_batch.engines.slots.gpu.page_groups import groups_of
from gxr_batch.engines.slots.gpu.paged_cache import PagedCache
from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.row_steps import KernelsFailed, LogitsSteps
from gxr_batch.errors import EngineFailed, ModelUnavailable
from gxr_batch.job.sampling import Sampling
from gxr_batch.records import Completion

pytestmark = pytest.mark.usefixtures("interpreted")

SAMPLED = Sampling(temperature=1.0)


def forward_of(model, *, slots=4, capacity=128, chunk=32, pages=60, reproducible=False) -> Forward:
    assert not why_not(model)
    weights = fuse(model, capacity)
    groups = groups_of([layer.window for layer in weights.layers], capacity, chunk)
    cache = PagedCache.of(
        groups,
        slots=slots,
        capacity=capacity,
        pages=[pages] * len(groups),
        kv_heads=weights.kv_heads,
        head_size=weights.head_size,
        dtype=weights.dtype,
        device=weights.device,
    )
    return Forward(weights, cache, chunk=chunk, reproducible=reproducible)


def gpu_session(model, sampling, *, ends=frozenset(), fallback=None, **sizes) -> TransformersSession:
    steps = DeviceSteps(forward_of(model, **sizes), sampling)
    return TransformersSession(info_of(sizes.get("slots", 4)), steps, Ids(), ends, fallback)


def library(model, sampling, work, ends=frozenset()):
    return texts(session(LibraryModel(model, slots=8, capacity=128), 8, sampling, ends), work)


def test_an_output_layer_with_a_bias_is_refused():
    model = tiny_llama()
    model.lm_head.bias = torch.nn.Parameter(torch.ones(1024))
    assert why_not(model) == "its output layer has a bias"


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama])
def test_texts_are_those_of_the_library(make):
    """Prompts of one token, across pages, the window and the chunk; more rows than slots; ends found a step late."""
    model = make()
    work = prompts([1, 17, 40, 5, 33], new=5)
    ends = frozenset({int(library(model, SAMPLED, work)["r1"].split()[2])})  # a token that some row draws
    expected = library(model, SAMPLED, work, ends)
    assert texts(gpu_session(model, SAMPLED, slots=3, ends=ends), work) == expected
    assert any(len(text.split()) < 5 for text in expected.values())


def test_greedy_texts_are_those_of_the_library_in_reproducible_mode():
    model = tiny_gemma(vocab=256)
    work = prompts([3, 20], new=4, vocab=256)
    expected = library(model, GREEDY, work)
    assert texts(gpu_session(model, GREEDY, reproducible=True, slots=2), work) == expected


def test_rows_share_the_pages_of_their_template():
    model = tiny_gemma()
    common = [7 * step % 900 + 3 for step in range(36)]
    work = [prompt(f"r{row}", [*common, 50 + row], 3, seed=row, shared=36) for row in range(4)]
    made = gpu_session(model, SAMPLED, slots=2, pages=8)
    expected = library(model, SAMPLED, work)
    assert texts(made, work) == expected
    steps = made._steps
    (prefix,) = steps._prefixes.values()
    assert (prefix.tokens, prefix.users, prefix.ready) == (32, 0, True)
    computed = steps._forward.launch.launches["prefill_tiles"] / len(steps._forward.weights.layers)
    assert computed == 3  # two rows in two calls of 32 tokens, then what the other two do not share
    held = [len(group.free) + len(pages) for group, pages in zip(steps._cache.groups, prefix.pages, strict=True)]
    assert held == [8, 8]


def test_rows_wait_for_pages_that_others_hold():
    model = tiny_llama()
    work = prompts([40, 40, 40], new=4)
    expected = library(model, SAMPLED, work)
    assert texts(gpu_session(model, SAMPLED, slots=3, pages=4), work) == expected  # a row takes three pages


def test_settings_without_a_kernel_and_ties_are_drawn_too(monkeypatch):
    monkeypatch.setattr(slot_state, "_SORTED_ROWS", 1)  # so that a step takes several pieces
    model = tiny_llama()
    work = prompts([5, 20], new=4)
    for sampling in (SAMPLED.replace(top_k=0), SAMPLED.replace(top_k=400)):
        assert texts(gpu_session(model, sampling), work) == library(model, sampling, work)
    expected = library(model, SAMPLED, work)
    made = gpu_session(model, SAMPLED)
    plain = made._steps._state.draw
    calls = []

    def tied(logits, slots):
        """Every second draw finds more ties than the kernel holds, and leaves its rows as they were."""
        calls.append(1)
        if len(calls) % 2:
            return plain(logits, slots)
        made._steps._state.results[: len(slots)].fill_(device_steps.TOO_MANY_TIES)
        return made._steps._state.results[: len(slots)]

    monkeypatch.setattr(made._steps._state, "draw", tied)
    assert texts(made, work) == expected
    assert len(calls) > 4


def test_a_row_whose_logits_are_not_finite_fails_alone():
    model = tiny_llama()
    model.model.embed_tokens.weight.data[999] = torch.nan
    good = prompts([5, 9], new=3)
    work = [*good, prompt("bad", [4, 999, 5], 3)]
    done = complete(gpu_session(model, SAMPLED, slots=3), work)
    assert done["bad"].finish_reason == "error"
    assert "finite" in done["bad"].error
    expected = library(model, SAMPLED, good)
    assert {name: done[name].text for name in expected} == expected


@pytest.mark.parametrize("fails_in", ["prefill", "decode"])
def test_when_a_kernel_fails_later_the_rows_continue_with_the_library(monkeypatch, fails_in):
    model = tiny_llama()
    work = prompts([5, 20, 9, 30, 3], new=4)
    expected = library(model, SAMPLED, work)

    def fell_back(why):
        made._steps.close()
        return LogitsSteps(LibraryModel(model, slots=2, capacity=128), SAMPLED), 2, "library"

    made = gpu_session(model, SAMPLED, slots=2, fallback=fell_back)

    forward, calls = made._steps._forward, []
    plain = getattr(forward, fails_in)

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("planted")
        return plain(*arguments)

    monkeypatch.setattr(forward, fails_in, failing)
    events = list(made.stream(iter(work), StopRequest()))
    assert {event.key.row_id: event.text for event in events if isinstance(event, Completion)} == expected
    (said,) = [notice for event in events if isinstance(event, Pulse) for notice in event.notices]
    assert "continues with the forward pass of transformers" in said
    assert made.info.versions["forward"] == "library"
    assert not made.info.reproducible


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_read():
    """Otherwise the device would have nothing to do while the host reads them."""
    made = gpu_session(tiny_llama(), SAMPLED, slots=2)
    steps, unread = made._steps, []
    plain = steps.decode

    def decode(rows):
        unread.append(len(steps._calls))
        plain(rows)

    steps.decode = decode
    complete(made, prompts([5, 9], new=6))
    assert unread[:5] == [1] * 5  # the prefill's, then always one step
    assert unread[5:] == [1]  # every row has its last token on the way: nothing to launch


def test_no_row_is_charged_for_the_time_before_it():
    made = gpu_session(tiny_llama(), SAMPLED, slots=2)
    made._steps._seen_at -= 1e6
    assert all(done.seconds_share < 1e5 for done in complete(made, prompts([5, 9], new=3)).values())


def test_what_is_sent_is_aligned_so_that_no_kernel_is_compiled_again_during_the_run():
    steps = gpu_session(tiny_llama(), SAMPLED)._steps
    sent = steps._sent([np.arange(length) for length in (1, 2, 0, 4, 5, 3)])
    assert [one.tolist() for one in sent] == [list(range(length)) for length in (1, 2, 0, 4, 5, 3)]
    assert {(one.data_ptr() - sent[0].data_ptr()) % 16 for one in sent if len(one)} == {0}


def test_a_failure_frees_the_memory_of_the_failed_steps_before_others_are_opened(monkeypatch):
    """The error's traceback would keep it: the other steps would find a full GPU."""
    model = tiny_llama()
    freed = []

    def fell_back(why):
        made._steps.close()
        gc.collect()
        freed.append(held() is None)
        return LogitsSteps(LibraryModel(model, slots=2, capacity=128), SAMPLED), 2, "library"

    made = gpu_session(model, SAMPLED, slots=2, fallback=fell_back)
    held = weakref.ref(made._steps._forward)
    monkeypatch.setattr(device_steps.Forward, "decode", lambda *_: 1 / 0)
    complete(made, prompts([5, 9, 3], new=3))
    assert freed == [True]


def test_if_the_other_steps_cannot_be_opened_that_error_is_raised(monkeypatch):

    def fell_back(why):
        made._steps.close()
        raise ModelUnavailable("no memory for the library either")

    made = gpu_session(tiny_llama(), SAMPLED, fallback=fell_back)
    monkeypatch.setattr(device_steps.Forward, "prefill", lambda *_: 1 / 0)
    with pytest.raises(ModelUnavailable, match="either"):
        complete(made, prompts([5]))
    made.close()


@pytest.mark.parametrize("fails_in", ["prefill", "decode", "_read"])
def test_a_gpu_that_cannot_compute_any_more_is_reported(monkeypatch, fails_in):
    """CUDA reports an illegal address in whichever call comes next, Triton as a plain RuntimeError."""
    made = gpu_session(tiny_llama(), SAMPLED, fallback=lambda why: pytest.fail("nothing can continue in this process"))
    monkeypatch.setattr(device_steps, "is_lost", lambda device: True)

    def illegal(*_):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    if fails_in == "_read":
        plain = made._steps._note

        def note(*arguments):
            plain(*arguments)
            ready = type("Event", (), {"synchronize": illegal})()
            made._steps._calls[-1] = made._steps._calls[-1]._replace(ready=ready)

        monkeypatch.setattr(made._steps, "_note", note)
    else:
        monkeypatch.setattr(device_steps.Forward, fails_in, illegal)
    with pytest.raises(EngineFailed) as failed:
        complete(made, prompts([5, 9], new=3))
    assert 'engine.kernels = "library"' in failed.value.next_step


def test_without_memory_for_ties_no_token_is_lost(monkeypatch):
    """The other rows of the step have advanced on the device: the step must not be made again."""
    model = tiny_llama()
    work = prompts([5, 20], new=5)
    expected = library(model, SAMPLED, work)

    def fell_back(why):
        made._steps.close()
        return LogitsSteps(LibraryModel(model, slots=2, capacity=128), SAMPLED), 2, "library"

    made = gpu_session(model, SAMPLED, slots=2, fallback=fell_back)
    state = made._steps._state
    plain, calls = state.draw, []

    def tied(logits, slots):
        results = plain(logits, slots)
        calls.append(1)
        return results

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(state, "draw", tied)
    monkeypatch.setattr(state, "draw_ties", no_memory)
    step = made._steps._step

    def second(count, going):
        if len(calls) == 2:
            made._steps._ties.add(made._steps._calls[-1].rows[0])
            return made._steps._ties_drawn(count, going)
        return step(count, going)

    monkeypatch.setattr(made._steps, "_step", second)
    assert texts(made, work) == expected
    assert made.info.versions["forward"] == "library"


def test_a_row_moves_before_its_prompt_is_computed():
    """Its prefill found no memory, and the last rows move closer together."""
    model = tiny_gemma()
    common = [7 * step % 900 + 3 for step in range(36)]
    work = [prompt(f"r{row}", [*common, 50 + row], 3, seed=row, shared=36) for row in range(2)]
    steps = gpu_session(model, SAMPLED, slots=3)._steps
    rows = [RowState(each, 0.0, slot) for slot, each in enumerate(work)]
    assert all(steps.reserve(row) for row in rows)
    steps.move(rows[1], 2)
    rows[1].slot = 2
    steps.prefill(rows, 0)
    for _ in range(2):
        steps.decode(rows)
    drawn: dict[str, list[str]] = {row.prompt.key.row_id: [] for row in rows}
    for _ in range(3):
        for row, token, *_ in steps.drawn():
            drawn[row.prompt.key.row_id].append(str(token))
    assert {name: " ".join(own) for name, own in drawn.items()} == library(model, SAMPLED, work)


def test_what_is_on_its_way_for_a_row_that_left_changes_no_later_row():
    """A stopped stream leaves it behind: here more ties than the kernel holds, which count as no token."""
    steps = gpu_session(tiny_llama(), SAMPLED, slots=1)._steps
    left, later = (RowState(each, 0.0, 0) for each in prompts([5, 9], new=1))
    assert steps.reserve(left)
    steps.prefill([left], 0)
    steps._calls[-1].results.fill_(device_steps.TOO_MANY_TIES)
    steps.release(left)
    assert steps.reserve(later)
    steps.prefill([later], 0)
    assert not steps.drawn()
    steps.decode([later])  # launches nothing: the row's only token is on its way
    assert len(steps._calls) == 1
    assert [row for row, *_ in steps.drawn()] == [later]


def test_the_comparison_needs_no_more_pages_than_one_row():
    model = tiny_llama()
    assert not compare(model, forward_of(model, capacity=32, pages=2)).why


def test_without_anything_to_fall_back_to_the_failure_is_raised(monkeypatch):
    made = gpu_session(tiny_llama(), SAMPLED)
    monkeypatch.setattr(made._steps._forward, "prefill", lambda *_: 1 / 0)
    with pytest.raises(KernelsFailed):
        complete(made, prompts([5]))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # NumPy's; a GPU has none
def test_the_comparison_with_the_library_finds_what_is_wrong(monkeypatch):
    monkeypatch.setattr(compare_forward, "_LENGTHS", (3,))
    monkeypatch.setattr(compare_forward, "_ACROSS", 9)  # 17 tokens: across the window of 8, and on a second page
    model = tiny_gemma(vocab=256)
    assert compare(model, forward_of(model, reproducible=True)) == Comparison("", same_bits=True)
    forward = forward_of(model)
    layer = forward.weights.layers[1]
    layer.down[5] *= 3.0  # `down` is the library's own matrix, so both change
    assert not compare(model, forward).why
    held = [len(group.free) for group in forward.cache.groups]
    assert held == [60] * len(held)
    layer.angles.mul_(1.2)  # these are ours
    assert "differ by" in compare(model, forward).why
    layer.angles.fill_(torch.nan)
    assert "not finite" in compare(model, forward).why


def blown_up(make):
    """Return a float16 model, and what the library computes of it in float32: plain float16 gives no finite logits.

    Every product of its layers exceeds float16 somewhere, as do the residual and what is added to it.
    """
    model = make()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 1000
        layer.mlp.up_proj.weight.data *= 5000
        layer.mlp.down_proj.weight.data *= 100
        gemma = hasattr(layer, "post_feedforward_layernorm")
        if gemma:
            layer.post_feedforward_layernorm.weight.data += 3e4
            layer.post_attention_layernorm.weight.data += 3e4
    half = model.half()
    return half, copy.deepcopy(half).float()


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama])
def test_what_exceeds_float16_is_computed_with_its_weights_as_in_float32(monkeypatch, make):
    monkeypatch.setattr(compare_forward, "_LENGTHS", (3, 5))
    monkeypatch.setattr(compare_forward, "_ACROSS", 4)
    half, exact = blown_up(make)
    ids = [5, 9, 400, 17, 3, 250, 33, 8, 91, 6]
    with torch.inference_mode():
        assert not half(torch.tensor([ids])).logits.isfinite().any()
        expected = exact(torch.tensor([ids])).logits[0, -3:]
    forward = forward_of(half)
    assert all(layer.range.attention > 1 and layer.range.mlp > 1 for layer in forward.weights.layers)
    (ours,) = compare_forward._ours(forward, [ids])
    assert float(((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 0.01  # as without large weights
    before = [parameter.data_ptr() for parameter in half.parameters()]
    theirs = compare_forward._library(half, ids, forward.weights.device)
    torch.testing.assert_close(theirs, expected, rtol=1e-2, atol=1e-2)
    assert [parameter.data_ptr() for parameter in half.parameters()] == before
    assert not compare(half, forward).why


def test_the_wider_residual_of_float16_is_planned():
    def reserved(dtype):
        model = tiny_gemma(dtype)
        made = forward_of(model)
        return sum(value.nbytes for value in vars(made).values() if isinstance(value, torch.Tensor)), buffer_bytes(
            sizes_of(model.config, dtype), slots=4, capacity=128, tokens=32
        )

    (narrow, planned), (wide, planned_wide) = reserved(torch.bfloat16), reserved(torch.float16)
    assert planned_wide - planned == wide - narrow == 32 * (64 * 2 + 4)
