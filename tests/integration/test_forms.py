"""Texts held to a form: by every engine here, for every order, slot count and backend, and across a kill."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_builds import load_anywhere
from tiny import VOCAB, tiny_gemma, tiny_tokenizer
from tiny_sessions import complete, prompts, session

from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.native import native_backend
from gxr_batch.engines.slots.native.compile_kernels import NativeUnavailable
from gxr_batch.engines.slots.native.native_backend import NativeModel
from gxr_batch.forms import Form, form_of, parts_of
from gxr_batch.job import make_job
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.form_tokens import FormTokens

ENDS = frozenset({1})
HOT = Sampling(temperature=2.0, top_k=50, top_p=0.95)
SAMPLINGS = [HOT, Sampling(temperature=0), Sampling(temperature=1.5, top_k=0), Sampling(repetition_penalty=1.0)]
LENGTHS = (5, 40, 3, 90, 17, 60, 8, 33, 21)
FORM = ['form.sections=["Impression", "Key findings", "Grade", "Size", "Point"]']
SECTIONS = {
    "Key findings": {"kind": "bullets"},
    "Grade": {"kind": "choice", "choices": ["high", "high grade", "low"]},
    "Size": {"kind": "number"},
    "Point": {"kind": "line"},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def form() -> Form:
    found = form_of(make_job("x", FORM, {"form.section": SECTIONS}))
    assert found
    return found


@pytest.fixture(scope="module")
def tokens(tokenizer, form) -> FormTokens:
    return FormTokens(form, tokenizer, ENDS, VOCAB)


def work(tokens: FormTokens, spare: int = 60):
    return prompts(LENGTHS, tokens.least_tokens + spare, vocab=260)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("spare", [0, 7, 90])
def test_every_text_has_the_form_at_any_limit(tokenizer, form, tokens, sampling, spare):
    made = session(
        LibraryModel(tiny_gemma(), slots=4, capacity=600), 4, sampling, ENDS, tokenizer=tokenizer, form=tokens
    )
    for done in complete(made, work(tokens, spare)).values():
        assert done.error is None
        assert parts_of(form, done.text) is not None, repr(done.text)
        assert done.finish_reason == ("closed" if done.cut_sections else "stop")
        assert (done.new_tokens or 0) <= tokens.least_tokens + spare


def test_a_text_does_not_depend_on_order_or_slots(tokenizer, tokens):
    model = tiny_gemma(torch.bfloat16)
    rows = work(tokens)
    texts = []
    for slots, seed in ((8, 0), (9, 1), (24, 2)):
        ordered = rows[:]
        random.Random(seed).shuffle(ordered)
        made = session(
            LibraryModel(model, slots=slots, capacity=600), slots, HOT, ENDS, tokenizer=tokenizer, form=tokens
        )
        texts.append({name: done.text for name, done in complete(made, ordered).items()})
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("product", ["avx512"])
def test_our_kernels_give_the_texts_of_one_row_alone_and_each_has_the_form(
    product, tokenizer, form, tokens, monkeypatch
):
    monkeypatch.setattr(native_backend, "load_with", load_anywhere)
    try:
        load_anywhere(product)
    except NativeUnavailable as error:
        pytest.skip(f"our own kernels cannot run here: {error}")
    texts = []
    for slots in (1, 6):
        backend = NativeModel(tiny_gemma(torch.bfloat16), slots=slots, capacity=600, product=product)
        made = session(backend, slots, HOT, ENDS, tokenizer=tokenizer, form=tokens)
        texts.append({name: done.text for name, done in complete(made, work(tokens)).items()})
        made.close()
    assert texts[0] == texts[1]
    assert all(parts_of(form, text) is not None for text in texts[0].values())


def test_the_kernel_forbids_what_torch_forbids(tokens, monkeypatch):
    from gxr_batch.models.form_tokens import forbid

    monkeypatch.setattr(native_backend, "load_with", load_anywhere)
    try:
        backend = NativeModel(tiny_gemma(torch.bfloat16), slots=3, capacity=64, product="avx512")
    except NativeUnavailable as error:
        pytest.skip(f"our own kernels cannot run here: {error}")
    generator = torch.Generator().manual_seed(3)
    masks = torch.randint(-(2**31), 2**31 - 1, (3, VOCAB // 32), generator=generator, dtype=torch.int32)
    masks[1, :20], masks[2] = -1, 0
    ours = backend.prefill([(slot, [5, 6, 7], 0) for slot in range(3)]).clone()
    theirs = ours.clone()
    backend.forbid(ours, masks.numpy())
    forbid(theirs, masks.numpy())
    assert torch.equal(ours, theirs)
    backend.close()


def test_without_a_form_nothing_is_held(tokenizer, tokens):
    made = session(LibraryModel(tiny_gemma(), slots=4, capacity=600), 4, HOT, ENDS, tokenizer=tokenizer)
    done = complete(made, work(tokens))
    assert {one.finish_reason for one in done.values()} <= {"stop", "length"}
    assert not any(one.text.startswith("Impression") for one in done.values())


def test_a_prompt_with_too_few_tokens_for_the_form_fails_alone(tokenizer, tokens):
    rows = work(tokens)
    rows[3] = rows[3]._replace(max_new_tokens=tokens.least_tokens - 1)
    made = session(LibraryModel(tiny_gemma(), slots=4, capacity=600), 4, HOT, ENDS, tokenizer=tokenizer, form=tokens)
    failed = [done for done in complete(made, rows).values() if done.error]
    assert [done.error for done in failed] == [f"the form needs at least {tokens.least_tokens} tokens"]
