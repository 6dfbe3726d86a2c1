"""Checks and times the forward pass for GPUs on one NVIDIA GPU, with random weights that are made there.

It needs no network, bitsandbytes, tokenizer or model, but a checkout of this repository and its dependencies. On a
machine without pydantic, pyarrow or httpx2, carry them: `pip install --target carry --only-binary=:all:
--python-version 3.12 pydantic pyarrow httpx2 filelock`, and put the folder in PYTHONPATH.

    python benchmarks/cuda.py --first --out first.json      # is it right? at most 200 s on an H200
    python benchmarks/cuda.py --second --out second.json    # how fast is it? at most 300 s
    python benchmarks/cuda.py --only graphs,memory          # single steps, by name
    TRITON_INTERPRET=1 python benchmarks/cuda.py --device cpu --shape tiny --first   # a rehearsal: no times

Every step is guarded, and the results are written after each, so that a failure or a time limit loses only what
follows.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, make

from gxr_batch.engines.base import EngineInfo, Identity, StopRequest
from gxr_batch.engines.slots.cuda_graphs import cuda_recorder
from gxr_batch.engines.slots.decode_loop import TransformersSession
from gxr_batch.engines.slots.decoding_row import RowState
from gxr_batch.engines.slots.gpu.compare_forward import compare
from gxr_batch.engines.slots.gpu.device_steps import DeviceSteps
from gxr_batch.engines.slots.gpu.forward import Forward
from gxr_batch.engines.slots.gpu.fused_weights import fuse, why_not
from gxr_batch.engines.slots.gpu.memory_plan import MemoryPlan, plan
from gxr_batch.engines.slots.gpu.open_gpu import cache_of, sizes_of
from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.row_steps import LogitsSteps, Steps
from gxr_batch.job.sampling import Sampling
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt

SAMPLED = Sampling(temperature=1.0)


@dataclass
class Bench:
    """What the steps share: the device, the shape, the sizes, and the model that is loaded."""

    device: torch.device
    shape: str
    capacity: int
    rows: int
    new_tokens: int
    counts: tuple[int, ...]
    _model: Any = None
    _dtype: torch.dtype | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether times and memory mean anything."""
        return self.device.type == "cuda"

    def model(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        """Return the model in this type; only one is in memory."""
        if self._dtype != dtype:
            self._model = None
            self.clean()
            self._model, self._dtype = make(self.shape, dtype, self.device), dtype
        return self._model

    def clean(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def plan(self, slots: int | None = None, gib: int = 40) -> MemoryPlan:
        """Return the plan of memory for the model that is loaded."""
        sizes = sizes_of(self._model.config, self._model.dtype)
        found = plan(sizes, capacity=self.capacity, budget=gib * 2**30, slots=slots)
        if found is None:
            raise SystemExit("too little memory for one row")
        return found

    def forward(self, slots: int, *, reproducible: bool) -> Forward:
        """Return our forward pass with an empty cache."""
        assert not why_not(self._model)
        found = self.plan(slots)
        weights = fuse(self._model, self.capacity)
        return Forward(weights, cache_of(weights, found), chunk=found.chunk, reproducible=reproducible)

    def steps(
        self, slots: int, *, reproducible: bool, graphs: bool = False, sampling: Sampling = SAMPLED
    ) -> DeviceSteps:
        """Return our steps, recorded or not."""
        record = cuda_recorder() if graphs else None
        made = DeviceSteps(self.forward(slots, reproducible=reproducible), sampling, record=record)
        if graphs:
            made.record_steps()
        return made

    def session(self, steps: Steps, slots: int) -> TransformersSession:
        """Return a session of these steps; its texts are ids."""
        info = EngineInfo(
            identity=Identity(kind="transformers", model="random"),
            device=str(self.device),
            dtype=None,
            quantization=None,
            slots=slots,
            load_seconds=0,
            reproducible=True,
        )
        return TransformersSession(info, steps, Numbers(), frozenset())

    def work(self, count: int, *, longest: int | None = None, seed: int = 1) -> list[Prompt]:
        """Return prompts of random ids, longest first, with different numbers of new tokens."""
        rng = random.Random(seed)
        vocabulary, most = SHAPES[self.shape][-1], longest or self.capacity // 4
        found = []
        for number in range(count):
            ids = [rng.randrange(3, vocabulary) for _ in range(rng.randint(most // 2, most))]
            new = rng.randint(self.new_tokens // 2, self.new_tokens)
            found.append(Prompt(Key(str(number), 1), Messages((), "t"), Encoded(ids, len(ids)), number, new))
        return sorted(found, key=lambda prompt: -len(prompt.encoded.token_ids or ()))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()


class Numbers:
    """Decodes ids to their numbers, in place of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the ids, separated by spaces."""
        return " ".join(map(str, ids))


def texts(session: TransformersSession, work: Sequence[Prompt]) -> dict[str, str]:
    """Return the texts by row; raise if one failed."""
    done = [event for event in session.stream(iter(work), StopRequest()) if isinstance(event, Completion)]
    failed = [event.error for event in done if event.error]
    if failed or len(done) != len(work):
        raise RuntimeError(f"{len(work) - len(done)} rows missing, {len(failed)} failed: {failed[:1]}")
    return {event.key.row_id: event.text for event in done}


def differing(found: dict[str, str], expected: dict[str, str]) -> int:
    """Return how many rows differ."""
    return sum(found[row] != expected[row] for row in expected)


# ---------------------------------------------------------------------- --first: is it right?


def agree(bench: Bench) -> dict[str, Any]:
    """Compare logits with the library's, in float32 and bfloat16, alone and together, with both kinds of products."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = bench.model(dtype)
        for reproducible in (True, False):
            forward = bench.forward(8, reproducible=reproducible)
            compared = compare(model, forward)
            name = f"{dtype}, reproducible = {reproducible}".removeprefix("torch.")
            found[name] = {"why": compared.why or "agrees", "same bits alone and together": compared.same_bits}
            del forward
            bench.clean()
    return found


def tokens(bench: Bench) -> dict[str, Any]:
    """Compare greedy and sampled texts in float32 with the library's forward pass."""
    model = bench.model(torch.float32)
    work = bench.work(bench.rows // 4)
    found = {}
    for name, sampling in (("greedy", Sampling(temperature=0, repetition_penalty=1.0)), ("sampled", SAMPLED)):
        library = LogitsSteps(LibraryModel(model, slots=8, capacity=bench.capacity), sampling)
        expected = texts(bench.session(library, 8), work)
        del library
        bench.clean()
        ours = texts(bench.session(bench.steps(8, reproducible=True, sampling=sampling), 8), work)
        found[f"{name}: rows that differ from the library's"] = differing(ours, expected)
        bench.clean()
    return found | {"of": len(work)}


def alongside(bench: Bench) -> dict[str, Any]:
    """Compare sampled texts in bfloat16 at several numbers of slots, in another order."""
    bench.model()
    work = bench.work(bench.rows)
    expected = texts(bench.session(bench.steps(8, reproducible=True), 8), work)
    found = {}
    for slots in bench.counts:
        shuffled = random.Random(slots).sample(work, len(work))
        other = texts(bench.session(bench.steps(slots, reproducible=True), slots), shuffled)
        found[f"{slots} slots: rows that differ from 8 slots"] = differing(other, expected)
        bench.clean()
    return found | {"of": len(work)}


def graphs(bench: Bench) -> dict[str, Any]:
    """Compare texts of recorded steps with those of launched ones."""
    if not bench.on_gpu:
        return {"left out": "recording needs a GPU"}
    bench.model()
    work, slots = bench.work(bench.rows), bench.counts[-1]
    expected = texts(bench.session(bench.steps(slots, reproducible=False), slots), work)
    bench.clean()
    began = time.perf_counter()
    steps = bench.steps(slots, reproducible=False, graphs=True)
    seconds = time.perf_counter() - began
    recorded = texts(bench.session(steps, slots), work)
    return {"rows that differ": differing(recorded, expected), "of": len(work), "seconds to record": seconds}


def memory(bench: Bench) -> dict[str, Any]:
    """Compare what a session takes with its plan."""
    bench.model()
    found = bench.plan()
    if not bench.on_gpu:
        return {"left out": "nothing to measure without a GPU", "plan bytes": found.bytes}
    bench.clean()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    steps = bench.steps(found.slots, reproducible=False)
    texts(bench.session(steps, found.slots), bench.work(bench.rows))
    took = torch.cuda.max_memory_reserved() - before
    return {"plan bytes": found.bytes, "taken bytes": took, "slots": found.slots, "within": took <= found.bytes}


# ---------------------------------------------------------------------- --second: how fast is it?


def roofline(bench: Bench) -> dict[str, Any]:
    """Measure the memory's speed, and what a step could do that only reads the weights once."""
    if not bench.on_gpu:
        return {"left out": "no times without a GPU"}
    model = bench.model()
    block = torch.empty(2**32, dtype=torch.uint8, device=bench.device)
    seconds = timed(bench, lambda: block.add_(1), 20)
    bandwidth = 2 * len(block) / seconds
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    return {"bytes a second": bandwidth, "weight bytes": weights, "seconds a step": weights / bandwidth}


def step_times(bench: Bench) -> dict[str, Any]:
    """Time a decode step, its draws and a prefill, by rows, launched and recorded, reproducible or not."""
    bench.model()
    found: dict[str, Any] = {}
    for rows in bench.counts:
        for reproducible, recorded in ((False, False), (False, True), (True, False), (True, True)):
            if recorded and not bench.on_gpu:
                continue
            steps = bench.steps(rows, reproducible=reproducible, graphs=recorded)
            own = [replace_new(prompt, bench.capacity // 2) for prompt in bench.work(rows)]
            states = [RowState(prompt, 0.0, slot) for slot, prompt in enumerate(own)]
            for state in states:
                if not steps.reserve(state):
                    raise RuntimeError("the pages do not hold these rows")
            bench.synchronize()
            began = time.perf_counter()
            steps.prefill(states, 0)
            bench.synchronize()
            prefill = time.perf_counter() - began
            steps.decode(states)
            step = timed(bench, lambda steps=steps, states=states: steps.decode(states), 30 if bench.on_gpu else 1)
            name = f"{rows} rows{', recorded' if recorded else ''}{', reproducible' if reproducible else ''}"
            count = sum(len(prompt.encoded.token_ids or ()) for prompt in own)
            found[name] = {"step seconds": step, "prefill tokens a second": count / prefill}
            if not recorded:
                found[name]["draw seconds"] = draw_seconds(bench, steps, rows)
            del steps
            bench.clean()
    return found


def draw_seconds(bench: Bench, steps: DeviceSteps, rows: int) -> float:
    """Return the seconds of the draws alone, on the logits of the newest step."""
    logits, state = steps._logits(rows), steps._state
    return timed(bench, lambda: state.draw(logits, state.active[:rows]), 30 if bench.on_gpu else 1)


def useful(bench: Bench) -> dict[str, Any]:
    """Measure new tokens a second of whole streams, and those of transformers' own ways to do it."""
    model = bench.model()
    work = bench.work(2 * bench.counts[-1])
    count = sum(prompt.max_new_tokens for prompt in work)
    found: dict[str, Any] = {"new tokens": count}
    for name, reproducible, recorded in (("ours", False, True), ("ours, reproducible", True, True)):
        slots = bench.counts[-1]
        steps = bench.steps(slots, reproducible=reproducible, graphs=recorded and bench.on_gpu)
        session = bench.session(steps, slots)
        texts(session, work[:slots])  # compiles what is left to compile
        bench.synchronize()
        began = time.perf_counter()
        texts(session, work)
        found[f"{name}: tokens a second"] = count / (time.perf_counter() - began)
        del steps, session
        bench.clean()
    if bench.on_gpu:
        found["generate: tokens a second"] = count / static_seconds(bench, model, work)
        found["generate_batch: tokens a second"] = count / continuous_seconds(model, work)
    return found


def static_seconds(bench: Bench, model: Any, work: Sequence[Prompt]) -> float:
    """Time padded batches of 64 through transformers' generate, each as long as its longest answer."""
    bench.synchronize()
    began = time.perf_counter()
    for start in range(0, len(work), 64):
        batch = work[start : start + 64]
        longest = max(len(prompt.encoded.token_ids or ()) for prompt in batch)
        padded = [[0] * (longest - len(p.encoded.token_ids or ())) + list(p.encoded.token_ids or ()) for p in batch]
        ids = torch.tensor(padded, device=bench.device)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=(ids != 0).long(),
                do_sample=True,
                top_k=50,
                max_new_tokens=max(prompt.max_new_tokens for prompt in batch),
                eos_token_id=None,
                pad_token_id=0,
            )
    bench.synchronize()
    return time.perf_counter() - began


def continuous_seconds(model: Any, work: Sequence[Prompt]) -> float:
    """Time transformers' continuous batching on the same prompts, with the mean number of new tokens."""
    from transformers import GenerationConfig

    mean = round(statistics.mean(prompt.max_new_tokens for prompt in work))
    config = GenerationConfig(max_new_tokens=mean, do_sample=True, top_k=50, eos_token_id=-1, pad_token_id=0)
    began = time.perf_counter()
    model.generate_batch(inputs=[list(prompt.encoded.token_ids or ()) for prompt in work], generation_config=config)
    return time.perf_counter() - began


def replace_new(prompt: Prompt, new: int) -> Prompt:
    """Return the prompt with another number of new tokens."""
    return prompt._replace(max_new_tokens=new)


def timed(bench: Bench, run: Callable[[], Any], times: int) -> float:
    """Return the median seconds of a call, by events on a GPU."""
    if not bench.on_gpu:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    for _ in range(3):
        run()
    seconds = []
    for _ in range(times):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        seconds.append(before.elapsed_time(after) / 1000)
    return statistics.median(seconds)


FIRST: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "agree": agree,
    "tokens": tokens,
    "alongside": alongside,
    "graphs": graphs,
    "memory": memory,
}
SECOND: dict[str, Callable[[Bench], dict[str, Any]]] = {"roofline": roofline, "steps": step_times, "useful": useful}


def main() -> None:
    """Run the steps that are asked for; write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help=f"steps {', '.join(FIRST)}")
    parser.add_argument("--second", action="store_true", help=f"steps {', '.join(SECOND)}")
    parser.add_argument("--only", default="", help="steps by name, separated by commas")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=300, help="begin no step after this (default 300)")
    parser.add_argument("--out", type=Path, help="write the results here, too")
    options = parser.parse_args()
    small = options.device == "cpu"
    bench = Bench(
        device=torch.device(options.device),
        shape=options.shape,
        capacity=64 if small else 2048,
        rows=4 if small else 48,
        new_tokens=4 if small else 128,
        counts=(2, 3) if small else (16, 64, 256),
    )
    every = FIRST | SECOND
    names = [name for name in options.only.split(",") if name]
    names += [*(FIRST if options.first else ()), *(SECOND if options.second else ())]
    if unknown := [name for name in names if name not in every] or ([] if names else ["nothing asked for"]):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(every)}")
    name_of = torch.cuda.get_device_name(bench.device) if bench.on_gpu else "CPU, interpreted: no times"
    results: dict[str, Any] = {"device": name_of, "torch": torch.__version__, "shape": options.shape, "steps": {}}
    torch.backends.cuda.matmul.allow_tf32 = False
    began = time.monotonic()
    for name in names:
        if time.monotonic() - began > options.seconds:
            results["steps"][name] = {"left out": "no time"}
            continue
        at = time.monotonic()
        try:
            found = every[name](bench)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-2000:]}
        bench.clean()
        results["steps"][name] = {**found, "seconds": round(time.monotonic() - at, 1)}
        print(json.dumps({name: results["steps"][name]}, indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
