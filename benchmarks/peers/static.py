"""Static batches: prompts sorted by length and padded; each batch runs until its longest answer ends."""

from __future__ import annotations

from common import WARM_UP_TOKENS, check_lengths, read_task, report, timed
from library import generate, load


def main() -> None:
    """Run it."""
    task, options = read_task(__doc__, lambda parser: parser.add_argument("--batch", type=int, default=16))
    model = load(task.model)
    generate(model, task.warm_up(), WARM_UP_TOKENS)
    order = sorted(range(len(task.ids)), key=lambda row: len(task.ids[row]), reverse=True)
    batches = [order[start : start + options.batch] for start in range(0, len(order), options.batch)]
    longest = [max(task.lengths[row] for row in batch) for batch in batches]
    with timed() as clock:
        found = [
            generate(model, [task.ids[row] for row in batch], length)
            for batch, length in zip(batches, longest, strict=True)
        ]
    check_lengths(found, longest)
    computed = sum(len(batch) * length for batch, length in zip(batches, longest, strict=True))
    report(task.tokens, clock.seconds, f"{task.tokens / computed:.0%} of the computed tokens are useful")


if __name__ == "__main__":
    main()
