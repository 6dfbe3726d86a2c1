"""Opening the engine as on a GPU: our forward pass if it agrees with the library's, the library's with a notice if not.

The CPU takes the GPU's part, so that loading, budget, comparison and run are the real ones.
"""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from running import Workplace
from tiny import tiny_gemma, tiny_llama
from tiny_sessions import complete, prompts
from triton.runtime.build import _build

from gxr_batch import read_results
from gxr_batch.cli import main
from gxr_batch.engines.generate import GenerateEngine
from gxr_batch.engines.slots import TransformersEngine, open_engine
from gxr_batch.engines.slots.gpu import compare_forward, device_steps, forward, memory_plan, open_gpu
from gxr_batch.engines.slots.gpu.device_steps import DeviceSteps
from gxr_batch.engines.slots.gpu.kernels import norms
from gxr_batch.engines.slots.row_steps import LogitsSteps
from gxr_batch.errors import EngineFailed, JobFileError, ModelUnavailable
from gxr_batch.job import Job
from gxr_batch.models import placement
from gxr_batch.models.device_memory import MemoryBudget

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture(autouse=True)
def _the_cpu_is_a_gpu(monkeypatch):
    monkeypatch.setattr(open_engine, "_is_on_one_gpu", lambda loaded: True)
    monkeypatch.setattr(compare_forward, "_LENGTHS", (3,))
    monkeypatch.setattr(compare_forward, "_ACROSS", 9)  # beyond the window
    monkeypatch.setattr(forward, "SPLIT_TOKENS", 128)


def job(folder, dtype="float32", **settings) -> Job:
    return Job.model_validate(
        {
            "name": "j",
            "input": {"path": "x"},
            "model": {"path": str(folder), "dtype": dtype, "max_seq_length": 64, "device_map": "cpu"},
            "sampling": {"max_new_tokens": 3},
            "engine": {"slots": 2, "memory_limit": "256MiB", **settings},
        }
    )


def engine(folder, dtype="float32", **settings) -> TransformersEngine:
    return TransformersEngine(job(folder, dtype, **settings))


def drawn(opened):
    return {name: done.text for name, done in complete(opened, prompts([3, 9], new=3)).items()}


def test_our_forward_pass_is_compared_and_gives_the_texts_of_the_library(tiny_model_dir):
    with engine(tiny_model_dir, kernels="library").open() as opened:
        assert isinstance(opened._steps, LogitsSteps)
        expected = drawn(opened)
    with engine(tiny_model_dir, reproducible=False).open() as opened:
        assert "GPU kernels, float32 (Triton" in opened.info.versions["forward"]
        assert opened.info.slots == 2
        assert not opened.info.notices
        launches = opened._steps._forward.launch.launches
        compiled = set(launches)
        assert launches["draw_rows"] == 1
        assert drawn(opened) == expected
        assert set(launches) == compiled  # no kernel is compiled after the first row has come


def differs(monkeypatch):
    for dtype in (torch.float16, torch.float32):
        monkeypatch.setitem(compare_forward._MOST_DIFFERENCE, dtype, 0.0)
    return "differ by"


def does_not_compile(monkeypatch):
    monkeypatch.setattr(norms, "embed", lambda *_, **__: 1 / 0)
    return "a kernel failed (ZeroDivisionError)"


def has_no_memory(monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("gxr_batch.engines.slots.gpu.open_gpu.cache_of", refuse)
    return "too little memory"


def is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return "Triton is not installed"


def has_no_compiler(monkeypatch):
    def build(*_, **__):
        _build("launcher", "launcher.c", "", [], [], [], [])

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(norms, "embed", build)
    return "there is no C compiler (gcc, clang, or one that CC names)"


@pytest.mark.parametrize("fault", [differs, does_not_compile, has_no_compiler, has_no_memory, is_not_installed])
def test_if_it_cannot_be_used_the_library_is_with_a_notice(tiny_model_dir, monkeypatch, fault):
    why = fault(monkeypatch)
    released = []
    monkeypatch.setattr(open_engine, "release_cached", lambda: released.append(True))
    with engine(tiny_model_dir).open() as opened:
        assert isinstance(opened._steps, LogitsSteps)
        (notice,) = [one for one in opened.info.notices if "Generating is slower on this GPU" in one]
        assert why in notice
        assert len(drawn(opened)) == 2
    assert released  # else the memory of the attempt would count as taken, and a limit leave nothing


class Taken:
    """Another process, which takes memory before each of the first `times` reservations."""

    def __init__(self, monkeypatch, times):
        monkeypatch.setattr(memory_plan, "_SPARE_BYTES", 0)  # as much as hundreds of the tiny model's rows
        self.pages: list[int] = []
        self._times, self._reserve = times, open_gpu.cache_of
        monkeypatch.setattr(open_gpu, "cache_of", self.reserve)

    def reserve(self, weights, found):
        self.pages.append(sum(found.pages))
        if len(self.pages) <= self._times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._reserve(weights, found)


def test_memory_that_is_taken_between_planning_and_reserving_costs_pages_not_the_kernels(tiny_model_dir, monkeypatch):
    other = Taken(monkeypatch, 2)
    with engine(tiny_model_dir, self_check=False, slots=64).open() as opened:
        assert "GPU kernels" in opened.info.versions["forward"]
        assert len(drawn(opened)) == 2
    first, second, third = other.pages
    assert first > second > third > 0


def test_what_is_asked_for_after_a_failed_reservation_is_what_is_free_then(tiny_model_dir, monkeypatch):
    free = [10**9, 5 * 10**6, 10**6]
    budgets = []
    plan = open_gpu.plan
    monkeypatch.setattr(MemoryBudget, "for_cache", lambda self, device, **_: free.pop(0))
    monkeypatch.setattr(open_gpu, "plan", lambda sizes, **rest: budgets.append(rest["budget"]) or plan(sizes, **rest))
    Taken(monkeypatch, 1)
    with engine(tiny_model_dir, slots=64, self_check=False).open() as opened:
        assert "GPU kernels" in opened.info.versions["forward"]
    assert budgets == [10**9, 5 * 10**6]


def test_three_reservations_are_tried(tiny_model_dir, monkeypatch):
    other = Taken(monkeypatch, 10)
    with engine(tiny_model_dir, slots=64, self_check=False).open() as opened:
        assert any("there is too little memory for it" in one for one in opened.info.notices)
    assert len(other.pages) == 3


def test_a_closed_session_keeps_no_memory(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(DeviceSteps, "warm_up", lambda steps: None)  # Triton's interpreter keeps what it is given
    gc.disable()  # a reference cycle would keep the memory until the collector runs
    try:
        for kernels in ("auto", "library"):
            with engine(tiny_model_dir, kernels=kernels, self_check=False).open() as opened:
                if kernels == "library":  # whose cache is made then
                    drawn(opened)
                held = [weakref.ref(one.untyped_storage()) for one in memory_of(opened)]
                assert len(held) > 8
            assert not [one for one in held if one() is not None]
    finally:
        gc.enable()


def memory_of(opened):
    """Return the tensors of a session's model and cache."""
    steps = opened._steps
    if isinstance(steps, LogitsSteps):
        return [*steps._backend._model.parameters(), *steps._backend._cache._stored()]
    pages = [tensor for group in steps._cache.groups for tensor in group.of_layer.values()]
    return [*pages, *(layer.qkv for layer in steps._forward.weights.layers), steps._forward._logits]


def test_steps_whose_recording_fails_are_launched(tiny_model_dir, monkeypatch):
    """The first is recorded, the second fails, and the memory allocator is left in a state in which it raises."""
    recorded = []

    def record(run):
        if recorded:
            raise RuntimeError("planted: operation not permitted when stream is capturing")
        recorded.append(run())
        return recorded[0], lambda: pytest.fail("a step of a failed recording was replayed")

    def refuse():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(open_gpu, "cuda_recorder", lambda: record)
    monkeypatch.setattr(device_steps, "release_cached", refuse)
    with engine(tiny_model_dir, self_check=False, cuda_graphs=True, slots=9).open() as opened:
        assert opened.info.notices[0] == "Decode steps are not recorded: the recording failed (RuntimeError)."
        assert "GPU kernels" in opened.info.versions["forward"]
        assert len(recorded) == 1
        assert not opened._steps._recorded
        assert len(drawn(opened)) == 2


def test_a_gpu_that_cannot_compute_any_more_is_reported(tiny_model_dir, monkeypatch):
    does_not_compile(monkeypatch)
    monkeypatch.setattr(open_gpu, "is_lost", lambda device: True)
    with pytest.raises(EngineFailed) as failed, engine(tiny_model_dir).open():
        pass
    assert 'engine.kernels = "library"' in failed.value.next_step


def test_a_limit_too_small_for_it_leaves_the_library(tiny_model_dir):
    with engine(tiny_model_dir, memory_limit="16MiB").open() as opened:
        assert any("too little memory for its buffers" in one for one in opened.info.notices)


# ---------------------------------------------------------------------- a GPU without bfloat16


@pytest.fixture
def without_bfloat16(monkeypatch):
    """The CPU is a GPU without bfloat16; return the number formats that are loaded, and whether the last was freed."""
    monkeypatch.setattr(compare_forward, "_LENGTHS", (3, 5))
    monkeypatch.setattr(compare_forward, "_ACROSS", 2)
    monkeypatch.setattr(placement, "_is_gpu", lambda device: True)
    monkeypatch.setattr(placement, "_best_dtype", lambda on_cuda: "float32")
    loads, models, load = [], [], open_engine.load_model

    def noted(*arguments):
        gc.collect()
        assert not any(model() for model in models), "both would have to fit the GPU"
        loaded = load(*arguments)
        models.append(weakref.ref(loaded.model))
        loads.append(loaded.placement.dtype)
        return loaded

    monkeypatch.setattr(open_engine, "load_model", noted)
    return loads


def test_a_gpu_without_bfloat16_computes_in_float16_with_our_forward_pass(tiny_model_dir, without_bfloat16):
    with engine(tiny_model_dir, "auto", reproducible=False).open() as opened:
        assert opened.info.dtype == "float16"
        assert "GPU kernels, float16 (Triton" in opened.info.versions["forward"]
        assert not opened.info.notices
        assert all(done.finish_reason == "length" for done in complete(opened, prompts([3, 9], new=3)).values())
    assert without_bfloat16 == ["float16"]


@pytest.mark.parametrize("fault", [does_not_compile, has_no_memory, is_not_installed])
def test_if_it_cannot_be_used_there_the_model_is_in_float32(tiny_model_dir, monkeypatch, without_bfloat16, fault):
    why = fault(monkeypatch)
    with engine(tiny_model_dir, "auto", reproducible=False).open() as opened:
        assert isinstance(opened._steps, LogitsSteps)
        assert opened.info.dtype == "float32"
        (notice,) = [one for one in opened.info.notices if "Generating is slower on this GPU" in one]
        assert why in notice
        assert len(drawn(opened)) == 2
    assert without_bfloat16 == (["float32"] if fault is is_not_installed else ["float16", "float32"])


def test_a_run_that_began_in_float16_is_never_resumed_in_another_format(tiny_model_dir, monkeypatch, without_bfloat16):
    why = does_not_compile(monkeypatch)
    with (
        pytest.raises(ModelUnavailable, match="overflows in float16") as failed,
        engine(tiny_model_dir, "float16").open(),
    ):
        pass
    assert why in str(failed.value)
    assert "--fresh" in failed.value.next_step


def nothing(_):
    pass


def no_gpu(monkeypatch):
    monkeypatch.setattr(placement, "_is_gpu", lambda device: False)


@pytest.mark.parametrize(
    ("change", "settings", "why"),
    [
        (no_gpu, {}, "there is no GPU"),
        (nothing, {"kernels": "library"}, 'engine.kernels = "library"'),
        (is_not_installed, {}, "Triton is not installed"),
    ],
)
def test_float16_is_refused_for_gemma_where_our_forward_pass_will_not_run(
    tiny_model_dir, monkeypatch, without_bfloat16, change, settings, why
):
    change(monkeypatch)
    with (
        pytest.raises(JobFileError, match="overflows in float16") as refused,
        engine(tiny_model_dir, "float16", **settings).open(),
    ):
        pass
    assert why in str(refused.value)
    assert not without_bfloat16


def test_the_library_never_gets_gemma_in_float16(tiny_model_dir, without_bfloat16):
    with engine(tiny_model_dir, "auto", kernels="library").open() as opened:
        assert opened.info.dtype == "float32"
    with (
        pytest.raises(JobFileError, match="has no GPU kernels"),
        GenerateEngine(job(tiny_model_dir, "float16")).open(),
    ):
        pass
    four_bit = job(tiny_model_dir, "float16").with_values({"model.load_in_4bit": True})
    with pytest.raises(JobFileError, match="in 4 bits"), TransformersEngine(four_bit).open():
        pass


def test_a_llama_in_float16_continues_with_the_library(tmp_path, gemma_tokenizer, monkeypatch, without_bfloat16):
    tiny_llama().save_pretrained(tmp_path)
    gemma_tokenizer.save_pretrained(tmp_path)
    with engine(tmp_path, "auto", self_check=False, reproducible=False).open() as opened:
        assert opened.info.dtype == "float16"
        monkeypatch.setattr(device_steps.Forward, "decode", lambda *_: 1 / 0)
        assert len(drawn(opened)) == 2
        assert isinstance(opened._steps, LogitsSteps)


@pytest.fixture
def workplace(tmp_path, gemma_tokenizer, monkeypatch):
    """Three rows for a tiny Gemma 3 with the tokenizer's vocabulary, one after the other."""
    tiny_gemma(vocab=gemma_tokenizer.vocab_size).save_pretrained(tmp_path / "tiny")
    gemma_tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "short.md.j2").write_text("{{ findings }}")
    work = Workplace(tmp_path)
    work.table([("a", "no findings"), ("b", "pneumonia"), ("c", "fracture")])
    work.job(
        "[prompt]\ntemplate = 'short.md.j2'\n[model]\npath = 'tiny'\ndevice_map = 'cpu'\nmax_seq_length = 64\n"
        "[sampling]\nmax_new_tokens = 2\n[engine]\nkind = 'transformers'\nslots = 1\nself_check = false\n"
        "reproducible = false\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*options: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["run", "j.toml", "--output", "out", *options])
    return done.value.code


def recorded(workplace, key):
    return json.loads((workplace / "out" / "run.json").read_text())["fingerprint"][key]


def test_a_run_gets_more_slots_when_the_gpu_has_more_memory(workplace, monkeypatch, gemma_tokenizer):
    config = tiny_gemma(vocab=gemma_tokenizer.vocab_size).config
    sizes = open_gpu.sizes_of(config, torch.float32)
    one, two = (memory_plan.plan(sizes, capacity=64, budget=2**40, slots=slots).bytes for slots in (1, 2))
    monkeypatch.setattr(MemoryBudget, "for_cache", lambda self, device, *, held=0: two if held else one)
    monkeypatch.setattr(open_gpu, "_LOOK_SECONDS", 0.0)
    assert run("--set=engine.slots=auto", "--set=model.dtype=float32") == 0
    notice = "The GPU has more free memory: 2 slots instead of 1."
    log = [json.loads(line) for line in (workplace / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["text"] for line in log if line["event"] == "notice" and "GPU" in line["text"]] == [notice]
    manifest = json.loads((workplace / "out" / "run.json").read_text())
    assert manifest["invocations"][-1]["engine"]["slots"] == 2
    assert not any("slots" in key for key in manifest["fingerprint"])
    assert sorted(read_results(workplace / "out")["case_id"]) == ["a", "b", "c"]


def test_a_run_in_float16_ends_with_one_error_when_a_kernel_fails_and_resumes(
    workplace, monkeypatch, without_bfloat16, capsys
):
    with monkeypatch.context() as planted:
        calls, plain = [], device_steps.Forward.prefill

        def failing(*arguments):
            calls.append(1)
            return plain(*arguments) if len(calls) == 1 else 1 / 0

        planted.setattr(device_steps.Forward, "prefill", failing)
        assert run() == 4
    said = capsys.readouterr().err
    assert "Our GPU kernels cannot continue: a kernel failed (ZeroDivisionError)" in said
    assert "--fresh" in said
    assert "Traceback" not in said
    assert list(read_results(workplace / "out")["case_id"]) == ["a"]
    assert recorded(workplace, "model.dtype") == "float16"

    assert run("--set=engine.kernels=library") == 2
    assert "a run that began in float16 can be resumed" in capsys.readouterr().err

    assert run() == 0
    assert sorted(read_results(workplace / "out")["case_id"]) == ["a", "b", "c"]
    assert without_bfloat16 == ["float16", "float16"]


def test_a_run_that_began_in_float32_is_resumed_in_float32(workplace, without_bfloat16):
    """As GPUs without bfloat16 had it before, or one whose kernels could not be used then."""
    assert run("--limit", "1", "--set=engine.kernels=library") == 0
    assert run() == 0
    assert len(read_results(workplace / "out")) == 3
    assert recorded(workplace, "model.dtype") == "float32"
    assert without_bfloat16 == ["float32", "float32"]
