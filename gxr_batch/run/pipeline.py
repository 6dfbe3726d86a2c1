"""Turns rows that are still to do into prompts, and what comes back into results.

Rows that cannot become a prompt are booked as failed with their reason and never reach the engine; nor do those that
identifier screening holds.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gxr_batch.engines.base import Encoder
from gxr_batch.errors import RowError
from gxr_batch.job import Job, Screening
from gxr_batch.ledger import HELD, TODO, RunWriter
from gxr_batch.ledger.state import Bools
from gxr_batch.prompts import Templates
from gxr_batch.prompts.render import messages_sha256, render, row_template
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt, Result, Row, Status
from gxr_batch.rows.table_reader import read_rows
from gxr_batch.run.planning import longest_first, row_seed
from gxr_batch.run.prepare import Prepared
from gxr_batch.text_checks.flags import NOT_COMPUTED, Evidence, flags_of
from gxr_batch.text_checks.identifiers import identifiers_in
from gxr_batch.text_checks.screening import IN_INPUT, IN_OUTPUT, Screen, flags, reason

TRUNCATED = "findings_truncated"


class Fitted(NamedTuple):
    """A prompt that fits, the sha256 of its turns, and what the reviewer should know of how it was made."""

    messages: Messages
    encoded: Encoded
    sha256: str
    flags: tuple[str, ...] = ()

    def flagged(self, *flags: str) -> Fitted:
        """Return the same with more flags."""
        return self._replace(flags=self.flags + flags) if flags else self


class Fitter:
    """Fits the rows of one job. Raises RowError for a row that cannot become a prompt, and for nothing else."""

    def __init__(self, templates: Templates, job: Job, encoder: Encoder) -> None:
        self._templates, self._encoder = templates, encoder
        self._system, self._truncates = job.prompt.system, job.prompt.too_long == "truncate"
        self._room = job.model.max_seq_length - job.sampling.settings().max_new_tokens

    def fit(self, row: Row) -> Fitted:
        """Return the row's prompt. Raises RowError."""
        try:
            return self._fit(row)
        except RowError:
            raise
        except Exception as error:  # a bug, or a cell that nobody thought of: one row must not cost the night
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__}, {Path(place.filename).name} line {place.lineno}"
            raise RowError(f"the prompt could not be made ({where})") from None

    def _fit(self, row: Row) -> Fitted:
        messages, encoded = self._attempt(row, row.values)
        if self._too_long(encoded):
            if not self._truncates:
                raise RowError(
                    f"the prompt is too long: {encoded.length} tokens, and model.max_seq_length - "
                    f"sampling.max_new_tokens leaves room for {self._room}"
                )
            messages, encoded = self._cut(row)
            return Fitted(messages, encoded, messages_sha256(messages), (TRUNCATED,))
        return Fitted(messages, encoded, messages_sha256(messages))

    def _attempt(self, row: Row, values: Mapping[str, Any]) -> tuple[Messages, Encoded]:
        messages = render(row_template(self._templates, row.template), values, system=self._system)
        return messages, self._encoder.encode(messages)

    def _too_long(self, encoded: Encoded) -> bool:
        return encoded.length is not None and encoded.length > self._room

    def _cut(self, row: Row) -> tuple[Messages, Encoded]:
        """Return the prompt with as many words of its longest cell as fit."""
        texts = {name: value for name, value in row.values.items() if isinstance(value, str)}
        longest = max(texts, key=lambda name: len(texts[name]), default="")
        text = texts.get(longest, "").strip()
        ends = [gap.start() for gap in re.finditer(r"\s+", text)]
        fitting = None
        low, high = 0, len(ends)  # the first `low` ends are known to fit or not yet tried, those from `high` do not
        while low < high:
            middle = (low + high) // 2
            tried = self._attempt(row, {**row.values, longest: text[: ends[middle]]})
            if self._too_long(tried[1]):
                high = middle
            else:
                fitting, low = tried, middle + 1
        if fitting is None:
            raise RowError(f"the prompt is too long even with one word of {longest or 'its cells'}")
        return fitting


# Engines that hold their rows in other processes: what kills this one is no row.
_APART = frozenset({"api", "vllm", "ray"})
_NO_PROMPT = Fitted(Messages((), ""), Encoded(None, None), "")


class _Taken(NamedTuple):
    """What a result needs of a prompt that an engine holds."""

    row: Row
    attempt: int
    prompt: Prompt
    fitted: Fitted
    screening: Screening = "off"


class Feed:
    """The rows of one invocation on their way to the engine and back."""

    def __init__(self, prepared: Prepared, job: Job, encoder: Encoder, ledger: RunWriter, todo: Bools) -> None:
        self._prepared, self._job, self._ledger, self._todo = prepared, job, ledger, todo
        self._fitter = Fitter(prepared.templates, job, encoder)
        self._screen = Screen(prepared.templates, prepared.fields.templates, job)
        self._released = ledger.manifest.released() if ledger.manifest else frozenset()
        self._held: Bools = np.any(ledger.state.status == HELD, axis=1)  # before this start: it may release some
        self._seed = int(job.sampling.seed)
        self._max_new_tokens = job.sampling.settings().max_new_tokens
        self._deadly = job.engine.kind not in _APART
        self._in_flight: dict[Key, _Taken] = {}
        self._suspects, self._condemned = ledger.in_flight.begin(*self._known_to_the_ledger(ledger.in_flight.known))
        self._alone: list[_Taken] = []
        self.rejected = self.withheld = self.cut = 0
        self.seconds = 0.0
        self._flag_faults: set[str] = set()

    @property
    def in_flight(self) -> int:
        """How many prompts the engine took and has not returned."""
        return len(self._in_flight)

    @property
    def condemned(self) -> frozenset[Key]:
        """The keys that are given up, because the process died over them twice."""
        return self._condemned

    @property
    def suspects(self) -> int:
        """How many keys were in the engine when the process died before."""
        return len(self._suspects)

    def rounds(self) -> Iterator[Iterator[Prompt]]:
        """Yield the prompts, longest first within each window of input order; then every suspect in a round alone."""
        yield self._hand_out(
            longest_first(self._encoded(), self._job.engine.window, lambda taken: taken.prompt.encoded.length or 0)
        )
        if self._alone:
            self._ledger.seal()  # what is done by now must not die with the next suspect
        for taken in self._alone:
            yield self._hand_out(iter([taken]))

    def _hand_out(self, ordered: Iterator[_Taken]) -> Iterator[Prompt]:
        while True:
            began = time.perf_counter()
            taken = next(ordered, None)
            if taken is not None:
                self._in_flight[taken.prompt.key] = taken
                self.cut += TRUNCATED in taken.fitted.flags
                self._ledger.in_flight.take(taken.prompt.key, deadly=self._deadly)
            self.seconds += time.perf_counter() - began
            if taken is None:
                return
            yield taken.prompt

    def settle(self, completion: Completion) -> tuple[int, Result]:
        """Return the row's position and the result that a completion makes of it."""
        taken = self._in_flight.pop(completion.key)
        self._ledger.in_flight.settle(completion.key)
        error = completion.error
        if error is None and not completion.text.strip():
            error = "the model returned empty text"
        if error is not None:
            return taken.row.position, self._result(taken, completion, "failed", error)
        hits = identifiers_in(completion.text) if taken.screening != "off" else ()
        taken = taken._replace(fitted=taken.fitted.flagged(*flags(IN_OUTPUT, hits)))
        if hits and taken.screening == "hold":
            return taken.row.position, self._result(taken, completion, "held", reason(IN_OUTPUT, hits))
        taken = taken._replace(fitted=taken.fitted.flagged(*self._flags(taken, completion)))
        return taken.row.position, self._result(taken, completion, "ok", None)

    def _encoded(self) -> Iterator[_Taken]:
        wanted: Bools = np.any(self._todo, axis=1)
        for row in read_rows(self._ledger.folder / "input.parquet", self._prepared.fields, wanted):
            samples = [int(sample) + 1 for sample in np.flatnonzero(self._todo[row.position])]
            if killers := [sample for sample in samples if Key(row.row_id, sample) in self._condemned]:
                self._reject(row, killers, RowError("crashed the process"))
                samples = [sample for sample in samples if sample not in killers]
            try:
                fitted = self._fitter.fit(row) if samples else _NO_PROMPT
            except RowError as error:
                self._reject(row, samples, error)
                continue
            screening = self._screening(row)
            hits = self._screen.of_row(row, fitted.messages) if samples and screening != "off" else ()
            fitted = fitted.flagged(*flags(IN_INPUT, hits))
            if hits and screening == "hold":
                self._withhold(row, samples, fitted, reason(IN_INPUT, hits))
                continue
            for sample in samples:
                taken = self._take(row, sample, fitted)._replace(screening=screening)
                if taken.prompt.key in self._suspects:
                    self._alone.append(taken)
                else:
                    yield taken

    def _screening(self, row: Row) -> Screening:
        """Return what a hit does to this row: one that is held stays so until a person releases it."""
        if (row.row_id, row.content_hash) in self._released:
            return "off" if self._screen.mode == "off" else "flag"
        return "hold" if self._held[row.position] else self._screen.mode

    def _known_to_the_ledger(self, keys: Sequence[Key]) -> tuple[set[Key], set[Key]]:
        """Return which of these keys have no result yet, and which of those this invocation wants.

        Rows that are not in the table now, as under --limit, may come back.
        """
        at = self._ledger.positions_of([key.row_id for key in keys]) if keys else {}
        state = self._ledger.state
        here = {
            key: (at[key.row_id], key.sample - 1) for key in keys if key.row_id in at and key.sample <= state.samples
        }
        finished = {key for key, place in here.items() if state.status[place] != TODO}
        return set(keys) - finished, {key for key in here if key not in finished and self._todo[here[key]]}

    def _take(self, row: Row, sample: int, fitted: Fitted) -> _Taken:
        attempt = int(self._ledger.state.attempt[row.position, sample - 1]) + 1
        seed = row_seed(self._seed, row.row_id, sample, attempt)
        prompt = Prompt(Key(row.row_id, sample), fitted.messages, fitted.encoded, seed, self._max_new_tokens)
        return _Taken(row, attempt, prompt, fitted)

    def _reject(self, row: Row, samples: Sequence[int], error: RowError) -> None:
        """Book samples of a row that is not to be generated as failed."""
        for sample in samples:
            self._keep_back(self._take(row, sample, _NO_PROMPT), "failed", error.what)
            self.rejected += 1

    def _withhold(self, row: Row, samples: Sequence[int], fitted: Fitted, error: str) -> None:
        """Book samples of a row that no engine may see as held.

        That is no attempt: once released, the row gets the attempts, the seed and so the text that it would have had.
        """
        for sample in samples:
            taken = self._take(row, sample, fitted)
            self._keep_back(taken._replace(attempt=taken.attempt - 1), "held", error)
            self.withheld += 1

    def _keep_back(self, taken: _Taken, status: Status, error: str) -> None:
        """Book a key that never comes to the engine."""
        now = int(time.time() * 1000)
        length = taken.fitted.encoded.length
        completion = Completion(taken.prompt.key, "", "error", error, length, 0, 0.0, None, 0.0, 0.0, 0.0, now, now)
        self._ledger.add(taken.row.position, self._result(taken, completion, status, error))

    def _result(self, taken: _Taken, completion: Completion, status: Status, error: str | None) -> Result:
        row, prompt = taken.row, taken.prompt
        text = completion.text if status != "failed" and completion.text else None
        generated = completion.rows_in_batch > 0
        seconds, tokens = completion.seconds_generating, completion.new_tokens
        return Result(
            row_id=row.row_id,
            sample=prompt.key.sample,
            content_hash=row.content_hash,
            status=status,
            text=text,
            finish_reason=completion.finish_reason if text is not None else "error",
            error=error,
            flags=list(taken.fitted.flags),
            prompt_tokens=completion.prompt_tokens,
            new_tokens=tokens,
            max_new_tokens=prompt.max_new_tokens,
            seed=prompt.row_seed,
            attempt=taken.attempt,
            seconds_queued=completion.seconds_queued if generated else None,
            seconds_to_first_token=completion.seconds_to_first_token,
            seconds_generating=seconds if generated else None,
            seconds_share=completion.seconds_share if generated else None,
            tokens_per_second=tokens / seconds if seconds > 0 and tokens is not None else None,
            rows_in_batch=completion.rows_in_batch if generated else None,
            started_at=completion.started_at_ms,
            finished_at=completion.finished_at_ms,
            template=row.template,
            prompt_sha256=taken.fitted.sha256 or None,
        )

    def _flags(self, taken: _Taken, completion: Completion) -> list[str]:
        """Return the flags of a generated text. A rule that fails is a bug, and must not cost the night its rows."""
        end: Literal["stop", "length"] = "length" if completion.finish_reason == "length" else "stop"
        prompt = taken.fitted.messages.turns[-1].text
        try:
            # Screening has flags of its own, by rule, and may be switched off: nothing is left to ask here.
            return flags_of(Evidence(completion.text, prompt, taken.row.values, end, identifiers=()))
        except Exception as error:
            kind = type(error).__name__
            if kind not in self._flag_faults:  # once a start: it may meet every row
                self._flag_faults.add(kind)
                key = taken.prompt.key
                self._ledger.log.event(NOT_COMPUTED, row_id=key.row_id, sample=key.sample, error=kind)
            return [NOT_COMPUTED]
