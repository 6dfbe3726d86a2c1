"""The generate engine with a tiny random Gemma 3 and with the demo model."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter

import pytest
from engine_contract import CANARY, EngineContract, Subject, Watched

from gxr_batch.engines.base import StopRequest
from gxr_batch.engines.generate import GenerateEngine
from gxr_batch.errors import EngineFailed, OutOfDeviceMemory
from gxr_batch.job import Job
from gxr_batch.records import Encoded, Key, Messages, Prompt, Turn

SLOTS = 3


def a_job(path, *, sampling=None, **engine):
    return Job.model_validate(
        {
            "name": "test",
            "input": {"path": "unused.csv"},
            "model": {"path": str(path), "dtype": "float32", "adapter": "none"},
            "sampling": {"temperature": 0, "repetition_penalty": 1.0, **(sampling or {})},
            # One thread: the tiny model's matrices are too small for a second one to help.
            "engine": {"kind": "generate", "slots": SLOTS, "threads": 1, **engine},
        }
    )


def a_prompt(name, ids, *, new=8, seed=None, on_text=None):
    digest = int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:4], "big") >> 1
    messages = Messages((Turn("user", f"prompt {name}"),), "basic")
    return Prompt(
        Key(str(name), 1), messages, Encoded(list(ids), len(ids)), digest if seed is None else seed, new, on_text
    )


def ids_of(length, salt=0):
    """Return a prompt of `length` ids: <bos>, then ordinary words that the tiny model knows."""
    return [2, *(500 + (salt * 79 + place * 131) % 500 for place in range(length - 1))]


def an_engine(job, tokenizer):
    """Return the engine, with the tokenizer that the session has loaded already: loading it takes seconds each time."""
    engine = GenerateEngine(job)
    engine._local._tokenizer = tokenizer
    return engine


def run(session, prompts, **how):
    seen = Watched().watch(session, prompts, **how)
    return {completion.key.row_id: completion for completion in seen.completions}


def alone(session, ids, new, **settings):
    """Return what transformers' own generate gives for one prompt without padding."""
    import torch

    model = session._loaded.model
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=list(session._loaded.end_ids),
            pad_token_id=0,
            **settings,
        )
    return out[0, len(ids) :].tolist()


def answer_of(tokenizer, ids):
    return tokenizer.decode([one for one in ids if one not in {1, 106}], skip_special_tokens=True)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir, gemma_tokenizer):
    """The tiny model opened once, greedy, in float32."""
    with an_engine(a_job(tiny_model_dir), gemma_tokenizer).open() as session:
        yield session


@pytest.fixture
def breaking(tiny):
    """Make the opened model raise an error if `when(input_ids)` is true."""
    handles = []

    def arrange(when, error):
        def hook(module, args, kwargs):
            if when(kwargs["input_ids"]):
                raise error

        handles.append(tiny._loaded.model.register_forward_pre_hook(hook, with_kwargs=True))

    size = tiny._batch_size
    yield arrange
    for handle in handles:
        handle.remove()
    tiny._batch_size = size


@pytest.mark.model
class TestContract(EngineContract):
    @pytest.fixture
    def subject(self, tiny_model_dir, gemma_tokenizer):
        return Subject(
            open=an_engine(a_job(tiny_model_dir), gemma_tokenizer).open,
            prompts=lambda count: [a_prompt(place, ids_of(20 + place, place), new=12) for place in range(count)],
            lasting=lambda count: [a_prompt(place, ids_of(20 + place, place), new=500) for place in range(count)],
            spoil=lambda prompt: prompt._replace(
                messages=Messages((Turn("user", CANARY),), "basic"), encoded=Encoded(ids_of(2040), 2040)
            ),
        )


@pytest.mark.model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_row_gives_the_tokens_it_gives_alone_beyond_the_window(tiny, gemma_tokenizer, attention):
    lengths = [1, 3, 7, 8, 9, 30, 61]  # the window is 8
    tiny._loaded.model.set_attn_implementation(attention)
    try:
        rows = run(tiny, [a_prompt(length, ids_of(length, length), new=40) for length in lengths])
        for length in lengths:
            expected = alone(tiny, ids_of(length, length), 40)
            assert rows[str(length)].text == answer_of(gemma_tokenizer, expected)
            assert rows[str(length)].new_tokens == len(expected)
    finally:
        tiny._loaded.model.set_attn_implementation("sdpa")


@pytest.mark.model
def test_the_repetition_penalty_does_not_see_the_padding(tiny_model_dir, gemma_tokenizer):
    lengths = [2, 5, 40]
    with an_engine(a_job(tiny_model_dir, sampling={"repetition_penalty": 1.5}), gemma_tokenizer).open() as session:
        rows = run(session, [a_prompt(length, ids_of(length, length), new=30) for length in lengths])
        for length in lengths:
            expected = alone(session, ids_of(length, length), 30, repetition_penalty=1.5)
            assert rows[str(length)].text == answer_of(gemma_tokenizer, expected)


@pytest.mark.model
def test_each_row_ends_at_its_own_limit_and_costs_its_own_share(tiny):
    rows = run(tiny, [a_prompt("short", ids_of(5), new=2), a_prompt("long", ids_of(5), new=60)])
    short, long = rows["short"], rows["long"]
    assert (short.new_tokens, short.finish_reason) == (2, "length")
    assert (long.new_tokens, long.finish_reason) == (60, "length")
    assert short.rows_in_batch == 2
    assert long.rows_in_batch == pytest.approx((2 * 2 + 58) / 60)
    assert short.seconds_generating < long.seconds_generating
    assert short.seconds_share < long.seconds_share
    assert short.finished_at_ms <= long.finished_at_ms


@pytest.mark.model
@pytest.mark.parametrize("end_id", [1, 106])
def test_both_end_ids_end_an_answer_and_stay_out_of_its_text(tiny, gemma_tokenizer, end_id):
    handle = force(tiny, {3: end_id})
    try:
        row = run(tiny, [a_prompt("a", ids_of(6), new=20)])["a"]
    finally:
        handle.remove()
    assert (row.finish_reason, row.new_tokens) == ("stop", 4)
    assert "<" not in row.text
    assert row.text == answer_of(gemma_tokenizer, alone(tiny, ids_of(6), 3))


@pytest.mark.model
def test_an_empty_answer_is_a_completion_too(tiny):
    handle = force(tiny, {0: 106})
    try:
        row = run(tiny, [a_prompt("a", ids_of(6), new=20)])["a"]
    finally:
        handle.remove()
    assert (row.text, row.finish_reason, row.error, row.new_tokens) == ("", "stop", None, 1)


def force(session, tokens):
    """Make the model prefer a given token at given steps."""
    step = -1

    def hook(module, args, kwargs, output):
        nonlocal step
        step = 0 if kwargs["input_ids"].shape[1] > 1 else step + 1
        if step in tokens:
            output.logits[:, -1, tokens[step]] = 1e6
        return output

    return session._loaded.model.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.model
def test_a_row_draws_the_same_in_a_batch_alone_and_again(tiny_model_dir, gemma_tokenizer):
    sampling = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
    prompts = [a_prompt(place, ids_of(4 + 5 * place, place), new=20) for place in range(5)]
    with an_engine(a_job(tiny_model_dir, sampling=sampling), gemma_tokenizer).open() as session:
        batched = run(session, prompts)
        backwards = run(session, prompts[::-1])
        single = {}
        for prompt in prompts:
            single |= run(session, [prompt])
        other = run(session, [prompt._replace(row_seed=prompt.row_seed + 1) for prompt in prompts])
    texts = [{key: row.text for key, row in rows.items()} for rows in (batched, backwards, single)]
    assert texts[0] == texts[1] == texts[2]
    assert all(other[key].text != row.text for key, row in batched.items())


def test_draws_follow_the_probabilities_that_transformers_samples_from():
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from gxr_batch.engines.generate.logits_processors import processors
    from gxr_batch.job.sampling import Sampling

    rows = 20_000
    scores = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -4.0]])
    ids = torch.zeros(rows, 5, dtype=torch.long)
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.9, repetition_penalty=1.0)
    drawn = processors(sampling, range(rows), 5, torch.device("cpu"))(ids, scores.repeat(rows, 1)).argmax(-1)
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(6), TopPLogitsWarper(0.9)):
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0]
    seen = Counter(drawn.tolist())
    for token, probability in enumerate(expected.tolist()):
        # Four standard deviations of a count; the draws are fixed, so this cannot fail by chance.
        allowed = 4 * (rows * probability * (1 - probability)) ** 0.5
        assert abs(seen[token] - rows * probability) <= allowed


def test_random_numbers_are_uniform_in_seed_step_and_token():
    import torch

    from gxr_batch.models.gumbel_noise import gumbel

    seeds, ids = torch.arange(300), torch.arange(500).expand(300, 500)
    # The distribution function of Gumbel noise makes its values uniform again.
    blocks = [torch.exp(-torch.exp(-gumbel(seeds, torch.full((300,), step), ids))) for step in range(4)]
    for numbers in blocks:
        assert 0 < float(numbers.min()) < float(numbers.max()) < 1
        assert float(numbers.mean()) == pytest.approx(0.5, abs=0.005)
        for axis in (0, 1):
            assert float(numbers.mean(axis).sub(0.5).abs().max()) < 0.1
    together = torch.corrcoef(torch.stack([numbers.flatten() for numbers in blocks]))
    assert float((together - torch.eye(4)).abs().max()) < 0.02


@pytest.mark.model
def test_every_sampling_setting_changes_the_answers(tiny_model_dir, gemma_tokenizer):
    base = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    prompts = [a_prompt(place, ids_of(6, place), new=16) for place in range(3)]
    changes = [
        {},
        {"temperature": 0.2},
        {"top_k": 2},
        {"top_p": 0.001},
        {"repetition_penalty": 2.0},
        {"temperature": 0},
    ]
    texts = set()
    for change in changes:
        with an_engine(a_job(tiny_model_dir, sampling=base | change), gemma_tokenizer).open() as session:
            texts.add(tuple(row.text for _, row in sorted(run(session, prompts).items())))
    # top_p = 0.001 keeps only the likeliest token, as greedy does.
    assert len(texts) == len(changes) - 1


@pytest.mark.model
def test_a_prompt_too_long_for_its_answer_fails_as_a_row(tiny):
    longest = 2048 - 8
    rows = run(tiny, [a_prompt("fits", ids_of(longest)), a_prompt("long", ids_of(longest + 1)), a_prompt("empty", [])])
    assert rows["fits"].error is None
    assert rows["long"].error is not None
    assert str(longest + 1) in rows["long"].error
    assert rows["empty"].error == "the prompt has no tokens"


@pytest.mark.model
def test_memory_that_runs_out_halves_the_batch_and_loses_no_row(tiny, breaking):
    import torch

    prompts = [a_prompt(place, ids_of(10, place), new=300) for place in range(6)]
    whole = run(tiny, prompts)
    breaking(lambda ids: ids.shape[0] > 2, torch.OutOfMemoryError("no memory for " + CANARY))
    seen = Watched().watch(tiny, prompts)
    assert {key[0]: one.text for key, one in zip(seen.keys(), seen.completions, strict=True)} == {
        key: row.text for key, row in whole.items()
    }
    assert tiny._batch_size == 2  # later batches start with the size that fit
    assert max(pulse.splits for pulse in seen.pulses) == 1


@pytest.mark.model
def test_a_row_that_breaks_the_model_fails_alone_and_is_not_quoted(tiny, breaking):
    prompts = [a_prompt(place, ids_of(10, place), new=12) for place in range(6)]
    whole = run(tiny, prompts)
    poison = prompts[4].encoded.token_ids[-1]
    breaking(lambda ids: bool((ids[:, -1] == poison).any()), RuntimeError(f"failed on {CANARY}"))
    rows = run(tiny, prompts)
    assert rows["4"].error == "the model could not process this row (RuntimeError)"
    assert rows["4"].finish_reason == "error"
    assert {key: row.text for key, row in rows.items() if key != "4"} == {
        key: row.text for key, row in whole.items() if key != "4"
    }


@pytest.mark.model
def test_a_row_for_which_there_is_no_memory_fails_alone(tiny, breaking, monkeypatch):
    monkeypatch.setattr("gxr_batch.engines.generate.session._PATIENCE_SECONDS", 1.0)
    breaking(lambda ids: ids.shape[1] >= 30, MemoryError())
    rows = run(tiny, [a_prompt("a", ids_of(10)), a_prompt("b", ids_of(10)), a_prompt("long", ids_of(30))])
    assert rows["long"].error == "the device had no memory for a prompt of this length"
    assert rows["a"].error is None
    assert rows["b"].error is None


@pytest.mark.model
def test_if_two_rows_in_turn_run_out_of_memory_no_row_is_at_fault(tiny, breaking, monkeypatch):
    monkeypatch.setattr("gxr_batch.engines.generate.session._PATIENCE_SECONDS", 1.0)
    breaking(lambda ids: True, MemoryError())
    with pytest.raises(OutOfDeviceMemory, match="no free memory"):
        run(tiny, [a_prompt("a", ids_of(10)), a_prompt("b", ids_of(10))])


@pytest.mark.model
def test_a_device_that_cannot_compute_any_more_ends_the_engine(tiny, breaking):
    import torch

    breaking(lambda ids: True, torch.AcceleratorError("device-side assert"))
    with pytest.raises(EngineFailed, match="run the same command again"):
        run(tiny, [a_prompt("a", ids_of(10))])


@pytest.mark.model
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_overflow_fail_only_their_row(tiny, poison):
    prompts = [a_prompt(place, ids_of(10 + place, place), new=12) for place in range(3)]
    whole = run(tiny, prompts)

    def hook(module, args, kwargs, output):
        output.logits[1, -1, 77] = poison
        return output

    handle = tiny._loaded.model.register_forward_hook(hook, with_kwargs=True)
    try:
        rows = run(tiny, prompts)
    finally:
        handle.remove()
    assert "NaN or infinite" in rows["1"].error
    assert [rows[key].text for key in "02"] == [whole[key].text for key in "02"]


@pytest.mark.model
def test_a_shown_text_arrives_once_it_is_complete(tiny):
    heard = []
    row = run(tiny, [a_prompt("a", ids_of(6), on_text=heard.append)])["a"]
    assert heard == [row.text]


@pytest.mark.model
def test_texts_are_reproducible_with_one_slot_and_not_with_more(tiny, tiny_model_dir, gemma_tokenizer):
    assert tiny.info.reproducible is False
    prompts = [a_prompt(place, ids_of(5 + 9 * place, place), new=30) for place in range(4)]
    texts = []
    for order in (prompts, prompts[::-1], prompts[2:]):
        with an_engine(a_job(tiny_model_dir, slots=1, sampling={"temperature": 1}), gemma_tokenizer).open() as session:
            assert session.info.reproducible is True
            texts.append({key: row.text for key, row in run(session, order).items()})
    assert texts[0] == texts[1]
    assert texts[2] == {key: texts[0][key] for key in texts[2]}


@pytest.mark.model
def test_the_threads_setting_holds_while_the_model_is_open_and_no_longer(tiny_model_dir, gemma_tokenizer):
    import torch

    before = torch.get_num_threads()
    with an_engine(a_job(tiny_model_dir, threads=3), gemma_tokenizer).open():
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


@pytest.mark.model
def test_closing_the_engine_leaves_no_thread_behind(tiny_model_dir, gemma_tokenizer):
    before = set(threading.enumerate())  # other tests keep their engines open
    with an_engine(a_job(tiny_model_dir), gemma_tokenizer).open() as session:
        stop = StopRequest()
        stream = session.stream(iter([a_prompt("a", ids_of(30), new=1500)]), stop)
        next(stream)
        stop.now()
        assert list(stream) == []
    deadline = time.monotonic() + 5
    while any(one.name.startswith("gxr-batch-generate") for one in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.model
def test_generating_prints_nothing_on_stderr(tiny, capfd):
    run(tiny, [a_prompt("a", ids_of(6)), a_prompt("b", ids_of(9))])
    assert capfd.readouterr() == ("", "")


@pytest.mark.model
def test_on_the_demo_model_padding_is_exact_beyond_the_window_of_512(demo_session, gemma_tokenizer):
    text = " ".join(f"Finding {place}: the left costophrenic angle is blunted." for place in range(80))
    ids = gemma_tokenizer(text).input_ids
    lengths = [1, 3, 100, 600]
    rows = run(demo_session, [a_prompt(length, ids[:length], new=12) for length in lengths])
    for length in lengths:
        expected = alone(demo_session, ids[:length], 12)
        assert rows[str(length)].text == answer_of(gemma_tokenizer, expected)


@pytest.fixture(scope="module")
def demo_session(demo_model_dir, gemma_tokenizer):
    with an_engine(a_job("demo", slots=4, threads=0), gemma_tokenizer).open() as session:
        yield session


@pytest.mark.model
def test_the_demo_model_writes_sensible_text(demo_session, gemma_tokenizer):
    ids = gemma_tokenizer("Monday, Tuesday, Wednesday,").input_ids
    rows = run(demo_session, [a_prompt("a", ids, new=6)])
    assert rows["a"].text.startswith(" Thursday, Friday,")


@pytest.mark.model
def test_the_engine_reports_its_weights(demo_session, demo_model_dir):
    weights = (demo_model_dir / "model.safetensors").read_bytes()
    identity = demo_session.info.identity
    assert identity.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert (identity.kind, identity.model, identity.adapter) == ("generate", "demo", None)
    assert (demo_session.info.device, demo_session.info.dtype) == ("cpu", "float32")
