"""Checks and times the forward pass for GPUs on one NVIDIA GPU, with random weights that are made there.

It needs a checkout of this repository, torch, transformers and Triton, but no network, tokenizer or model. Of all other
packages it needs two. On a machine without them, carry them, and put the folder in PYTHONPATH:

    pip install --target carry --only-binary=:all: --python-version 3.12 pydantic pyarrow

    python benchmarks/cuda.py --first --out first.json      # is it right? at most 200 s
    python benchmarks/cuda.py --second --out second.json    # how fast is it? at most 300 s
    python benchmarks/cuda.py --only graphs,memory          # single steps, by name
    TRITON_INTERPRET=1 python benchmarks/cuda.py --device cpu --shape tiny --first --second   # a rehearsal on the CPU

`ballast` and `generate` take all of the GPU's free memory: leave them out on a GPU that others use. Every step is
guarded and ends when the time is up, unless the GPU hangs. The results are written after each, with what a failed step
found until then.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, make

from gxr_batch.engines.base import EngineInfo, Identity, StopRequest
from gxr_batch.engines.slots.cuda_graphs import Record, cuda_recorder
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

Found = dict[str, Any]
SAMPLED = Sampling(temperature=1.0)


@dataclass
class Bench:
    """What the steps share: the device, the shape, the sizes, and the model that is loaded."""

    device: torch.device
    shape: str
    capacity: int
    few: int
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
            self.forget()
            self._model, self._dtype = make(self.shape, dtype, self.device), dtype
        return self._model

    def forget(self) -> None:
        """Give back the model."""
        self._model = self._dtype = None
        self.clean()

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
            raise RuntimeError("too little memory for one row")
        return found

    def forward(self, slots: int, *, reproducible: bool) -> Forward:
        """Return our forward pass with an empty cache."""
        if reason := why_not(self._model):
            raise RuntimeError(reason)
        found = self.plan(slots)
        weights = fuse(self._model, self.capacity)
        self.clean()
        return Forward(weights, cache_of(weights, found), chunk=found.chunk, reproducible=reproducible)

    def steps(
        self, slots: int, *, reproducible: bool, graphs: bool = False, sampling: Sampling = SAMPLED
    ) -> DeviceSteps:
        """Return our steps, recorded or not."""
        recorder = self.recorder if graphs else None
        made = DeviceSteps(self.forward(slots, reproducible=reproducible), sampling, recorder=recorder)
        if graphs and (failed := made.record_steps()):
            raise RuntimeError(failed[0])
        return made

    def recorder(self) -> Record:
        """Return a recorder of steps; on a CPU one that runs them again."""
        return cuda_recorder() if self.on_gpu else lambda run: (run(), run)

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

    def reserved(self) -> int:
        """Return the most bytes that torch has held on the GPU since the last reset."""
        return torch.cuda.max_memory_reserved() if self.on_gpu else 0

    def filling(self) -> torch.Tensor:
        """Return a tensor that leaves 16 MiB of the GPU free."""
        self.clean()
        free = torch.cuda.mem_get_info()[0] - 2**24 if self.on_gpu else 2**20
        return torch.empty(max(free, 0), dtype=torch.uint8, device=self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()


class Numbers:
    """Decodes ids to their numbers, in place of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the ids, separated by spaces."""
        return " ".join(map(str, ids))


def texts(
    session: TransformersSession, work: Sequence[Prompt], filling: Callable[[], torch.Tensor] | None = None
) -> dict[str, str]:
    """Return the texts by row; raise if one failed. What `filling` returns is kept until half of the rows are done."""
    done: list[Completion] = []
    kept = None
    for event in session.stream(iter(work), StopRequest()):
        done += [event] if isinstance(event, Completion) else []
        if filling and kept is None:
            kept = filling()
        if 2 * len(done) >= len(work):
            filling = kept = None
    failed = [event.error for event in done if event.error]
    if failed or len(done) != len(work):
        raise RuntimeError(f"{len(work) - len(done)} rows missing, {len(failed)} failed: {failed[:1]}")
    return {event.key.row_id: event.text for event in done}


def differing(found: dict[str, str], expected: dict[str, str]) -> int:
    """Return how many rows differ."""
    return sum(found[row] != expected[row] for row in expected)


# ---------------------------------------------------------------------- --first: is it right?


def agree(bench: Bench, found: Found) -> None:
    """Compare logits with the library's, in float32 and bfloat16, alone and together, with both kinds of products."""
    for dtype in (torch.float32, torch.bfloat16):
        model = bench.model(dtype)
        for reproducible in (True, False):
            forward = bench.forward(bench.few, reproducible=reproducible)
            compared = compare(model, forward)
            name = f"{dtype}, reproducible = {reproducible}".removeprefix("torch.")
            found[name] = {"why": compared.why or "agrees", "same bits alone and together": compared.same_bits}
            del forward
            bench.clean()


def tokens(bench: Bench, found: Found) -> None:
    """Compare greedy and sampled texts in float32 with the library's forward pass."""
    model = bench.model(torch.float32)
    work = bench.work(max(2, bench.rows // 4))
    found["of"] = len(work)
    for name, sampling in (("greedy", Sampling(temperature=0, repetition_penalty=1.0)), ("sampled", SAMPLED)):
        library = LogitsSteps(LibraryModel(model, slots=bench.few, capacity=bench.capacity), sampling)
        expected = texts(bench.session(library, bench.few), work)
        del library
        bench.clean()
        ours = texts(bench.session(bench.steps(bench.few, reproducible=True, sampling=sampling), bench.few), work)
        found[f"{name}: rows that differ from the library's"] = differing(ours, expected)
        bench.clean()


def alongside(bench: Bench, found: Found) -> None:
    """Compare sampled texts in bfloat16 at several numbers of slots, in another order."""
    bench.model()
    work = bench.work(bench.rows)
    expected = texts(bench.session(bench.steps(bench.few, reproducible=True), bench.few), work)
    found["of"] = len(work)
    for slots in bench.counts:
        shuffled = random.Random(slots).sample(work, len(work))
        other = texts(bench.session(bench.steps(slots, reproducible=True), slots), shuffled)
        found[f"{slots} slots: rows that differ from {bench.few} slots"] = differing(other, expected)
        bench.clean()


def graphs(bench: Bench, found: Found) -> None:
    """Compare texts of recorded steps with those of launched ones."""
    bench.model()
    work, slots = bench.work(bench.rows), bench.counts[-1]
    expected = texts(bench.session(bench.steps(slots, reproducible=False), slots), work)
    bench.clean()
    began = time.perf_counter()
    steps = bench.steps(slots, reproducible=False, graphs=True)
    found["seconds to record"] = time.perf_counter() - began
    recorded = texts(bench.session(steps, slots), work)
    found |= {"rows that differ": differing(recorded, expected), "of": len(work)}


def memory(bench: Bench, found: Found) -> None:
    """Compare what a session takes with its plan."""
    bench.model()
    planned = bench.plan()
    found |= {"plan bytes": planned.bytes, "slots": planned.slots}
    bench.clean()
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = bench.reserved()
    steps = bench.steps(planned.slots, reproducible=False)
    texts(bench.session(steps, planned.slots), bench.work(bench.rows))
    took = bench.reserved() - before
    found |= {"taken bytes": took, "within": took <= planned.bytes}


def ballast(bench: Bench, found: Found) -> None:
    """Compare texts while other tensors fill the GPU, from the first row that is done to half of them."""
    model = bench.model()
    work = bench.work(bench.rows)
    slots = bench.counts[0]
    found["of"] = len(work)

    def library() -> Steps:
        return LogitsSteps(LibraryModel(model, slots=slots, capacity=bench.capacity, reproducible=True), SAMPLED)

    try:
        for name, make_steps in (("ours", lambda: bench.steps(slots, reproducible=True)), ("the library's", library)):
            expected = texts(bench.session(make_steps(), slots), work)
            bench.clean()
            session = bench.session(make_steps(), slots)
            found[f"{name}: rows that differ"] = differing(texts(session, work, bench.filling), expected)
            found[f"{name}: splits"] = session.splits
            del session
            bench.clean()
    finally:
        bench.forget()  # the library in reproducible mode changes the model


# ---------------------------------------------------------------------- --second: how fast is it?


def roofline(bench: Bench, found: Found) -> None:
    """Measure the memory's speed, and what a step could do that only reads the weights once."""
    model = bench.model()
    block = torch.empty(2**32 if bench.on_gpu else 2**20, dtype=torch.uint8, device=bench.device)
    bandwidth = 2 * len(block) / timed(bench, lambda: block.add_(1), 20)
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    found |= {"bytes a second": bandwidth, "weight bytes": weights, "seconds a step": weights / bandwidth}


def step_times(bench: Bench, found: Found) -> None:
    """Time a decode step, its draws and a prefill, by rows, launched and recorded, reproducible or not."""
    bench.model()
    for rows in bench.counts:
        for reproducible, recorded in ((False, False), (False, True), (True, False), (True, True)):
            steps = bench.steps(rows, reproducible=reproducible, graphs=recorded)
            own = [prompt._replace(max_new_tokens=bench.capacity // 8) for prompt in bench.work(rows)]
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


def draw_seconds(bench: Bench, steps: DeviceSteps, rows: int) -> float:
    """Return the seconds of the draws alone, on the logits of the newest step."""
    logits, state = steps._logits(rows), steps._state
    return timed(bench, lambda: state.draw(logits, state.active[:rows]), 30 if bench.on_gpu else 1)


def useful(bench: Bench, found: Found) -> None:
    """Measure new tokens a second of whole streams."""
    bench.model()
    work, slots = bench.work(2 * bench.counts[-1]), bench.counts[-1]
    count = sum(prompt.max_new_tokens for prompt in work)
    found["new tokens"] = count
    for name, reproducible in (("ours", False), ("ours, reproducible", True)):
        session = bench.session(bench.steps(slots, reproducible=reproducible, graphs=True), slots)
        texts(session, work[:slots])  # compiles what is left to compile
        bench.synchronize()
        began = time.perf_counter()
        texts(session, work)
        found[f"{name}: tokens a second"] = count / (time.perf_counter() - began)
        del session
        bench.clean()


def generate(bench: Bench, found: Found) -> None:
    """Measure new tokens a second of transformers' own ways to generate, on the prompts of `useful`."""
    model = bench.model()
    work = bench.work(2 * bench.counts[-1])
    count = sum(prompt.max_new_tokens for prompt in work)
    found["generate: tokens a second"] = count / static_seconds(bench, model, work)
    bench.clean()
    found["generate_batch: tokens a second"] = count / continuous_seconds(bench, model, work)


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


def continuous_seconds(bench: Bench, model: Any, work: Sequence[Prompt]) -> float:
    """Time transformers' continuous batching on the same prompts, with the mean number of new tokens."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    mean = round(statistics.mean(prompt.max_new_tokens for prompt in work))
    config = GenerationConfig(max_new_tokens=mean, do_sample=True, top_k=50, eos_token_id=-1, pad_token_id=0)
    # It takes what is free of a GPU's memory, and would take all of a CPU's.
    sizes = ContinuousBatchingConfig(**({} if bench.on_gpu else {"num_blocks": 16, "max_batch_tokens": 64}))
    ids = [list(prompt.encoded.token_ids or ()) for prompt in work]
    began = time.perf_counter()
    model.generate_batch(inputs=ids, generation_config=config, continuous_batching_config=sizes)
    return time.perf_counter() - began


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


Step = Callable[[Bench, Found], None]
FIRST: dict[str, Step] = {
    "agree": agree,
    "tokens": tokens,
    "alongside": alongside,
    "graphs": graphs,
    "memory": memory,
    "ballast": ballast,
}
SECOND: dict[str, Step] = {"roofline": roofline, "steps": step_times, "useful": useful, "generate": generate}


class TimeUp(BaseException):
    """The time is up; not an Exception, which the engine would take for a failed kernel."""


def main() -> None:
    """Run the steps that are asked for; write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help=f"steps {', '.join(FIRST)}")
    parser.add_argument("--second", action="store_true", help=f"steps {', '.join(SECOND)}")
    parser.add_argument("--only", default="", help="steps by name, separated by commas")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a rehearsal (default cuda)")
    parser.add_argument("--seconds", type=float, help="end after this (default 200 with --first alone, else 300)")
    parser.add_argument("--out", type=Path, help="write the results here, too")
    options = parser.parse_args()
    every = FIRST | SECOND
    names = [name for name in options.only.split(",") if name]
    names += [*(FIRST if options.first else ()), *(SECOND if options.second else ())]
    if unknown := [name for name in names if name not in every] or ([] if names else ["nothing asked for"]):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(every)}")
    small = options.device == "cpu"
    if small:
        rehearse(parser)
    elif not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu rehearses without one")
    bench = Bench(
        device=torch.device(options.device),
        shape=options.shape,
        capacity=24 if small else 2048,
        few=2 if small else 8,
        rows=3 if small else 48,
        new_tokens=3 if small else 128,
        counts=(3,) if small else (16, 64, 256),
    )
    name_of = torch.cuda.get_device_name(bench.device) if bench.on_gpu else "CPU, interpreted: the times mean nothing"
    results: Found = {"device": name_of, "torch": torch.__version__, "shape": options.shape, "steps": {}}
    torch.backends.cuda.matmul.allow_tf32 = False
    if bench.on_gpu:
        torch.cuda.set_device(bench.device)  # as the engine does: events and streams are those of the current device
    until = time.monotonic() + (options.seconds or (200 if options.first and not options.second else 300))
    signal.signal(signal.SIGALRM, out_of_time)
    for name in names:
        results["steps"][name] = found = guarded(every[name], bench, until)
        print(json.dumps({name: found}, indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")


def guarded(step: Step, bench: Bench, until: float) -> Found:
    """Return what a step found, why it failed, and its seconds; end it when the time is up."""
    at = time.monotonic()
    if at >= until:
        return {"left out": "no time"}
    found: Found = {}
    signal.setitimer(signal.ITIMER_REAL, until - at)
    try:
        step(bench, found)
        bench.clean()
    except TimeUp:
        found["failed"] = "the time is up"
    except Exception as error:
        found |= {"failed": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-2000:]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return found | {"seconds": round(time.monotonic() - at, 1)}


def out_of_time(*_: object) -> None:
    """Raise TimeUp in whatever the step is doing."""
    raise TimeUp


def rehearse(parser: argparse.ArgumentParser) -> None:
    """Prepare Triton's interpreter, which runs the kernels on the CPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("a rehearsal on the CPU needs TRITON_INTERPRET=1 in the environment")
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    from triton_interpreter import correct_interpreter

    correct_interpreter()
    np.seterr(all="ignore")  # a GPU computes infinities and NaN without a warning


if __name__ == "__main__":
    main()
