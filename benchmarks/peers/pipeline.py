"""pipeline("text-generation", batch_size=16) in input order; each batch runs until its longest answer ends."""

from __future__ import annotations

from common import WARM_UP_TOKENS, check_lengths, read_task, report, timed
from library import PAD, load
from transformers import AutoTokenizer, pipeline

BATCH = 16


def main() -> None:
    """Run it."""
    task, _ = read_task(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(task.model, padding_side="left")
    tokenizer.pad_token_id = PAD
    pipe = pipeline("text-generation", model=load(task.model), tokenizer=tokenizer, batch_size=BATCH)

    def run(texts: list[str], new_tokens: int) -> list[int]:
        # The texts have their control tokens already. The results have the padded prompt and the answer.
        made = pipe(texts, max_new_tokens=new_tokens, return_tensors=True, add_special_tokens=False)
        width = max(map(len, tokenizer(texts, add_special_tokens=False).input_ids))
        return [len(one["generated_token_ids"]) - width for (one,) in made]

    run(tokenizer.batch_decode(task.warm_up()), WARM_UP_TOKENS)
    found: list[int] = []
    wanted: list[int] = []
    with timed() as clock:
        for start in range(0, len(task.texts), BATCH):
            texts, longest = task.texts[start : start + BATCH], max(task.lengths[start : start + BATCH])
            found += run(texts, longest)
            wanted += [longest] * len(texts)
    check_lengths(found, wanted)
    report(task.tokens, clock.seconds, f"{task.tokens / sum(wanted):.0%} of the computed tokens are useful")


if __name__ == "__main__":
    main()
