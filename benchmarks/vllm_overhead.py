"""What our vllm engine costs over vLLM's own offline LLM.generate: the same prompts, seeds, lengths and arguments.

Each measurement opens vLLM anew in a process of its own, ours and theirs in turn, since one that is open beside the
other takes its memory; only generating is timed, after a warm-up. Prints both and the ratio for each round.

    .venv-vllm/bin/python benchmarks/vllm_overhead.py                 # made by make test-vllm
    .venv-vllm/bin/python benchmarks/vllm_overhead.py --rows 32 --slots 16 --rounds 5 --eager
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from gxr_batch.engines.base import Pulse, StopRequest
from gxr_batch.engines.vllm import VllmEngine, opening
from gxr_batch.job import Job
from gxr_batch.models.room import Room
from gxr_batch.records import Key, Messages, Prompt, Turn

CAPACITY = 1024
SHORTEST, LONGEST = 16, 96  # tokens of an answer
WARM_UP = 4
WORDS = ("no", "focal", "consolidation", "pleural", "effusion", "right", "left", "lower", "lobe", "opacity", "heart")


def the_job(options: argparse.Namespace) -> Job:
    """Return the job that both sides run."""
    return Job.model_validate(
        {
            "name": "overhead",
            "input": {"path": "none"},
            "model": {"path": "demo", "max_seq_length": CAPACITY},
            "engine": {"kind": "vllm", "slots": options.slots, "memory_limit": "768MiB"},
            "vllm": {"eager": options.eager},
        }
    )


def the_prompts(job: Job, rows: int) -> list[Prompt]:
    """Return prompts of about a hundred tokens, longest first as a run orders them, each with its own length."""
    encoder = VllmEngine(job).encoder()
    rng = random.Random(1)
    made = []
    for row in range(rows + WARM_UP):
        text = f"Write a teaching case. Findings: {' '.join(rng.choices(WORDS, k=rng.randint(40, 120)))}."
        messages = Messages((Turn("user", text),), "t")
        encoded = encoder.encode(messages)
        made.append(Prompt(Key(str(row), 1), messages, encoded, rng.getrandbits(31), rng.randint(SHORTEST, LONGEST)))
    return sorted(made, key=lambda prompt: -(prompt.encoded.length or 0))


def ours(job: Job, prompts: list[Prompt]) -> tuple[float, int]:
    """Return the seconds of our stream, and the tokens that it made."""
    opening.end_ids_of = lambda section, tokenizer: ()  # every answer has its full length
    with VllmEngine(job).open() as session:
        list(session.stream(iter(prompts[:WARM_UP]), StopRequest()))
        began = time.perf_counter()
        events = list(session.stream(iter(prompts[WARM_UP:]), StopRequest()))
        seconds = time.perf_counter() - began
    return seconds, sum(event.new_tokens or 0 for event in events if not isinstance(event, Pulse))


def offline(job: Job, prompts: list[Prompt]) -> tuple[float, int]:
    """Return the seconds of LLM.generate, and the tokens that it made."""
    engine = VllmEngine(job)
    setup = opening.prepare_opening(job, engine._local.tokenizer(), Room(job.engine)).setup
    unasked = ("skip_tokenizer_init", "disable_log_stats", "enable_log_requests")
    arguments: dict[str, Any] = {name: value for name, value in setup.arguments.items() if name not in unasked}
    sampling = {name: value for name, value in setup.sampling.items() if name != "stop_token_ids"}
    from vllm import LLM, SamplingParams, TokensPrompt

    def generate(some: list[Prompt]) -> list[Any]:
        params = [
            SamplingParams(**sampling, seed=p.row_seed, max_tokens=p.max_new_tokens, ignore_eos=True) for p in some
        ]
        return llm.generate(
            [TokensPrompt(prompt_token_ids=p.encoded.token_ids or []) for p in some], params, use_tqdm=False
        )

    llm = LLM(**arguments)
    generate(prompts[:WARM_UP])
    began = time.perf_counter()
    made = generate(prompts[WARM_UP:])
    return time.perf_counter() - began, sum(len(one.outputs[0].token_ids) for one in made)


def one(side: str, options: argparse.Namespace) -> None:
    """Measure one side in this process."""
    job = the_job(options)
    prompts = the_prompts(job, options.rows)
    seconds, tokens = {"ours": ours, "offline": offline}[side](job, prompts)
    if tokens != sum(prompt.max_new_tokens for prompt in prompts[WARM_UP:]):
        raise SystemExit(f"{side}: {tokens} tokens are not what was asked for")
    print(json.dumps(seconds), flush=True)


def measured(side: str) -> float:
    """Measure one side in a process of its own."""
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", __file__, *sys.argv[1:], "--one", side],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env=environment,
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line a round, and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without compiled kernels")
    parser.add_argument("--one", choices=["ours", "offline"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(options.one, options)
    ratios = []
    print(f"{'round':>5} {'ours rows/min':>14} {'offline rows/min':>17} {'ours / offline':>15}")
    for number in range(options.rounds):
        order = ("ours", "offline") if number % 2 == 0 else ("offline", "ours")
        seconds = {side: measured(side) for side in order}
        rates = {side: 60 * options.rows / taken for side, taken in seconds.items()}
        ratios.append(rates["ours"] / rates["offline"])
        print(f"{number + 1:>5} {rates['ours']:>14.1f} {rates['offline']:>17.1f} {ratios[-1]:>15.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}")
    return None


if __name__ == "__main__":
    main()
