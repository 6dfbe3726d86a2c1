"""Opening the engine as on a GPU: our forward pass if it agrees with the library's, the library's with a notice if not.

The CPU takes the GPU's part, so that loading, budget, comparison and run are the real ones.
"""

from __future__ import annotations

import pytest
import torch
from tiny_sessions import complete, prompts

from gxr_batch.engines.slots import TransformersEngine, open_engine
from gxr_batch.engines.slots.gpu import compare_forward, forward, open_gpu
from gxr_batch.engines.slots.gpu.kernels import norms
from gxr_batch.engines.slots.row_steps import LogitsSteps
from gxr_batch.errors import EngineFailed
from gxr_batch.job import Job


@pytest.fixture(autouse=True)
def _the_cpu_is_a_gpu(monkeypatch):
    monkeypatch.setattr(open_engine, "_is_on_one_gpu", lambda loaded: True)
    monkeypatch.setattr(compare_forward, "_LENGTHS", (3, 20))
    monkeypatch.setattr(compare_forward, "_ACROSS", 9)
    monkeypatch.setattr(forward, "SPLIT_TOKENS", 128)


def engine(folder, **settings) -> TransformersEngine:
    return TransformersEngine(
        Job.model_validate(
            {
                "name": "j",
                "input": {"path": "x"},
                "model": {"path": str(folder), "dtype": "float32", "max_seq_length": 64},
                "sampling": {"max_new_tokens": 3},
                "engine": {"slots": 2, "memory_limit": "256MiB", **settings},
            }
        )
    )


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
        assert drawn(opened) == expected


def differs(monkeypatch):
    monkeypatch.setitem(compare_forward._MOST_DIFFERENCE, torch.float32, 0.0)
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


@pytest.mark.parametrize("fault", [differs, does_not_compile, has_no_memory, is_not_installed])
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


def test_a_gpu_that_cannot_compute_any_more_is_reported(tiny_model_dir, monkeypatch):
    does_not_compile(monkeypatch)
    monkeypatch.setattr(open_gpu, "is_lost", lambda device: True)
    with pytest.raises(EngineFailed) as failed, engine(tiny_model_dir).open():
        pass
    assert 'engine.kernels = "library"' in failed.value.next_step


def test_a_limit_too_small_for_it_leaves_the_library(tiny_model_dir):
    with engine(tiny_model_dir, memory_limit="16MiB").open() as opened:
        assert any("too little memory for its buffers" in one for one in opened.info.notices)
