"""Continuous batching of transformers, which ignores repetition_penalty and so does a little less than the others."""

from __future__ import annotations

import time
from typing import Any

from common import WARM_UP_TOKENS, check_lengths, read_task, report, skip, timed
from library import load, sampling
from transformers import ContinuousBatchingConfig, GenerationConfig

NO_END = -1


def run(manager: Any, prompts: list[list[int]], lengths: list[int], limit_seconds: float) -> list[int]:
    """Return the number of new tokens of each prompt. Raises RuntimeError if the manager fails."""
    names = {
        manager.add_request(ids, max_new_tokens=length, eos_token_id=NO_END): row
        for row, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
    }
    found = [0] * len(prompts)
    deadline = time.monotonic() + limit_seconds
    for _ in names:
        while (result := manager.get_result(timeout=1)) is None or not result.is_finished():
            if not manager.is_running() or time.monotonic() > deadline:
                raise RuntimeError("the generation thread ended or hung")
        if result.error:
            raise RuntimeError(str(result.error).strip().splitlines()[-1])
        found[names[result.request_id]] = len(result.generated_tokens)
    return found


def main() -> None:
    """Run it."""
    task, _ = read_task(__doc__)
    model = load(task.model)
    blocks = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=256)
    settings = GenerationConfig(**sampling(), eos_token_id=NO_END, max_new_tokens=256)
    try:
        with model.continuous_batching_context_manager(settings, continuous_batching_config=blocks) as manager:
            run(manager, task.warm_up(), [WARM_UP_TOKENS] * len(task.warm_up()), 120)
            with timed() as clock:
                found = run(manager, task.ids, task.lengths, 1800)
    except Exception as error:  # unsupported devices fail in many ways
        skip(f"does not run here: {type(error).__name__}: {str(error)[:120]}")
        return
    check_lengths(found, task.lengths)
    report(task.tokens, clock.seconds, "without repetition_penalty, which it ignores")


if __name__ == "__main__":
    main()
