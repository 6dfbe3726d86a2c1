"""The slots engine: rows in a batch give the tokens that they give alone, whatever the other rows are."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_builds import load_anywhere
from tiny import VOCAB, tiny_gemma, tiny_llama
from tiny_sessions import CAPACITY, GREEDY, complete, prompt, prompts, session, texts

from gxr_batch.engines.slots import library_backend
from gxr_batch.engines.slots.backend import Backend
from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.native import compile_kernels, native_backend
from gxr_batch.engines.slots.native.compile_kernels import PRODUCTS, NativeUnavailable, load_with
from gxr_batch.engines.slots.native.native_backend import NativeModel
from gxr_batch.engines.slots.open_engine import self_check
from gxr_batch.engines.slots.token_sampling import SeenIds, top_candidates
from gxr_batch.job.sampling import Sampling
from gxr_batch.records import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED_LENGTHS = (1, 3, 8, 100, 530, 900)


@pytest.fixture(autouse=True)
def kernels_on_any_cpu(monkeypatch):
    """A named product runs here even if this CPU lacks its instructions."""
    monkeypatch.setattr(native_backend, "load_with", load_anywhere)


def native_or_skip(product: str, load=load_anywhere) -> None:
    try:
        load(product)
    except NativeUnavailable as error:
        if "do not compile" in str(error):
            raise
        pytest.skip(f"our own kernels cannot run here: {error}")


def alone_by_transformers(model, work: Sequence[Prompt]) -> dict[str, str]:
    """Return what transformers' own unpadded generate gives for each prompt, greedily."""
    found = {}
    for item in work:
        ids = torch.tensor([item.encoded.token_ids])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=item.max_new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        found[item.key.row_id] = " ".join(map(str, out[0, ids.shape[1] :].tolist()))
    return found


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama])
@pytest.mark.parametrize("slots", [3, 8])
def test_in_float32_every_row_of_a_mixed_batch_gives_the_tokens_that_it_gives_alone(make, slots):
    work = prompts(MIXED_LENGTHS)
    expected = alone_by_transformers(make(), work)
    assert texts(session(LibraryModel(make(), slots=slots, capacity=CAPACITY), slots, GREEDY), work) == expected


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama])
def test_a_shared_prefix_changes_no_token(make):
    rng = random.Random(2)
    prefix = [rng.randrange(3, VOCAB) for _ in range(40)]
    tails = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in (1, 30, 300)]
    work = [prompt(f"r{index}", prefix + tail, shared=40) for index, tail in enumerate(tails)]
    expected = alone_by_transformers(make(), work)
    assert texts(session(LibraryModel(make(), slots=8, capacity=CAPACITY), 8, GREEDY), work) == expected


def test_a_prefix_without_a_prefix_slot_gives_the_same_bits():
    rng = random.Random(12)
    prefixes = [[rng.randrange(3, VOCAB) for _ in range(20)] for _ in range(7)]
    work = [prompt(f"r{n}", [*prefix, n + 3, 5, 9], seed=n, shared=20) for n, prefix in enumerate(prefixes)]
    made = LibraryModel(tiny_gemma(torch.bfloat16), slots=8, capacity=CAPACITY)
    first = texts(session(made, 8, Sampling(temperature=1.0)), work)
    assert texts(session(made, 8, Sampling(temperature=1.0)), work[::-1]) == first


@pytest.fixture(params=PRODUCTS)
def product(request) -> str:
    """Each of the kernels' matrix products that can run here."""
    native_or_skip(request.param)
    return request.param


def backend(kind: str, make, slots: int) -> Backend:
    if kind in PRODUCTS:
        native_or_skip(kind)
        return NativeModel(make(torch.bfloat16), slots=slots, capacity=CAPACITY, product=kind)
    return LibraryModel(make(torch.bfloat16), slots=slots, capacity=CAPACITY)


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama])
@pytest.mark.parametrize("kind", [*PRODUCTS, "library"])
def test_in_bfloat16_sampled_texts_depend_only_on_the_row(kind, make):
    rng = random.Random(3)
    work = [
        item._replace(max_new_tokens=rng.randint(1, 40))
        for item in prompts([rng.choice((1, 5, 9, 40, 120)) for _ in range(40)])
    ]
    sampling = Sampling(temperature=1.0)
    reference = texts(session(backend(kind, make, 8), 8, sampling), work)
    for slots in (16, 32):
        shuffled = rng.sample(work, len(work))
        assert texts(session(backend(kind, make, slots), slots, sampling), shuffled) == reference
    lonely = session(backend(kind, make, 8), 8, sampling)
    for item in work[:5]:
        assert texts(lonely, [item]) == {item.key.row_id: reference[item.key.row_id]}
    assert texts(lonely, work[20:]) == {item.key.row_id: reference[item.key.row_id] for item in work[20:]}


# The native kernels take four heads and 64 features at a time: here are more of both, and a rest.
llama_of_six_heads = partial(tiny_llama, heads=6, head_dim=96)


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama, llama_of_six_heads])
def test_the_native_forward_agrees_with_the_librarys(make, product):
    ids = [random.Random(4).randrange(3, VOCAB) for _ in range(300)]
    with torch.inference_mode():
        exact = make(torch.float32)(torch.tensor([ids])).logits[0]
        rounded = make(torch.bfloat16)(torch.tensor([ids])).logits[0].float()
    native = NativeModel(make(torch.bfloat16), slots=8, capacity=CAPACITY, product=product)
    got = [native.prefill([(3, ids[:length], 0)])[0].float() for length in (1, 7, 9, 64, 65, 299)]
    got.append(native.decode([3], [ids[299]], [299])[0].float())
    for length, logits in zip((1, 7, 9, 64, 65, 299, 300), got, strict=True):
        ours = float((logits - exact[length - 1]).norm() / exact[length - 1].norm())
        theirs = float((rounded[length - 1] - exact[length - 1]).norm() / exact[length - 1].norm())
        assert ours < max(1.5 * theirs, 0.02)


def test_sampling_works_if_the_vocabulary_is_not_a_multiple_of_the_scans_block(product):
    model = tiny_gemma(torch.bfloat16, vocab=800)
    expected = texts(session(LibraryModel(model, slots=8, capacity=64), 8, GREEDY), prompts([5, 9], vocab=800))
    native = NativeModel(tiny_gemma(torch.bfloat16, vocab=800), slots=8, capacity=64, product=product)
    logits = native.prefill([(0, [5, 6, 7], 0)])
    kept = SeenIds(1, 64, torch.device("cpu"))
    kept.start(0, [5, 6, 7])
    for sampling in (Sampling(), GREEDY):
        ours = native.candidates(logits, kept.of([0]), sampling)
        theirs = top_candidates(logits, kept.of([0]), sampling)
        assert ours.complete.all()
        assert ours.ids[0, :1].tolist() == theirs.ids[0, :1].tolist()
        assert (ours.values > -torch.inf).sum() == (theirs.values > -torch.inf).sum()
    assert set(texts(session(native, 8, GREEDY), prompts([5, 9], vocab=800))) == set(expected)


def test_packed_products_have_the_bits_of_plain_ones():
    linear = torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    if not library_backend._available():
        pytest.skip("this torch has no packed products")
    packed = library_backend.PackedLinear(linear)
    for rows in (1, 8, 33):
        x = torch.randn(rows, 64).bfloat16()
        assert torch.equal(packed(x), linear(x))


def test_without_packed_products_the_model_is_unchanged(monkeypatch):
    monkeypatch.setattr(library_backend, "_available", lambda: False)
    model = tiny_llama(torch.bfloat16)
    assert not library_backend.pack_linears(model)
    assert type(model.lm_head) is torch.nn.Linear


@pytest.fixture
def no_kernels_loaded():
    """For tests that change which kernels may be loaded: clear the cache before and after."""
    remembered = (compile_kernels.load, compile_kernels.load_with)
    for each in remembered:
        each.cache_clear()
    yield
    for each in remembered:
        each.cache_clear()


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda patch: patch.setattr(compile_kernels, "FEATURES", frozenset({"no_such_feature"})), "CPU lacks"),
        (lambda patch: patch.setattr(compile_kernels.shutil, "which", lambda name: None), "no C compiler"),
        (lambda patch: patch.setattr(compile_kernels, "_FLAGS", ("--no-such-flag",)), "do not compile"),
    ],
)
def test_unavailable_kernels_give_the_reason(monkeypatch, tmp_path, no_kernels_loaded, break_it, reason):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if reason != "CPU lacks":
        monkeypatch.setattr(compile_kernels, "FEATURES", frozenset())
        monkeypatch.setattr(compile_kernels, "PRODUCTS", {"avx512": frozenset()})
    break_it(monkeypatch)
    with pytest.raises(NativeUnavailable, match=reason):
        NativeModel(tiny_gemma(torch.bfloat16), slots=8, capacity=64)


@pytest.mark.parametrize(
    "source", sorted(Path(compile_kernels.__file__).parent.glob("*.c")), ids=lambda path: path.name
)
def test_every_kernel_file_compiles_without_a_warning_even_if_it_cannot_run_here(source):
    if platform.machine() != "x86_64" or not shutil.which("gcc"):
        pytest.skip("this is no x86 machine with gcc")  # intrinsics of other CPUs, by gcc's names
    features = compile_kernels.FEATURES.union(*PRODUCTS.values())
    flags = [f"-m{feature.replace('avx512_bf16', 'avx512bf16').replace('amx_', 'amx-')}" for feature in features]
    command = ["gcc", "-std=gnu17", "-O3", "-fopenmp", "-Wall", "-Wextra", "-Werror", *flags, "-c", str(source)]
    done = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("feature", "why"), [("no_such_feature", ""), ("avx512f", "no tiles today")])
def test_without_tile_registers_the_other_product_is_used(monkeypatch, no_kernels_loaded, feature, why):
    native_or_skip("avx512", load_with)
    compile_kernels.load.cache_clear()

    def without_tiles(product):
        if product == "amx":
            raise NativeUnavailable(why)
        return load_with(product)

    monkeypatch.setattr(compile_kernels, "PRODUCTS", compile_kernels.PRODUCTS | {"amx": frozenset({feature})})
    monkeypatch.setattr(compile_kernels, "load_with", without_tiles)
    native = NativeModel(tiny_gemma(torch.bfloat16), slots=8, capacity=64)
    assert (native.name, native.why_slower) == ("native bfloat16 kernels (avx512)", why)


@pytest.mark.parametrize("odd", ["float32", "llama with biases", "adapter"])
def test_models_that_the_kernels_cannot_run_use_the_library(odd, product):
    model = tiny_llama(torch.float32 if odd == "float32" else torch.bfloat16)
    if odd == "llama with biases":
        model.config.attention_bias = True
    if odd == "adapter":
        model = adapted(model)
    with pytest.raises(NativeUnavailable):
        NativeModel(model, slots=8, capacity=64, product=product)


def adapted(model):
    """Return the model with a LoRA adapter of random weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still uses a name that transformers renamed
        return get_peft_model(model, config).base_model.model.eval()


def test_a_model_with_an_adapter_gives_the_tokens_that_it_gives_alone():
    work = prompts((1, 9, 100))
    model = adapted(tiny_gemma())
    expected = alone_by_transformers(model, work)
    assert expected != alone_by_transformers(tiny_gemma(), work)
    assert texts(session(LibraryModel(model, slots=8, capacity=CAPACITY), 8, GREEDY), work) == expected


def test_a_four_bit_model_gives_the_tokens_that_it_gives_alone(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_gemma().save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, dtype=torch.float32, device_map={"": "cpu"}
    ).eval()
    work = prompts((1, 9, 100))
    expected = alone_by_transformers(model, work)
    assert texts(session(LibraryModel(model, slots=8, capacity=CAPACITY), 8, GREEDY), work) == expected


def test_a_long_prompt_is_processed_in_pieces_with_the_same_bits(product):
    ids = [random.Random(6).randrange(3, VOCAB) for _ in range(700)]
    native = NativeModel(tiny_gemma(torch.bfloat16), slots=8, capacity=CAPACITY, product=product)
    whole = native.prefill([(0, ids, 0)]).clone()
    native.prefill([(1, ids[:333], 0)])
    assert torch.equal(native.prefill([(1, ids[333:], 333)]), whole)
    many = native.prefill([(2, ids[:50], 0), (3, ids, 0), (4, ids[:5], 0)])
    assert torch.equal(many[1], whole[0])


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama])
def test_a_row_has_the_same_bits_with_any_number_of_others(make, product):
    ids = [random.Random(7).randrange(3, VOCAB) for _ in range(20)]
    native = NativeModel(make(torch.bfloat16), slots=40, capacity=64, product=product)
    native.prefill([(slot, ids, 0) for slot in range(40)])
    alone = native.decode([0], [5], [20])[0].clone()
    for rows in range(2, 41):
        logits = native.decode(range(rows), [5] * rows, [20] * rows)
        assert all(torch.equal(row, alone) for row in logits), rows


def test_logits_too_large_for_the_caches_have_the_same_bits(product):
    native = NativeModel(tiny_gemma(torch.bfloat16, vocab=131_072), slots=33, capacity=32, product=product)
    native.prefill([(slot, [5, 6, 7], 0) for slot in range(33)])
    alone = native.decode([0], [8], [3])[0].clone()
    together = native.decode(range(33), [8] * 33, [3] * 33)
    assert together.nbytes > 8 * 2**20  # CACHED_BYTES in kernels.h
    assert all(torch.equal(row, alone) for row in together)


def test_the_kernel_finds_logits_that_are_not_finite(product):
    native = NativeModel(tiny_llama(torch.bfloat16), slots=8, capacity=64, product=product)
    native._stride = 65_536 + 64
    native._logits = logits = torch.randn(4, 65_536).bfloat16()
    logits[0, 70], logits[1, 70], logits[2, 3] = torch.nan, torch.inf, torch.nan  # the last one in a seen id
    kept = SeenIds(4, 8, torch.device("cpu"))
    for slot in range(4):
        kept.start(slot, [3])
    found = native.candidates(logits, kept.of(range(4)), Sampling())
    assert found.values[:, 0].isfinite().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0), Sampling(top_k=1), Sampling(repetition_penalty=1.0), Sampling(top_k=0)],
    ids=str,
)
def test_the_native_candidates_are_those_of_the_sampler(sampling, product):
    native = NativeModel(tiny_llama(torch.bfloat16), slots=8, capacity=64, product=product)
    native._stride = 65_536 + 64
    generator = torch.Generator().manual_seed(9)
    logits = (torch.randn(5, 65_536, generator=generator) * 3).bfloat16()
    logits[1, 200:2900] = 20.0  # more ties than the kernel can return
    native._logits = logits
    kept = SeenIds(5, 700, torch.device("cpu"))
    for slot, size in enumerate((1, 5, 60, 600, 1)):
        kept.start(slot, torch.randperm(65_536, generator=generator)[:size].tolist())
    seen = kept.of(range(5))
    before = logits.clone()
    ours, expected = (
        native.candidates(logits, seen, sampling),
        top_candidates(logits, seen, sampling, thorough=True),
    )
    assert torch.equal(logits, before)
    assert ours.complete.tolist() == [True, sampling.top_k == 0, True, True, True]
    for row in ours.complete.nonzero().flatten().tolist():
        kept = [
            set(zip(found.ids[row].tolist(), found.values[row].tolist(), strict=True)) for found in (ours, expected)
        ]
        kept = [{pair for pair in pairs if pair[1] > -torch.inf} for pairs in kept]
        assert kept[0] == kept[1]


def test_recorded_steps_give_the_bits_of_plain_ones():
    """The recorder here only stores the step and runs it again at the same addresses, as a GPU would."""
    replays = []

    def record(run):
        logits = run()

        def replay():
            replays.append(1)
            logits.copy_(run())

        return logits, replay

    work = prompts([5, 70, 9, 30, 12, 40, 3, 8, 20, 25, 11])
    sampling = Sampling(temperature=1.0)
    plain = LibraryModel(tiny_gemma(torch.bfloat16), slots=16, capacity=200)
    recorded = LibraryModel(tiny_gemma(torch.bfloat16), slots=16, capacity=200, record=record)
    assert texts(session(recorded, 16, sampling), work) == texts(session(plain, 16, sampling), work)
    assert len(replays) > 20
    assert len(recorded._graphs._recorded) < 8, "shapes come in buckets"


def test_the_upper_half_of_a_split_batch_computes_only_its_rows():
    """Also in recordings, or a split would need as much memory as the whole batch."""
    model = tiny_gemma(torch.bfloat16)
    computed = []

    class Counting(LibraryModel):
        def _step(self, tokens, columns, first, length):
            computed.append((first, len(tokens)))
            return super()._step(tokens, columns, first, length)

    for settings in ({}, {"reproducible": False}, {"record": lambda run: (run(), run)}):
        made = Counting(model, slots=32, capacity=64, **settings)
        made.prefill([(slot, [5, 6, 7], 0) for slot in range(32)])
        made.decode(range(16, 32), [5] * 16, [3] * 16)
        assert computed.pop() == (16, 16)
        made.close()


def test_recordings_of_every_shape_share_one_output():
    made = LibraryModel(tiny_gemma(), slots=16, capacity=200, record=lambda run: (run(), run))
    for rows, position in ((3, 5), (12, 5), (12, 150)):
        made.decode(range(rows), [5] * rows, [position] * rows)
    recorded = list(made._graphs._recorded.values())
    assert len(recorded) == 3
    assert len({one.logits.untyped_storage().data_ptr() for one in recorded}) == 1


def test_logits_outside_the_kernels_buffer_are_never_read_past_their_end(product):
    native = NativeModel(tiny_llama(torch.bfloat16), slots=8, capacity=64, product=product)
    logits = torch.randn(3, native.vocab).bfloat16()
    kept = SeenIds(3, 8, torch.device("cpu"))
    for slot in range(3):
        kept.start(slot, [slot])
    sampling = Sampling(top_k=1)
    ours, expected = (find(logits, kept.of(range(3)), sampling) for find in (native.candidates, top_candidates))
    assert torch.equal(ours.ids, expected.ids)
    assert torch.equal(ours.values, expected.values)


@pytest.mark.parametrize("kind", [*PRODUCTS, "library"])
def test_a_row_whose_logits_are_not_finite_fails_alone(kind):
    model = tiny_llama(torch.bfloat16)  # untied, or every row's logits would be bad
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    made = backend(kind, lambda dtype: model, 8)
    good = [item for item in prompts([5, 9, 20, 33, 41, 12, 8, 25, 70]) if 7 not in item.encoded.token_ids]
    sampling = Sampling(temperature=1.0, top_k=5)
    before = texts(session(made, 8, sampling), good)
    assert all(before.values())
    bad = prompt("bad", [5, 7, 9])
    done = complete(session(made, 8, sampling), [good[0], bad, *good[1:]])
    assert done["bad"].finish_reason == "error"
    assert "not finite" in done["bad"].error
    assert {name: completion.text for name, completion in done.items() if name != "bad"} == before


def test_an_end_id_ends_the_answer_and_is_not_part_of_it():
    made = LibraryModel(tiny_llama(), slots=8, capacity=CAPACITY)
    work = prompts([10, 20, 30])
    free = complete(session(made, 8, GREEDY), work)
    end = int(free["r1"].text.split()[4])
    stopped = complete(session(made, 8, GREEDY, {end}), work)["r1"]
    first = free["r1"].text.split().index(str(end))
    assert stopped.text.split() == free["r1"].text.split()[:first]
    assert stopped.finish_reason == "stop"
    assert stopped.new_tokens == first + 1
    assert free["r1"].finish_reason == "length"
    assert free["r1"].new_tokens == 24


def test_a_row_that_cannot_fit_fails_alone():
    made = session(LibraryModel(tiny_llama(), slots=8, capacity=64), 8, GREEDY)
    done = complete(made, prompts([10, 60, 40]))
    assert done["r1"].finish_reason == "error"
    assert "64 tokens" in done["r1"].error
    assert done["r0"].error is None
    assert done["r2"].error is None


@pytest.mark.parametrize("kind", [*PRODUCTS, "library"])
def test_a_token_that_the_model_does_not_have_is_never_looked_up(kind):
    made = session(backend(kind, tiny_llama, 8), 8, Sampling(temperature=1.0))
    done = complete(made, [*prompts([10, 20]), prompt("odd", [5, VOCAB, 7])])
    assert "tokenizer belongs to another model" in done["odd"].error
    assert all(one.error is None for name, one in done.items() if name != "odd")


def test_two_hundred_rows_of_random_lengths_leak_no_slot_and_have_consistent_times():
    rng = random.Random(8)
    work = [
        item._replace(max_new_tokens=rng.randint(1, 30)) for item in prompts([rng.randint(1, 60) for _ in range(200)])
    ]
    done = complete(session(LibraryModel(tiny_llama(), slots=8, capacity=128), 8, Sampling()), work)
    for item in work:
        completion = done[item.key.row_id]
        assert completion.new_tokens == item.max_new_tokens
        assert 1 <= completion.rows_in_batch <= 16
        assert 0 < completion.seconds_share <= completion.seconds_generating + 1e-6


def test_the_repetition_penalty_counts_the_prompt_too():
    work = prompts([30], new=40)
    strong = Sampling(temperature=0, repetition_penalty=5.0)
    text = texts(session(LibraryModel(tiny_llama(), slots=8, capacity=128), 8, strong), work)["r0"].split()
    assert len(set(text)) == len(text)
    assert not set(text) & {str(token) for token in work[0].encoded.token_ids}


def test_the_self_check_passes_on_sound_models_and_names_broken_ones():
    from gxr_batch.errors import ModelUnavailable

    self_check(LibraryModel(tiny_gemma(), slots=8, capacity=CAPACITY))
    alone = LibraryModel(tiny_gemma(), slots=8, capacity=CAPACITY)
    alone.slots = 1
    self_check(alone)
    broken = tiny_gemma()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ModelUnavailable, match="not finite"):
        self_check(LibraryModel(broken, slots=8, capacity=CAPACITY))


@pytest.mark.model
def test_the_demo_model_in_float32_gives_the_tokens_of_unpadded_generate(demo_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32).eval()
    work = prompts(MIXED_LENGTHS, new=10, vocab=200_000)
    expected = alone_by_transformers(model, work)
    assert texts(session(LibraryModel(model, slots=8, capacity=CAPACITY), 8, GREEDY), work) == expected


@pytest.mark.model
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_native_forward_of_the_demo_model_is_as_close_to_float32_as_the_librarys(demo_model_dir, product):
    native_or_skip(product, load_with)
    from transformers import AutoModelForCausalLM

    ids = [random.Random(11).randrange(3, 200_000) for _ in range(600)]
    lengths = [20, 100, 300, 511, 512, 513, 560, 600]
    exact = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32).eval()
    rounded = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        keep = torch.tensor(lengths) - 1
        truth = exact(torch.tensor([ids]), logits_to_keep=keep).logits[0].log_softmax(-1)
        theirs = rounded(torch.tensor([ids]), logits_to_keep=keep).logits[0].float().log_softmax(-1)
    native = NativeModel(rounded, slots=8, capacity=CAPACITY, product=product)
    ours = torch.cat([native.prefill([(0, ids[:length], 0)]).float() for length in lengths]).log_softmax(-1)
    assert (ours - truth).norm() < 1.1 * (theirs - truth).norm()
