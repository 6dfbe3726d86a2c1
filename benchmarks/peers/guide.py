"""The guide's loop: model.generate() for one prompt after another. Runs only the first prompts, because it is slow."""

from __future__ import annotations

from common import WARM_UP_TOKENS, check_lengths, read_task, report, timed
from library import generate, load


def main() -> None:
    """Run it."""
    task, options = read_task(__doc__, lambda parser: parser.add_argument("--first", type=int, default=6))
    model = load(task.model)
    for prompt in task.warm_up():
        generate(model, [prompt], WARM_UP_TOKENS)
    ids, lengths = task.ids[: options.first], task.lengths[: options.first]
    with timed() as clock:
        found = [generate(model, [prompt], length) for prompt, length in zip(ids, lengths, strict=True)]
    check_lengths(found, lengths)
    report(sum(lengths), clock.seconds, f"first {len(ids)} prompts only")


if __name__ == "__main__":
    main()
