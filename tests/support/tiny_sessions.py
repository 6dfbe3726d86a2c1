"""Sessions of the slots engine on tiny models, whose texts are their token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tiny import VOCAB

from gxr_batch.engines.base import EngineInfo, Identity, StopRequest
from gxr_batch.engines.slots.backend import Backend
from gxr_batch.engines.slots.decode_loop import TransformersSession
from gxr_batch.engines.slots.row_steps import LogitsSteps
from gxr_batch.job.sampling import Sampling
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt

CAPACITY = 1200


GREEDY = Sampling(temperature=0, repetition_penalty=1.0)


class Ids:
    """Decodes ids to their numbers, so that texts can be compared without a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def info_of(slots: int) -> EngineInfo:
    """Return what an engine of a tiny model says of itself."""
    return EngineInfo(
        identity=Identity(kind="transformers", model="tiny"),
        device="cpu",
        dtype=None,
        quantization=None,
        slots=slots,
        load_seconds=0,
        reproducible=True,
    )


def session(
    backend: Backend, slots: int, sampling: Sampling, end_ids=frozenset(), *, tokenizer=None, form=None
) -> TransformersSession:
    return TransformersSession(
        info_of(slots), LogitsSteps(backend, sampling), tokenizer or Ids(), frozenset(end_ids), form=form
    )


def prompt(name: str, ids: list[int], new: int = 24, seed: int = 0, shared: int = 0) -> Prompt:
    return Prompt(Key(name, 1), Messages((), "t"), Encoded(ids, len(ids), shared), seed, new)


def prompts(lengths: Sequence[int], new: int = 24, vocab: int = VOCAB) -> list[Prompt]:
    rng = random.Random(5)
    return [
        prompt(f"r{index}", [rng.randrange(3, vocab) for _ in range(length)], new, seed=index * 7919)
        for index, length in enumerate(lengths)
    ]


def complete(made: TransformersSession, work: Sequence[Prompt]) -> dict[str, Completion]:
    events = made.stream(iter(work), StopRequest())
    done = [event for event in events if isinstance(event, Completion)]
    assert len(done) == len(work)
    return {completion.key.row_id: completion for completion in done}


def texts(made: TransformersSession, work: Sequence[Prompt]) -> dict[str, str]:
    return {name: completion.text for name, completion in complete(made, work).items()}
