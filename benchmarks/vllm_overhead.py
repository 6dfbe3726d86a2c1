"""Compares our vllm engine with vLLM's offline LLM.generate, with the same prompts, seeds, lengths and arguments.

Both are open at the same time and generate alternately, so that other load on the machine affects both; an idle vLLM
takes no CPU time. Prints rows per minute of both and their ratio for each round.

    .venv-vllm/bin/python -P benchmarks/vllm_overhead.py                 # made by make test-vllm
    .venv-vllm/bin/python -P benchmarks/vllm_overhead.py --rows 16 --slots 8 --rounds 7 --eager
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gxr_batch.engines.base import Pulse, StopRequest
from gxr_batch.engines.vllm import VllmEngine, engine_args
from gxr_batch.engines.vllm.host_messages import Setup
from gxr_batch.job import Job
from gxr_batch.models.device_memory import MemoryBudget
from gxr_batch.records import Key, Messages, Prompt, Turn

CAPACITY = 1024
SHORTEST, LONGEST = 16, 64  # tokens of an answer
WORDS = ("no", "focal", "consolidation", "pleural", "effusion", "right", "left", "lower", "lobe", "opacity", "heart")


def the_job(options: argparse.Namespace) -> Job:
    """Return the job that both sides run."""
    return Job.model_validate(
        {
            "name": "overhead",
            "input": {"path": "none"},
            "model": {"path": "demo", "adapter": "none", "max_seq_length": CAPACITY},
            "engine": {"kind": "vllm", "slots": options.slots, "memory_limit": "512MiB"},
            "vllm": {"eager": options.eager},
        }
    )


def the_prompts(job: Job, rows: int) -> list[Prompt]:
    """Return prompts of about a hundred tokens, longest first as in a run, with random output lengths."""
    encoder = VllmEngine(job).encoder()
    rng = random.Random(1)
    made = []
    for row in range(rows):
        text = f"Write a teaching case. Findings: {' '.join(rng.choices(WORDS, k=rng.randint(40, 120)))}."
        messages = Messages((Turn("user", text),), "t")
        encoded = encoder.encode(messages)
        made.append(Prompt(Key(str(row), 1), messages, encoded, rng.getrandbits(31), rng.randint(SHORTEST, LONGEST)))
    return sorted(made, key=lambda prompt: -(prompt.encoded.length or 0))


def fresh(prompts: list[Prompt], number: int) -> list[Prompt]:
    """Return the prompts with a different start, so that no round hits an earlier round's prefix cache."""
    made = []
    for prompt in prompts:
        ids = prompt.encoded.token_ids or []
        encoded = prompt.encoded._replace(token_ids=[ids[0], 1000 + number, *ids[2:]])
        made.append(prompt._replace(encoded=encoded))
    return made


def of_full_length(arguments: dict[str, Any], sampling: dict[str, Any], *rest: Any) -> Setup:
    """Return a host's setup in which no answer ends before its limit."""
    return Setup(arguments, sampling | {"stop_token_ids": [], "ignore_eos": True}, *rest)


@contextmanager
def ours(job: Job) -> Iterator[Callable[[list[Prompt]], int]]:
    """Open our engine; yield a function that generates and returns the number of tokens."""
    with VllmEngine(job).open() as session:

        def generate(prompts: list[Prompt]) -> int:
            events = session.stream(iter(prompts), StopRequest())
            return sum(event.new_tokens or 0 for event in events if not isinstance(event, Pulse))

        yield generate


@contextmanager
def offline(job: Job) -> Iterator[Callable[[list[Prompt]], int]]:
    """Open vLLM's LLM class in the same way."""
    engine = VllmEngine(job)
    setup = engine_args.prepare_opening(job, engine._local.tokenizer(), MemoryBudget(job.engine)).setup
    unasked = ("skip_tokenizer_init", "disable_log_stats", "enable_log_requests")
    arguments: dict[str, Any] = {name: value for name, value in setup.arguments.items() if name not in unasked}
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(**arguments)

    def generate(prompts: list[Prompt]) -> int:
        ids = [TokensPrompt(prompt_token_ids=prompt.encoded.token_ids or []) for prompt in prompts]
        params = [
            SamplingParams(**setup.sampling, seed=prompt.row_seed, max_tokens=prompt.max_new_tokens)
            for prompt in prompts
        ]
        return sum(len(one.outputs[0].token_ids) for one in llm.generate(ids, params, use_tqdm=False))

    yield generate


def timed(generate: Callable[[list[Prompt]], int], prompts: list[Prompt]) -> float:
    """Return the seconds of a batch. Exits if it did not generate the requested number of tokens."""
    began = time.perf_counter()
    tokens = generate(prompts)
    seconds = time.perf_counter() - began
    if tokens != sum(prompt.max_new_tokens for prompt in prompts):
        raise SystemExit(f"{tokens} tokens were generated, not the requested number")
    return seconds


def main() -> None:
    """Print one line per round, and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without compiled kernels")
    options = parser.parse_args()
    os.environ.update({"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})
    engine_args.Setup = of_full_length
    job = the_job(options)
    prompts = the_prompts(job, options.rows)
    ratios = []
    with ours(job) as one, offline(job) as other:
        sides = {"ours": one, "offline": other}
        for generate in sides.values():
            generate(prompts[: options.slots])
        print(f"{'round':>5} {'ours rows/min':>14} {'offline rows/min':>17} {'ours / offline':>15}", flush=True)
        for number in range(options.rounds):
            order = sorted(sides, reverse=number % 2 == 0)
            seconds = {side: timed(sides[side], fresh(prompts, number)) for side in order}
            rates = {side: 60 * options.rows / spent for side, spent in seconds.items()}
            ratios.append(rates["ours"] / rates["offline"])
            print(f"{number + 1:>5} {rates['ours']:>14.1f} {rates['offline']:>17.1f} {ratios[-1]:>15.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
