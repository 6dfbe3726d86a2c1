"""The echo engine: no model, no device, the same protocol. It repeats the prompt's words.

Texts depend only on the prompt and its row seed. Words count as tokens, so that everything around an engine can be
tried, tested and timed without one. With a form, the words are divided among its sections.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gxr_batch.engines.base import EngineInfo, Identity, Pulse, StopRequest
from gxr_batch.forms import Form, composed, form_of
from gxr_batch.job import EchoSection, Job
from gxr_batch.records import Completion, Encoded, FinishReason, Messages, Prompt

_SLOTS = 8
_PULSE_SECONDS = 0.5
_TICK_SECONDS = 0.05
_BULLETS = 3
_NUMBERS = 10


class EchoEncoder:
    """Counts the words of a prompt."""

    def encode(self, messages: Messages) -> Encoded:
        """Return the count of words; there are no ids."""
        return Encoded(None, sum(len(turn.text.split()) for turn in messages.turns))


class EchoEngine:
    """Opens at once and answers with the prompt's words."""

    def __init__(self, job: Job) -> None:
        self._slots = _SLOTS if job.engine.slots == "auto" else job.engine.slots
        self._settings, self._form = job.echo, form_of(job)

    def identity(self) -> Identity:
        """Return an identity without weights."""
        return Identity(kind="echo", model="echo")

    def encoder(self) -> EchoEncoder:
        """Return the word counter."""
        return EchoEncoder()

    @contextmanager
    def open(self, until: float = float("inf")) -> Iterator[EchoSession]:
        """Open at once."""
        info = EngineInfo(
            identity=self.identity(),
            device="none",
            dtype=None,
            quantization=None,
            slots=self._slots,
            load_seconds=0.0,
            reproducible=True,
            notices=("The echo engine repeats the prompt; its texts are not teaching cases.",),
        )
        yield EchoSession(info, self._settings, self._form)


@dataclass
class _InFlight:
    """A row being decoded: `ends_at` is on the monotonic clock."""

    prompt: Prompt
    words: list[str]
    taken_at: float
    started_at_ms: int
    ends_at: float
    share: float = 0.0
    row_steps: int = 0
    steps: int = 0


class EchoSession:
    """Rows decoded side by side in slots, each at its own speed, in simulated time or at once."""

    def __init__(self, info: EngineInfo, settings: EchoSection, form: Form | None = None) -> None:
        self.info = info
        self._settings, self._form = settings, form
        self._tokens = 0

    def stream(self, prompts: Iterator[Prompt], stop: StopRequest) -> Iterator[Completion | Pulse]:
        """Answer every prompt."""
        flight: list[_InFlight] = []
        clock = pulsed = time.monotonic()
        exhausted = False
        while True:
            while not exhausted and len(flight) < self.info.slots and stop.admitting:
                prompt = next(prompts, None)
                if prompt is None:
                    exhausted = True
                else:
                    flight.append(self._admit(prompt))
            now = time.monotonic()
            self._charge(flight, now - max(clock, flight[-1].taken_at) if flight else 0.0)
            clock = now
            if stop.must_return(now) or not flight:
                return
            ended = [row for row in flight if row.ends_at <= now]
            flight = [row for row in flight if row.ends_at > now]
            for row in ended:
                pulsed = now
                yield self._complete(row, now)
            if now - pulsed >= _PULSE_SECONDS:
                pulsed = now
                yield Pulse(self._tokens, len(flight))
            if not ended:
                time.sleep(min(_TICK_SECONDS, max(0.0, min(row.ends_at for row in flight) - now)))

    def _admit(self, prompt: Prompt) -> _InFlight:
        now = time.monotonic()
        # Digits in groups: ten in a row would look like a record number to identifier screening.
        words = f"[echo {prompt.row_seed:,}] {prompt.messages.turns[-1].text}".split()
        speed = self._settings.tokens_per_second
        seconds = min(len(words), prompt.max_new_tokens) / speed if speed else 0.0
        return _InFlight(prompt, words, now, int(time.time() * 1000), now + seconds)

    @staticmethod
    def _charge(flight: list[_InFlight], seconds: float) -> None:
        for row in flight:
            row.share += seconds / len(flight)
            row.row_steps += len(flight)
            row.steps += 1

    def _complete(self, row: _InFlight, now: float) -> Completion:
        prompt = row.prompt
        kept = row.words[: prompt.max_new_tokens]
        seconds = now - row.taken_at
        self._tokens += len(kept)
        text, whole = " ".join(kept), len(kept) == len(row.words)
        finish: FinishReason = "stop" if whole else "length"
        cut: tuple[int, ...] = ()
        if self._form is not None:
            text, worded = _in_sections(self._form, kept, prompt.row_seed)
            cut = () if whole else worded[-1:]
            finish = "closed" if cut else "stop"
        if prompt.on_text and text:
            prompt.on_text(text)
        return Completion(
            key=prompt.key,
            text=text,
            finish_reason=finish,
            error=None,
            prompt_tokens=prompt.encoded.length,
            new_tokens=len(kept),
            seconds_queued=0.0,
            seconds_to_first_token=seconds / max(len(kept), 1),
            seconds_generating=seconds,
            seconds_share=row.share,
            rows_in_batch=row.row_steps / row.steps,
            started_at_ms=row.started_at_ms,
            finished_at_ms=int(time.time() * 1000),
            cut_sections=cut,
        )


def _in_sections(form: Form, words: Sequence[str], seed: int) -> tuple[str, tuple[int, ...]]:
    """Return a text of the form, and which sections hold the words; choices and numbers come from the row seed."""
    worded = tuple(at for at, part in enumerate(form.parts) if part.kind in {"text", "line", "bullets"})
    contents: list[str | list[str] | float] = []
    for at, part in enumerate(form.parts):
        if part.kind == "choice":
            contents.append(part.choices[seed % len(part.choices)])
        elif part.kind == "number":
            contents.append(float(seed % _NUMBERS))
        else:
            own = _share(words, worded.index(at), len(worded)) or ["[echo]"]
            items = [" ".join(_share(own, item, _BULLETS)) for item in range(_BULLETS)]
            contents.append(items if part.kind == "bullets" else " ".join(own))
    return composed(form, contents), worded


def _share(words: Sequence[str], at: int, shares: int) -> Sequence[str]:
    """Return one of as many consecutive, nearly equal shares of the words."""
    return words[len(words) * at // shares : len(words) * (at + 1) // shares]
