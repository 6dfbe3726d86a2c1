"""The whole engine on GPUs that exist in name only, on the real shapes of the 4B model: manners and memory.

See support/fake_cuda.py for what such a run sees. The engine is opened through its own door, from weight files that are
a header and a hole, and generates.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fake_cuda import GIB, FakeGpu, LaunchedPastLauncher, fake_cuda, load_guard
from tiny import shape_4b
from tiny_sessions import prompts
from transformers import Gemma3ForCausalLM

from gxr_batch.engines.base import Pulse, StopRequest
from gxr_batch.engines.slots import TransformersEngine
from gxr_batch.engines.slots.gpu import forward, open_gpu
from gxr_batch.engines.slots.gpu.kernels import TRITON_VERSION, norms
from gxr_batch.job import Job
from gxr_batch.models.form_tokens import FormRow, FormTokens

# What a step may launch, our kernels and torch's together; the library's forward pass launches about 3,000.
MOST_KERNELS = 450
PAGE = (Path(__file__).parents[2] / "docs" / "sharing-a-gpu.md").read_text()
CONFIG = shape_4b(architectures=["Gemma3ForCausalLM"], max_position_embeddings=131_072, dtype="bfloat16")


@pytest.fixture(scope="module", autouse=True)
def _a_guard(tmp_path_factory):
    if torch.backends.cuda.is_built():
        pytest.skip("this torch is built with CUDA, and the dry run would replace its device guard")
    if shutil.which("g++") is None:
        pytest.skip("no g++, which compiles the device guard of the dry run")
    try:
        load_guard(tmp_path_factory.mktemp("guard"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"g++ cannot compile the device guard: {error.stderr.decode().splitlines()[-1]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, gemma_tokenizer):
    """The 4B model without its bytes: 7.2 GiB of weights that take no disk."""
    made = tmp_path_factory.mktemp("sparse")
    gemma_tokenizer.save_pretrained(made)
    CONFIG.save_pretrained(made)
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in Gemma3ForCausalLM(CONFIG).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (made / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert (made / "model.safetensors").stat().st_blocks * 512 < 2**20, "the file has a hole"
    return made


@pytest.fixture(scope="module", autouse=True)
def _no_bytes(gemma_tokenizer):
    """Do not hash the hole, and load the tokenizer once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gxr_batch.models.load_weights.weights_sha256", lambda files: "0" * 64)
        patch.setattr("gxr_batch.models.load_weights.load_tokenizer", lambda section: gemma_tokenizer)
        yield


def engine(folder: Path, form: dict | None = None, new: int = 8, **settings) -> TransformersEngine:
    return TransformersEngine(
        Job.model_validate(
            {
                "name": "j",
                "input": {"path": "x"},
                "model": {"path": str(folder), "max_seq_length": 2048},
                "sampling": {"max_new_tokens": new},
                "engine": settings,
                **({"form": form} if form else {}),
            }
        )
    )


class Run(NamedTuple):
    """What one dry run showed: `steps` are pairs of kernels and waits of each decode step after the first."""

    forward: str
    slots: int
    notices: list[str]
    steps: list[tuple[Counter, Counter]]
    errors: set[str | None]
    replays: int


def run(
    folder: Path, *gpus: FakeGpu, rows: int | None = None, new: int = 8, form: dict | None = None, **settings
) -> Run:
    """Open the engine on these GPUs, let it write `new` tokens for `rows` rows (as many as it has slots), close it."""
    with fake_cuda(*gpus) as booked, engine(folder, form, new, **settings).open() as opened:
        steps, found = opened._steps, []
        decode = steps.decode
        launches = steps._forward.launch.launches if hasattr(steps, "_forward") else Counter()  # the library has none
        before: list[tuple[Counter, Counter]] = []

        def watched(rows):
            now = booked.kernels + launches, Counter(booked.waits)
            if before:
                found.append((now[0] - before[-1][0], now[1] - before[-1][1]))
            before.append(now)
            decode(rows)

        steps.decode = watched
        events = list(opened.stream(iter(prompts([40] * (rows or opened.info.slots), new=new)), StopRequest()))
        notices = [
            *opened.info.notices,
            *(one for event in events if isinstance(event, Pulse) for one in event.notices),
        ]
        errors = {event.error for event in events if not isinstance(event, Pulse)}
        return Run(opened.info.versions["forward"], opened.info.slots, notices, found, errors, booked.replays)


@pytest.fixture(scope="module")
def plain(folder, _no_bytes):
    """A run of 24 rows on a GPU of 24 GiB, and the GPU afterwards."""
    gpu = FakeGpu(24 * GIB)
    return run(folder, gpu, rows=24), gpu


def test_the_whole_engine_runs_with_our_kernels_and_mixes_no_devices(plain):
    done, _ = plain
    assert done.forward == f"GPU kernels, bfloat16 (Triton {TRITON_VERSION})"
    assert done.notices == ["The model is on cuda:0, the device with the most free memory."]
    assert done.errors == {None}


def test_a_decode_step_launches_few_kernels_and_waits_once(plain, capsys):
    done, _ = plain
    steps = [step for step in done.steps if not step[0]["prefill_tiles"]]
    assert len(steps) >= 6
    kernels, waits = steps[len(steps) // 2]
    with capsys.disabled():
        print(f"\n{sum(kernels.values())} kernels a decode step: {dict(kernels)}\nwaits: {dict(waits)}")
    for kernels, waits in steps:
        assert 300 < sum(kernels.values()) <= MOST_KERNELS
        assert sum(waits.values()) <= 1


def test_a_step_with_a_form_mixes_no_devices(folder, monkeypatch, capsys):
    """Its tokens are no real ones, so a row cannot advance in its form: it stays at its beginning for a few steps."""

    def take(row, id):
        row.used += 1
        return row.used == len(row.tokens.openings[0]) + 6

    allowed = FormTokens.allowed

    def may_close(tokens, rows):
        found = allowed(tokens, rows)
        found.closing[:] = tokens.separator[0]
        return found

    monkeypatch.setattr(FormRow, "take", take)
    monkeypatch.setattr(FormTokens, "allowed", may_close)
    form = {"sections": ["Impression", "Teaching point"]}
    done = run(folder, FakeGpu(24 * GIB), rows=24, new=40, form=form, cuda_graphs=True, self_check=False)
    assert done.forward.startswith("GPU kernels")
    assert any("engine.cuda_graphs has no effect" in notice for notice in done.notices)
    kernels, waits = done.steps[len(done.steps) // 2]
    with capsys.disabled():
        print(f"\n{sum(kernels.values())} kernels a decode step with a form; waits: {dict(waits)}")
    assert kernels["forbid_ids"] == 1
    assert sum(kernels.values()) <= MOST_KERNELS
    assert sum(waits.values()) <= 1


def test_after_the_run_the_gpu_is_as_free_as_before_it(plain):
    _, gpu = plain
    assert (gpu.live, gpu.reserved) == (0, 0)
    assert gpu.peak > 8 * GIB


def test_kernels_of_torch_count_too(folder, monkeypatch):
    head = forward.Forward._head

    def wasteful(self, normed):
        for _ in range(200):
            normed.mul_(1)
        return head(self, normed)

    monkeypatch.setattr(forward.Forward, "_head", wasteful)
    done = run(folder, FakeGpu(24 * GIB), rows=8, self_check=False, reproducible=False)
    steps = [kernels for kernels, _ in done.steps if not kernels["prefill_tiles"]]
    assert all(kernels["mm"] == 137 and kernels["mul_"] == 200 for kernels in steps)
    assert all(MOST_KERNELS < sum(kernels.values()) <= MOST_KERNELS + 200 for kernels in steps)


def test_a_kernel_that_is_not_started_by_the_launcher_ends_the_dry_run(folder, monkeypatch):
    head = forward.Forward._head

    def past(self, normed):
        norms.add_and_norm[(1,)](normed)
        return head(self, normed)

    monkeypatch.setattr(forward.Forward, "_head", past)
    with pytest.raises(LaunchedPastLauncher):
        run(folder, FakeGpu(24 * GIB), rows=8, self_check=False)


def test_an_operand_on_another_device_is_refused_as_on_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(forward.Forward, "_head", lambda self, normed: normed + torch.zeros(1, 1))
    done = run(folder, FakeGpu(24 * GIB), rows=2, new=2, self_check=False)
    (notice,) = [one for one in done.notices if "Generating is slower on this GPU" in one]  # opening found it
    assert "a kernel failed (FakeTensorDeviceMismatchError)" in notice
    assert done.errors == {None}, "the library's forward pass took over"


def test_steps_are_recorded_without_anything_from_the_host(folder):
    done = run(folder, FakeGpu(24 * GIB), rows=24, cuda_graphs=True, self_check=False)
    assert not any("not recorded" in notice for notice in done.notices)
    kernels, waits = done.steps[len(done.steps) // 2]
    assert sum(kernels.values()) == 0, "a step is a replay"
    assert done.replays >= 6
    assert sum(waits.values()) <= 1


def test_a_read_back_while_a_step_is_recorded_fails_as_on_a_gpu(folder, monkeypatch):
    head = forward.Forward._head

    def reads(self, normed):
        normed[0, 0].item()
        return head(self, normed)

    monkeypatch.setattr(forward.Forward, "_head", reads)
    done = run(folder, FakeGpu(24 * GIB), rows=8, cuda_graphs=True, self_check=False)
    assert "Decode steps are not recorded: the recording failed (RuntimeError)." in done.notices
    assert done.replays == 0
    assert min(sum(waits.values()) for _, waits in done.steps) >= 2


# ---------------------------------------------------------------------- memory

# What a GPU has in GiB by the GB of its name, what other processes hold of it in the shared cases, and a limit.
GPUS = {16: (15.6, 3, 12), 24: (23.5, 8, 14), 40: (39.4, 16, 20), 80: (79.1, 40, 32), 141: (139.8, 70, 60)}


class FourBit(BaseException):
    """The model would be loaded in 4 bits, whose weights cannot be fake."""


def cases():
    for gigabytes in GPUS:
        for shared in (False, True):
            for limited in (False, True):
                rare = [] if shared == limited or gigabytes == 16 else [pytest.mark.long]
                yield pytest.param(gigabytes, shared, limited, marks=rare)


@pytest.mark.parametrize(("gigabytes", "shared", "limited"), list(cases()))
def test_memory_stays_within_the_gpu_and_the_limit(folder, monkeypatch, gigabytes, shared, limited, capsys):
    total, others, limit = GPUS[gigabytes]
    gpu = FakeGpu(int(total * GIB), others=others * GIB if shared else 0, capability=(8, 6))
    monkeypatch.setattr("gxr_batch.models.read_weights._four_bit", lambda dtype: (_ for _ in ()).throw(FourBit))
    settings = {"memory_limit": f"{limit}GiB"} if limited else {}
    try:
        done = run(folder, gpu, rows=64, new=3, self_check=gigabytes == 16 and limited, **settings)
    except FourBit:
        slots = "4-bit weights"
    else:
        assert done.forward.startswith("GPU kernels")
        assert done.errors == {None}
        slots = str(done.slots)
    used = gpu.peak + gpu.context
    row = f"| {gigabytes} GB | {f'{others} GiB' if shared else '-'} | {f'{limit} GiB' if limited else '-'} | {slots} |"
    with capsys.disabled():
        print(f"\n{row} {used / GIB:.1f} GiB at most")
    assert used + gpu.others <= gpu.total
    if limited:
        assert used <= limit * GIB
    assert row in PAGE, "docs/sharing-a-gpu.md says otherwise"


def test_while_it_grows_only_one_layer_is_there_twice(folder, monkeypatch):
    """Another process, which holds 28 GiB while the engine opens, ends."""
    monkeypatch.setattr(open_gpu, "_LOOK_SECONDS", 0.0)
    gpu, limit, found = FakeGpu(40 * GIB, others=28 * GIB), 20, []
    with fake_cuda(gpu), engine(folder, memory_limit=f"{limit}GiB", self_check=False).open() as opened:
        grow, slots = opened._steps.grow, opened.info.slots

        def watched(*sizes):
            a_layer = max(one.nbytes for group in opened._steps._cache.groups for one in group.of_layer.values())
            gpu.reserved = gpu.peak = gpu.live
            grown = grow(*sizes)
            found.append((gpu.peak - gpu.live, a_layer))
            return grown

        opened._steps.grow = watched
        gpu.others = 0
        work = prompts([40] * 2 * slots, new=4)
        pulses = [event for event in opened.stream(iter(work), StopRequest()) if isinstance(event, Pulse)]
        assert (slots, opened.info.slots) == (64, 128)
    assert [one for pulse in pulses for one in pulse.notices] == [
        "The GPU has more free memory: 128 slots instead of 64."
    ]
    ((more, a_layer),) = found
    assert more <= a_layer + 2**21  # rounded up
    assert gpu.peak + gpu.context <= limit * GIB
