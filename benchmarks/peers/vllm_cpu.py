"""vLLM's CPU build: LLM.generate over all prompts with separate max_tokens, ignoring end ids."""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that its memory can be read
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

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
    timed,
)


def _sampling(length: int, top_p: float) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=TEMPERATURE,
        top_p=top_p,
        top_k=TOP_K,
        repetition_penalty=REPETITION_PENALTY,
        max_tokens=length,
        ignore_eos=True,
        # No seeds: with a generator per row, vLLM samples row by row.
    )


def run(llm: Any, prompts: list[list[int]], lengths: list[int], top_p: float) -> list[int]:
    """Return the number of new tokens of each prompt."""
    from vllm import TokensPrompt

    ids = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    made = llm.generate(ids, [_sampling(length, top_p) for length in lengths], use_tqdm=False)
    return [len(one.outputs[0].token_ids) for one in made]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help="most tokens in a batch")
    parser.add_argument("--prefix", action="store_true", help="with the prefix cache")
    parser.add_argument("--no-top-p", action="store_true", help="sample without top_p: other texts, without a sort")


def main() -> None:
    """Run it."""
    task, options = read_task(__doc__, _options)
    from vllm import LLM

    llm = LLM(
        model=str(task.model),
        dtype="bfloat16",
        max_model_len=CAPACITY,
        enforce_eager=options.eager,
        max_num_seqs=options.sequences,
        max_num_batched_tokens=options.tokens,
        enable_prefix_caching=options.prefix,
        # Only whole blocks are shared, and by default one holds more tokens than these prompts have in common.
        **({"block_size": 32} if options.prefix else {}),
    )
    warm_up, top_p = task.warm_up(), 1.0 if options.no_top_p else TOP_P
    run(llm, warm_up, [WARM_UP_TOKENS] * len(warm_up), top_p)
    with timed() as clock:
        found = run(llm, task.ids, task.lengths, top_p)
    check_lengths(found, task.lengths)
    how = [
        "eager" if options.eager else "compiled",
        f"{options.sequences} sequences",
        f"{options.tokens} tokens a batch",
        *(["prefix cache"] if options.prefix else []),
        *(["without top_p"] if options.no_top_p else []),
    ]
    report(task.tokens, clock.seconds, ", ".join(how))


if __name__ == "__main__":
    main()
