"""vLLM's CPU build: LLM.generate over all prompts, each with its own max_tokens, end ids ignored."""

from __future__ import annotations

import os

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


def main() -> None:
    """Run it."""
    task, options = read_task(__doc__, lambda parser: parser.add_argument("--eager", action="store_true"))
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model=str(task.model), dtype="bfloat16", max_model_len=CAPACITY, enforce_eager=options.eager)

    def run(prompts: list[list[int]], lengths: list[int], seeds: list[int]) -> list[int]:
        sampling = [
            SamplingParams(
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=TOP_K,
                repetition_penalty=REPETITION_PENALTY,
                max_tokens=length,
                ignore_eos=True,
                seed=seed if options.seeds else None,
            )
            for length, seed in zip(lengths, seeds, strict=True)
        ]
        made = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
        return [len(one.outputs[0].token_ids) for one in made]

    options.seeds = False  # a generator for each row makes vLLM sample row by row
    run(task.warm_up(), [WARM_UP_TOKENS] * len(task.warm_up()), task.seeds)
    with timed() as clock:
        found = run(task.ids, task.lengths, task.seeds)
    check_lengths(found, task.lengths)
    report(task.tokens, clock.seconds, "eager" if options.eager else "compiled")


if __name__ == "__main__":
    main()
