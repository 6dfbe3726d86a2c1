"""How good an adapter is on held-out rows: losses, and a few prompts answered by base model and adapter.

Answers are greedy, by the project's engine. What evaluation.json holds is decided here; the model card quotes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gxr_batch.engines.base import Pulse, StopRequest
from gxr_batch.engines.generate.session import GenerateSession
from gxr_batch.errors import EngineFailed
from gxr_batch.finetune.examples import TrainingRow
from gxr_batch.job import Job
from gxr_batch.models.device_memory import MemoryBudget
from gxr_batch.models.load_weights import LoadedModel
from gxr_batch.records import DISCLAIMER, Completion, Encoded, Identity, Key, Prompt


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered: its text, why it ended (stop, length), and its tokens, the end included."""

    text: str
    finish_reason: str
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out row: its prompt, the answer in the data, and what both models answer."""

    prompt: str
    reference: str
    base: Answer
    adapter: Answer


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the adapter does on rows that it never saw. Losses are means over answers, None where no row is held out."""

    held_out_rows: int
    loss_before: float | None
    loss_after: float | None
    samples: Sequence[Sample]
    history: Sequence[Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Return what evaluation.json holds."""
        curve = [
            {name: entry[name] for name in ("step", "epoch", "loss", "eval_loss", "learning_rate") if name in entry}
            for entry in self.history
            if "loss" in entry or "eval_loss" in entry
        ]
        return {
            "held_out_rows": self.held_out_rows,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "samples": [asdict(sample) for sample in self.samples],
            "curve": curve,
            "ai_generated": True,
            "disclaimer": DISCLAIMER,
        }


class Sampler:
    """Answers rows with one loaded model, its adapter switched on or off."""

    def __init__(self, job: Job, identity: Identity, tokenizer: Any, loaded: LoadedModel, memory: MemoryBudget) -> None:
        self._greedy = job.with_values({"sampling.temperature": 0, "engine.slots": max(1, job.finetune.sample_rows)})
        self._identity, self._tokenizer, self._loaded, self._memory = identity, tokenizer, loaded, memory

    def sample(self, rows: Sequence[TrainingRow], model: Any, stop: StopRequest) -> list[Sample]:
        """Return the first rows that leave room for an answer, answered twice; none where `stop` ended it first."""
        most = self._greedy.sampling.settings().max_new_tokens
        room = self._greedy.model.max_seq_length - most
        chosen = [row for row in rows if row.prompt_tokens <= room][: self._greedy.finetune.sample_rows]
        with model.disable_adapter():
            base = self._answers(chosen, model, most, stop)
        adapted = self._answers(chosen, model, most, stop)
        if min(len(base), len(adapted)) < len(chosen):
            return []
        return [
            Sample(prompt=row.messages.turns[-1].text, reference=row.answer, base=base[at], adapter=adapted[at])
            for at, row in enumerate(chosen)
        ]

    def _answers(self, rows: Sequence[TrainingRow], model: Any, most: int, stop: StopRequest) -> dict[int, Answer]:
        prompts = [
            Prompt(Key(str(at), 1), row.messages, Encoded(row.prompt_ids, row.prompt_tokens), 0, most)
            for at, row in enumerate(rows)
        ]
        session = GenerateSession(
            self._greedy, self._identity, self._tokenizer, replace(self._loaded, model=model), self._memory
        )
        answers = {}
        try:
            for event in session.stream(iter(prompts), stop):
                if not isinstance(event, Pulse):
                    answers[int(event.key.row_id)] = _answer(event)
        finally:
            session.close()
        return answers


def _answer(done: Completion) -> Answer:
    if done.error is not None:
        raise EngineFailed(f"A sample of the trained model failed: {done.error}.", next_step="run the command again")
    return Answer(text=done.text, finish_reason=done.finish_reason, new_tokens=done.new_tokens or 0)
