"""Examples -> token ids: the prompt through the very encoder of `run`, then the answer and the token that ends it.

Also decides which rows are held out: by their prompts' hashes, so that neither the order of the files nor new rows move
a row from one side to the other, and no prompt stands on both sides.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gxr_batch.errors import JobFileError, RowError, TableError
from gxr_batch.finetune.examples import Example
from gxr_batch.job import FinetuneSection
from gxr_batch.records import Messages

if TYPE_CHECKING:
    from gxr_batch.models.tokens import ChatEncoder


class TrainingRow(NamedTuple):
    """One example as the model sees it: `input_ids` begin with `prompt_tokens` ids of the prompt.

    The rest, the answer with its end, is what the loss is about.
    """

    messages: Messages
    answer: str
    input_ids: list[int]
    prompt_tokens: int

    @property
    def prompt_ids(self) -> list[int]:
        """The ids that `run` would begin to generate from."""
        return self.input_ids[: self.prompt_tokens]

    @property
    def labels(self) -> list[int]:
        """What is to be learnt at each place: the answer's own ids, its end included; -100, nothing, in the prompt."""
        return [-100] * self.prompt_tokens + self.input_ids[self.prompt_tokens :]


class Rows(NamedTuple):
    """What is trained on and what is held out; `too_long` names the places of examples that are left out."""

    training: list[TrainingRow]
    held_out: list[TrainingRow]
    too_long: list[str]

    @property
    def sha256(self) -> str:
        """One sha256 (hex) over everything that the model sees, in order."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for row in part:
                digest.update(json.dumps([row.prompt_tokens, row.input_ids]).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def encode(
    examples: Iterable[Example], encoder: ChatEncoder, max_seq_length: int
) -> tuple[list[TrainingRow], list[str]]:
    """Return the rows that fit `max_seq_length` tokens, and where those stand that do not. Raises TableError."""
    rows: list[TrainingRow] = []
    too_long: list[str] = []
    for example in examples:
        try:
            prompt = encoder.encode(example.messages).token_ids or []
            answer = encoder.encode_answer(example.answer)
        except RowError as error:
            raise TableError(
                f"A line of the training data cannot be encoded: {error.what}.",
                where=example.where,
                next_step="mend or remove it",
            ) from None
        if len(prompt) + len(answer) > max_seq_length:
            too_long.append(example.where)
        else:
            rows.append(TrainingRow(example.messages, example.answer, prompt + answer, len(prompt)))
    return rows, too_long


def steps_of(section: FinetuneSection, rows: int) -> int:
    """Return how many optimizer steps a training on so many rows takes; the last one of an epoch may be a short one."""
    if section.steps is not None:
        return section.steps
    batches = math.ceil(rows / section.batch_size)
    return max(1, math.ceil((section.epochs or 0) * math.ceil(batches / section.gradient_accumulation_steps)))


def split(rows: Sequence[TrainingRow], share: float, seed: int) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Return training rows and held-out rows, each in the given order; rows of one prompt stay together.

    Raises JobFileError where one side would be empty.
    """
    keys = [_key(row, seed) for row in rows]
    wanted = max(1, round(share * len(rows))) if share else 0
    last = sorted(keys)[wanted - 1] if 0 < wanted <= len(keys) else ""
    training = [row for row, key in zip(rows, keys, strict=True) if key > last]
    held_out = [row for row, key in zip(rows, keys, strict=True) if key <= last]
    if not training:
        raise JobFileError(
            f"There are too few rows to train on: {len(rows)}, of which {len(held_out)} would be held out.",
            where="finetune.data, finetune.held_out",
            next_step="add data, or set finetune.held_out = 0",
        )
    return training, held_out


def _key(row: TrainingRow, seed: int) -> str:
    return hashlib.sha256(json.dumps([seed, row.prompt_ids]).encode()).hexdigest()
