"""Sharing a device: a fake GPU whose free memory changes, and the real main memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_gemma
from tiny_sessions import GREEDY, complete, prompt, prompts, session, texts

from gxr_batch.engines.base import Pulse, StopRequest
from gxr_batch.engines.slots import TransformersEngine, decode_loop, open_engine
from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.oom_retry import NoMemory, Splitter
from gxr_batch.errors import JobFileError, ModelUnavailable, OutOfDeviceMemory, OutOfTime
from gxr_batch.job import EngineSection, Job, ModelSection
from gxr_batch.job.sampling import Sampling
from gxr_batch.models import device_memory
from gxr_batch.models.device_memory import Cpu, Cuda, MemoryBudget, holders_of, out_of_memory
from gxr_batch.models.placement import place
from gxr_batch.models.what_fits import measure

GIB = 2**30


class FakeDevice:
    """A GPU of `total` GiB; `free_then` lists what is free at each query, then its last value is repeated."""

    def __init__(self, name: str, *free_then: float, total: float = 24, held: int = 0, context: int = 0) -> None:
        self.name, self.context, self._total = name, context, int(total * GIB)
        self._free = [int(each * GIB) for each in free_then]
        self._held = held
        self.limits: list[int] = []

    def total(self) -> int:
        return self._total

    def free(self) -> int:
        return self._free[0] if len(self._free) == 1 else self._free.pop(0)

    def held(self) -> int:
        return self._held

    def limit(self, size: int) -> None:
        self.limits.append(size)

    def holders(self) -> Sequence[str]:
        return ["process 4711 (python): 20.0 GiB"]


class Clock:
    """A clock that advances only during sleep."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def budget(*devices: FakeDevice, say=None, until=float("inf"), clock=None, **settings) -> MemoryBudget:
    clock = clock or Clock()
    return MemoryBudget(
        EngineSection(**settings), say or (lambda _: None), until, devices=devices, clock=clock, sleep=clock.sleep
    )


@pytest.fixture(autouse=True)
def a_gpu_with_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


CONFIG = tiny_gemma().config


# ---------------------------------------------------------------------- choosing and waiting


def test_the_gpu_with_the_most_free_memory_is_used():
    gpus = [FakeDevice("cuda:0", 3), FakeDevice("cuda:1", 20), FakeDevice("cuda:2", 7)]
    placed = place(ModelSection(), CONFIG, 8 * GIB, budget(*gpus))
    assert (placed.device, placed.four_bit, placed.dtype) == ("cuda:1", False, "bfloat16")
    assert any("cuda:1" in notice for notice in placed.notices)


def test_a_limit_applies_to_the_process_and_decides_the_number_format():
    gpu = FakeDevice("cuda:0", 20)
    placed = place(ModelSection(), CONFIG, 8 * GIB, budget(gpu, memory_limit="6GiB"))
    assert gpu.limits == [6 * GIB]
    assert placed.four_bit, "8 GiB of weights fit 6 GiB only in 4 bits"
    gpu = FakeDevice("cuda:0", 20)
    assert not place(ModelSection(), CONFIG, 8 * GIB, budget(gpu)).four_bit
    assert gpu.limits == []


@pytest.mark.parametrize(
    ("settings", "why_not", "free", "expected"),
    [
        ({}, "", 14, ("float16", False)),
        ({}, "Triton is not installed", 20, ("float32", False)),
        ({}, "", 6, ("float32", True)),  # not even in float16 does it fit
        ({"load_in_4bit": True}, "", 14, ("float32", True)),
        ({"dtype": "float32"}, "", 20, ("float32", False)),  # as the earlier invocations of its run
    ],
)
def test_a_gpu_without_bfloat16_gets_float16_where_our_kernels_run(monkeypatch, settings, why_not, free, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    section = ModelSection.model_validate(settings)
    placed = place(
        section, CONFIG, 8 * GIB, budget(FakeDevice("cuda:0", free, total=free)), why_no_kernels=lambda: why_not
    )
    assert (placed.dtype, placed.four_bit) == expected


def test_gemma_in_float16_is_refused_if_it_would_be_spread():
    gpus = [FakeDevice("cuda:0", 5), FakeDevice("cuda:1", 5)]
    section = ModelSection(dtype="float16", load_in_4bit=False)
    with pytest.raises(JobFileError, match="does not fit on a single GPU"):
        place(section, CONFIG, 8 * GIB, budget(*gpus, memory_limit="5GiB"), why_no_kernels=lambda: "")


def test_gemma_in_float16_waits_for_a_gpu_that_others_use_now():
    section = ModelSection(dtype="float16")  # as a run keeps it that began in it
    with pytest.raises(ModelUnavailable, match="too little memory on cuda:0"):
        place(section, CONFIG, 8 * GIB, budget(FakeDevice("cuda:0", 5)), why_no_kernels=lambda: "")


def test_a_model_that_does_not_fit_on_one_gpu_is_spread_and_every_gpu_is_limited():
    gpus = [FakeDevice("cuda:0", 5), FakeDevice("cuda:1", 5)]
    placed = place(ModelSection(load_in_4bit=False), CONFIG, 8 * GIB, budget(*gpus, memory_limit="5GiB"))
    assert placed.device == "auto"
    assert [gpu.limits for gpu in gpus] == [[5 * GIB], [5 * GIB]]


def test_it_waits_until_other_processes_free_memory_and_names_them():
    said, clock = [], Clock()
    gpu = FakeDevice("cuda:0", *[2.0] * 40, 20)
    placed = place(ModelSection(), CONFIG, 8 * GIB, budget(gpu, say=said.append, clock=clock, wait_for_memory="30m"))
    assert placed.device == "cuda:0"
    assert not placed.four_bit, "what fits a whole GPU is waited for, not quantised"
    assert 0 < clock.now < 1800
    assert "process 4711 (python): 20.0 GiB" in said[0]
    assert "9.4 GiB needed" in said[0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"load_in_4bit": False}, {"device_map": "cuda:0"}, {"load_in_4bit": True}],
    ids=["automatic", "a run in full weights", "a named device", "a run in 4 bits"],
)
def test_a_gpu_that_others_use_now_decides_no_number_format_and_spreads_no_model(settings):
    with pytest.raises(ModelUnavailable, match="too little memory on cuda:0") as caught:
        place(ModelSection.model_validate(settings), CONFIG, 8 * GIB, budget(FakeDevice("cuda:0", 2)))
    assert "process 4711" in str(caught.value)
    assert "wait_for_memory" in caught.value.next_step
    assert "load_in_4bit = true" in caught.value.next_step


def test_a_gpu_that_is_too_small_for_the_full_weights_gets_4_bits_also_while_others_use_it():
    placed = place(ModelSection(), CONFIG, 8 * GIB, budget(FakeDevice("cuda:0", 5, total=9)))
    assert (placed.four_bit, placed.device) == (True, "cuda:0")
    said, clock = [], Clock()
    crowded_now = budget(FakeDevice("cuda:0", 2, 2, 5, total=9), say=said.append, clock=clock, wait_for_memory="1h")
    assert place(ModelSection(), CONFIG, 8 * GIB, crowded_now).four_bit
    with pytest.raises(ModelUnavailable, match="too little memory"):
        place(ModelSection(), CONFIG, 8 * GIB, budget(FakeDevice("cuda:0", 2, total=9)))


@pytest.mark.parametrize("four_bits", [False, True, "auto"])
def test_a_full_gpu_is_refused_whatever_an_earlier_night_settled(four_bits):
    settings = {"device_map": "cuda:0", "load_in_4bit": four_bits}
    with pytest.raises(ModelUnavailable, match="too little memory on cuda:0"):
        place(ModelSection.model_validate(settings), CONFIG, 8 * GIB, budget(FakeDevice("cuda:0", 2)))


def test_a_model_larger_than_the_named_gpu_is_tried_in_the_format_that_was_asked_for():
    settings = {"device_map": "cuda:0", "load_in_4bit": False}
    memory = budget(FakeDevice("cuda:0", 2, total=4))
    assert place(ModelSection.model_validate(settings), CONFIG, 8 * GIB, memory).device == "cuda:0"


@pytest.mark.model
@pytest.mark.parametrize("waits", [False, True])
def test_check_refuses_a_full_gpu_unless_the_run_would_wait(tiny_model_dir, monkeypatch, waits):
    monkeypatch.setattr(device_memory, "visible", lambda: [FakeDevice("cuda:0", 0)])
    settings = EngineSection(wait_for_memory="30m" if waits else "")
    if waits:
        assert not measure(ModelSection(path=str(tiny_model_dir)), settings).placement.four_bit
    else:
        with pytest.raises(ModelUnavailable, match="too little memory on cuda:0"):
            measure(ModelSection(path=str(tiny_model_dir)), settings)


def test_waiting_ends_and_names_the_processes_on_the_device():
    clock = Clock()
    with pytest.raises(ModelUnavailable) as caught:
        place(ModelSection(), CONFIG, 8 * GIB, budget(FakeDevice("cuda:0", 2), clock=clock, wait_for_memory="30m"))
    assert "after 30 minutes of waiting" in str(caught.value)
    assert "process 4711" in str(caught.value)
    assert clock.now == 1800


def test_waiting_ends_when_the_run_has_to_stop():
    said, clock = [], Clock()
    memory = budget(FakeDevice("cuda:0", 2), say=said.append, until=600, clock=clock, wait_for_memory="12h")
    with pytest.raises(OutOfTime, match="too little memory on cuda:0 after 10 minutes of waiting"):
        place(ModelSection(), CONFIG, 8 * GIB, memory)
    assert clock.now == 600
    assert "Gives up after 10 more minutes." in said[0]


def test_a_missing_device_is_named_with_the_available_ones():
    with pytest.raises(ModelUnavailable, match="no device cuda:3") as caught:
        place(ModelSection(device_map="cuda:3"), CONFIG, GIB, budget(FakeDevice("cuda:0", 20)))
    assert "cpu, cuda:0" in str(caught.value)


def test_memory_that_is_held_already_counts_against_the_limit():
    shared = budget(FakeDevice("cuda:0", 20, held=4 * GIB), memory_limit="6GiB")
    assert shared.free(shared.devices[0]) == 2 * GIB
    assert shared.for_cache(shared.devices[0]) == int(0.8 * 2 * GIB)


def test_a_limit_counts_what_the_gpu_itself_takes():
    gpu = FakeDevice("cuda:0", 20, held=4 * GIB, context=GIB // 2)
    shared = budget(gpu, memory_limit="6GiB")
    assert shared.free(gpu) == shared.capacity(gpu) - 4 * GIB == GIB + GIB // 2
    shared.keep_to_limit(gpu)
    assert gpu.limits == [5 * GIB + GIB // 2]
    assert budget(gpu).capacity(gpu) == 24 * GIB - GIB // 2
    assert Cuda(0).context == GIB // 2


def test_the_number_format_is_that_of_the_chosen_gpu(monkeypatch):
    capabilities = {"cuda:0": (7, 5), "cuda:1": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    old, new = FakeDevice("cuda:0", 3), FakeDevice("cuda:1", 20)
    placed = place(ModelSection(), CONFIG, GIB, budget(old, new))
    assert (placed.device, placed.dtype) == ("cuda:1", "bfloat16")
    placed = place(ModelSection(device_map="cuda:0"), CONFIG, GIB // 8, budget(old, new))
    assert (placed.device, placed.dtype) == ("cuda:0", "float32")
    with pytest.raises(ModelUnavailable, match="cuda:1"):  # others use it now; the next night has the same format
        place(ModelSection(), CONFIG, 8 * GIB, budget(FakeDevice("cuda:0", 14, total=15), FakeDevice("cuda:1", 2)))
    # A GPU without bfloat16 is free first, but the format was chosen for the other one.
    old, new = FakeDevice("cuda:0", 20, total=16), FakeDevice("cuda:1", 2, 2, 20)
    placed = place(ModelSection(), CONFIG, 8 * GIB, budget(old, new, wait_for_memory="30m"))
    assert (placed.device, placed.dtype) == ("cuda:1", "bfloat16")


def test_a_model_that_is_spread_leaves_memory_for_its_rows_on_every_gpu():
    gpus = [FakeDevice("cuda:0", 5, total=5), FakeDevice("cuda:1", 6, total=6)]
    memory = budget(*gpus)
    placed = place(ModelSection(load_in_4bit=False), CONFIG, 8 * GIB, memory)
    most = memory.by_device(placed.weights_share)
    assert placed.device == "auto"
    assert 0 < placed.weights_share < 0.85
    assert [most[0], most[1]] == [int(placed.weights_share * free * GIB) for free in (5, 6)]


def test_slots_fit_on_each_gpu_of_a_model_that_is_spread():
    """Three of four layers are on the second GPU; one is in the main memory, and computed on the first GPU."""
    devices = ["meta", "cuda:1", "cuda:1", "cuda:1"]
    layers = [SimpleNamespace(parameters=lambda own=own: iter([weight_on(own)])) for own in devices]
    model = SimpleNamespace(
        model=SimpleNamespace(layers=layers), hf_device_map={"a": 0, "b": 1, "c": "cpu"}, dtype=torch.float32
    )
    parts = open_engine._cache_parts(model)
    assert parts == {"cuda:0": 0.25, "cuda:1": 0.75}
    asked = engine(Path("x"), memory_limit="1GiB")._job
    loaded = SimpleNamespace(model=model, config=CONFIG, device="cuda:0, cuda:1")
    for first, second in ((100, 8), (2, 100)):  # MiB; a row of 256 tokens takes half a MiB
        gpus = [FakeDevice("cuda:0", first / 1024), FakeDevice("cuda:1", second / 1024)]
        assert open_engine._share(asked, loaded, budget(*gpus, memory_limit="1GiB")).slots == 8


def test_the_logits_of_recordings_count_in_the_budget():
    embedding = SimpleNamespace(weight=weight_on("cuda:0"))
    model = SimpleNamespace(get_input_embeddings=lambda: embedding, dtype=torch.float32)
    loaded = SimpleNamespace(model=model, config=CONFIG, device="cuda:0")
    for recorded, slots in ((False, 8), (True, 7)):  # with four prefixes, 12 rows of half a MiB
        gpu = FakeDevice("cuda:0", 7.6 / 1024)
        asked = engine(Path("x"), memory_limit="1GiB", cuda_graphs=recorded)._job
        assert open_engine._share(asked, loaded, budget(gpu, memory_limit="1GiB")).slots == slots


def weight_on(device):
    return SimpleNamespace(device=torch.device(device))


@pytest.fixture
def two_gpus(monkeypatch):
    """torch and nvidia-smi of a machine with two GPUs of 24 GiB; returns which of them have a context."""
    contexts: set[int] = set()
    uuids = {0: "aa", 1: "bb"}
    listing = {"GPU-aa": "24564, 3000\n", "GPU-bb": "24564, 20000\n"}

    def nvidia_smi(command, **_):
        assert "--query-gpu=memory.total,memory.free" in command
        found = listing.get(command[-1].removeprefix("--id="))
        return subprocess.CompletedProcess(command, 0 if found else 6, found or "No devices were found", "")

    def mem_get_info(number):
        contexts.add(number)
        return 5 * GIB, 24 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    properties = {number: SimpleNamespace(uuid=uuid, total_memory=int(23.6 * GIB)) for number, uuid in uuids.items()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties[number])
    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    return SimpleNamespace(contexts=contexts, listing=listing, properties=properties)


def test_asking_for_free_memory_takes_none_on_gpus_that_are_not_used(two_gpus):
    memory = MemoryBudget(EngineSection())
    assert memory.freest(memory.devices).name == "cuda:1"
    assert [memory.free(device) for device in memory.devices] == [
        3000 * 2**20 - GIB // 2, 20000 * 2**20 - GIB // 2
    ]  # fmt: skip
    assert not two_gpus.contexts


def test_a_gpu_that_is_used_is_asked_through_cuda(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: 2**30 * number)
    assert [Cuda(number).free() for number in (0, 1)] == [3000 * 2**20 - GIB // 2, 5 * GIB]
    assert two_gpus.contexts == {1}


@pytest.mark.parametrize("listed", ["", "24564, [N/A]\n", "81920, 70000\n"], ids=["missing", "no numbers", "divided"])
def test_where_nvidia_smi_has_no_answer_cuda_is_asked(two_gpus, listed):
    two_gpus.listing["GPU-aa"] = listed
    assert Cuda(0).free() == 5 * GIB
    assert two_gpus.contexts == {0}


def test_the_main_memory_reports_its_size_and_its_limit_is_the_caches():
    cpu = Cpu()
    assert 0 < cpu.free() <= cpu.total()
    assert all("process" in holder and "GiB" in holder for holder in cpu.holders())
    plain = MemoryBudget(EngineSection(memory_limit="64MiB"), devices=[cpu])
    assert plain.for_cache(cpu) == 64 * 2**20
    assert plain.free(cpu) > 64 * 2**20


def test_the_drivers_listing_becomes_phrases():
    listing = "4711, /usr/bin/python3, 20480\n99, [Not Found], 512\nNo running processes found\n12, x, [N/A]\n"
    assert holders_of(listing) == ["process 4711 (python3): 20.0 GiB", "process 99 ([Not): 0.5 GiB"]


def engine(folder, **settings) -> TransformersEngine:
    """The engine of a job with the tiny model in float32: 1 KiB of cache per token and layer pair, 256 tokens a row."""
    return TransformersEngine(
        Job.model_validate(
            {
                "name": "j",
                "input": {"path": "x"},
                "model": {"path": str(folder), "dtype": "float32", "max_seq_length": 256},
                "sampling": {"max_new_tokens": 16},
                "engine": settings,
            }
        )
    )


@pytest.mark.parametrize(("limit", "slots", "reproducible"), [("9MiB", 8, False), ("4MiB", 4, False)])
def test_on_the_cpu_the_limit_decides_how_many_rows_decode_side_by_side(tiny_model_dir, limit, slots, reproducible):
    with engine(tiny_model_dir, memory_limit=limit).open() as opened:
        assert opened.info.slots == slots
        assert opened.info.reproducible is reproducible
        assert opened._steps._backend.slots == max(slots, 4)
        assert any("not enough memory for the 8 rows" in notice for notice in opened.info.notices) is (slots < 8)


def test_a_limit_too_small_for_the_slots_names_what_to_change(tiny_model_dir):
    with pytest.raises(ModelUnavailable, match="leaves 2 MiB for the cache, and 8 rows of 256 tokens need 4 MiB"):
        engine(tiny_model_dir, memory_limit="4MiB", slots=8).open().__enter__()


# ---------------------------------------------------------------------- during the run


class Crowded(LibraryModel):
    """A real model on a device with memory for `fits` rows per call, for the first `lasting` calls."""

    fits, lasting, calls = 8, 10**9, 0

    def decode(self, slots, ids, positions):
        self.calls += 1
        if len(slots) > self.fits and self.calls <= self.lasting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().decode(slots, ids, positions)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_error_that_means_too_little_memory_splits_the_batch(error):
    class Refusing(LibraryModel):
        def decode(self, slots, ids, positions):
            if len(slots) > 8:
                raise error
            return super().decode(slots, ids, positions)

    model = tiny_gemma(torch.bfloat16)
    work = prompts([3] * 12, new=4)
    expected = texts(session(LibraryModel(model, slots=12, capacity=200), 12, SAMPLED), work)
    made = session(Refusing(model, slots=12, capacity=200), 12, SAMPLED)
    assert texts(made, work) == expected
    assert made.splits >= 1


def test_other_errors_of_the_device_do_not_mean_memory():
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not out_of_memory(torch.AcceleratorError("CUDA error: device-side assert triggered"))


def crowded(fits: int = 8, lasting: int = 10**9) -> Crowded:
    made = Crowded(tiny_gemma(torch.bfloat16), slots=32, capacity=200)
    made.fits, made.lasting = fits, lasting
    return made


SAMPLED = Sampling(temperature=1.0)


def test_out_of_memory_splits_the_batch_and_changes_no_text():
    work = prompts([5 + 3 * number for number in range(40)])
    whole = texts(session(LibraryModel(tiny_gemma(torch.bfloat16), slots=32, capacity=200), 32, SAMPLED), work)
    made = session(crowded(), 32, SAMPLED)
    events = list(made.stream(iter(work), StopRequest()))
    assert {event.key.row_id: event.text for event in events if not isinstance(event, Pulse)} == whole
    assert max(event.splits for event in events if isinstance(event, Pulse)) == made._steps._splitter.splits >= 1


def test_it_grows_back_when_memory_is_free_again(monkeypatch):
    monkeypatch.setattr("gxr_batch.engines.slots.oom_retry._CALM_CALLS", 4)
    made = session(crowded(lasting=6), 32, SAMPLED)
    complete(made, prompts([9] * 60, new=100))
    assert made._steps._splitter.splits >= 1
    assert made._steps._splitter.now == 32


def test_without_memory_for_a_few_rows_it_waits_and_then_gives_up(monkeypatch):
    monkeypatch.setattr(decode_loop, "_PATIENCE_SECONDS", 3.0)
    made = session(crowded(fits=0), 32, SAMPLED)
    events: list[object] = []
    with pytest.raises(OutOfDeviceMemory, match="no free memory"):
        events.extend(made.stream(iter(prompts([9] * 20)), StopRequest()))
    assert len(events) >= 2, "it gives heartbeats while it waits"
    assert all(isinstance(event, Pulse) for event in events)


class ShortPrompts(LibraryModel):
    """A real model on a device without memory for long prompts."""

    def prefill(self, rows):
        if any(len(ids) > 50 for _, ids, _ in rows):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().prefill(rows)


def test_a_prompt_that_never_fits_in_memory_fails_alone(monkeypatch):
    monkeypatch.setattr(decode_loop, "_PATIENCE_SECONDS", 1.0)
    made = ShortPrompts(tiny_gemma(torch.bfloat16), slots=8, capacity=200)
    done = complete(session(made, 8, SAMPLED), prompts([60, 9, 9, 9, 9, 9]))
    assert done.pop("r0").error == "the device had no memory for a prompt of this length"
    assert all(one.error is None for one in done.values())


def test_memory_that_is_freed_in_time_fails_no_row():
    made = session(crowded(fits=0, lasting=4), 32, SAMPLED)
    assert all(done.error is None for done in complete(made, prompts([9] * 20)).values())


class Poisoned(LibraryModel):
    """A real model that fails on one token."""

    def decode(self, slots, ids, positions):
        if any(slot == self.bad for slot in slots):
            raise RuntimeError("device-side assert with the text zebrafish")
        return super().decode(slots, ids, positions)


def test_a_row_that_breaks_the_model_fails_alone_and_other_rows_keep_their_texts():
    work = prompts([30, 20, 10, 9, 8])
    expected = texts(session(LibraryModel(tiny_gemma(torch.bfloat16), slots=8, capacity=200), 8, SAMPLED), work)
    made = Poisoned(tiny_gemma(torch.bfloat16), slots=8, capacity=200)
    made.bad = 2
    done = complete(session(made, 8, SAMPLED), work)
    failed = {name for name, one in done.items() if one.error}
    assert failed == {"r2"}
    assert done["r2"].error == "the model could not process this row (RuntimeError)"
    assert {name: one.text for name, one in done.items() if not one.error} == {
        name: text for name, text in expected.items() if name != "r2"
    }


class Full(LibraryModel):
    """A real model with memory for the forward, but for the candidates of only `fits` rows."""

    fits = 8

    def candidates(self, logits, seen, sampling):
        if len(logits) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().candidates(logits, seen, sampling)


def test_sampling_is_split_too():
    work = prompts([9] * 40)
    whole = texts(session(LibraryModel(tiny_gemma(torch.bfloat16), slots=32, capacity=200), 32, SAMPLED), work)
    made = session(Full(tiny_gemma(torch.bfloat16), slots=32, capacity=200), 32, SAMPLED)
    assert texts(made, work) == whole
    assert made._steps._splitter.splits >= 1


class NoPrefill(LibraryModel):
    """A real model with too little memory for a prefill while rows decode, for a while."""

    refused = 0

    def prefill(self, rows):
        if 0 < self.refused < 30 or (self.refused == 0 and self.decoded):
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().prefill(rows)

    def decode(self, slots, ids, positions):
        self.decoded = True
        return super().decode(slots, ids, positions)


def test_rows_that_can_decode_continue_while_others_wait_for_their_prefill():
    made = NoPrefill(tiny_gemma(torch.bfloat16), slots=16, capacity=200)
    made.decoded = False
    began = time.monotonic()
    done = complete(session(made, 16, SAMPLED), prompts([9] * 30, new=40))
    assert all(one.error is None for one in done.values())
    assert made.refused == 30
    assert time.monotonic() - began < 10, "each refusal would take half a second if the others waited"


class NoPrefix(LibraryModel):
    """A real model that fails on the shared prefix once."""

    broken = 0

    def prefill(self, rows):
        if rows[0][0] >= self.slots and self.broken < 2:
            self.broken += 1
            raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")
        return super().prefill(rows)


def test_a_shared_prefix_that_failed_is_copied_into_no_row():
    prefix = list(range(3, 43))
    work = [prompt(f"r{number}", [*prefix, 50 + number], shared=40) for number in range(6)]
    whole = texts(session(LibraryModel(tiny_gemma(), slots=8, capacity=200), 8, GREEDY), work)
    made = NoPrefix(tiny_gemma(), slots=8, capacity=200)
    assert texts(session(made, 8, GREEDY), work) == whole
    assert made.broken == 2


def test_a_model_that_breaks_on_every_row_fails_them_all_and_ends():
    made = Poisoned(tiny_gemma(torch.bfloat16), slots=8, capacity=200)
    made.bad = 0
    done = complete(session(made, 8, SAMPLED), prompts([9]))
    assert done["r0"].error == "the model could not process this row (RuntimeError)"


def test_more_memory_than_any_gpu_has_is_not_waited_for():
    clock = Clock()
    with pytest.raises(ModelUnavailable):
        place(
            ModelSection(device_map="cuda:0", load_in_4bit=False),
            CONFIG,
            40 * GIB,
            budget(FakeDevice("cuda:0", 20), clock=clock, wait_for_memory="30m"),
        )
    assert clock.now == 0


def test_a_splitter_asks_for_fewer_rows_until_they_fit():
    sizes = []

    def call(rows):
        sizes.append(len(rows))
        if len(rows) > 10:
            raise MemoryError
        return torch.tensor([[float(row)] for row in rows])

    splitter = Splitter(64, 8, 1, torch.device("cpu"))
    logits, faults = splitter.run(list(range(64)), call)
    assert logits[:, 0].tolist() == list(range(64))
    assert (faults, splitter.splits, splitter.now) == ({}, 3, 8)
    assert sizes[:4] == [64, 32, 16, 8]
    with pytest.raises(NoMemory):
        splitter.run([1], lambda rows: (_ for _ in ()).throw(MemoryError()))


def test_torchs_out_of_memory_messages_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes do not match"))


def test_greedy_rows_are_the_same_in_small_pieces():
    work = prompts([40, 3, 17, 90, 5, 6, 7, 8, 9, 10, 11, 12])
    whole = texts(session(LibraryModel(tiny_gemma(), slots=16, capacity=200), 16, GREEDY), work)
    made = Crowded(tiny_gemma(), slots=16, capacity=200)
    made.fits = 8
    assert texts(session(made, 16, GREEDY), work) == whole
