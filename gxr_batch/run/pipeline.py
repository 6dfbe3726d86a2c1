"""The path of a row: from its cells to a prompt that fits the model, and from the engine's output to a result.

Yields the outcome of each row: a prompt (`Work`), or a result that needs no engine (`Kept`), if the row cannot become a
prompt, identifier screening holds it, or it is given up. Reads the run's state and writes nothing: the runner hands out
prompts, records results and seals parts.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from gxr_batch.engines.base import Encoder
from gxr_batch.engines.suspects import CRASHED, Suspects
from gxr_batch.errors import MachineError, RowError
from gxr_batch.forms import parts_of, sections_of
from gxr_batch.job import Job, Screening
from gxr_batch.ledger import HELD, State
from gxr_batch.ledger.state import Bools
from gxr_batch.prompts import Templates
from gxr_batch.prompts.render import messages_sha256, render, row_template
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt, Result, Row, Status
from gxr_batch.rows.table_reader import read_rows
from gxr_batch.run.planning import row_seed
from gxr_batch.run.prepare import Prepared
from gxr_batch.text_checks.identifiers import identifiers_in
from gxr_batch.text_checks.reasoning import without_reasoning
from gxr_batch.text_checks.screening import IN_INPUT, IN_OUTPUT, Screen, flags, reason

if TYPE_CHECKING:
    from gxr_batch.text_checks.flags import Checked

TRUNCATED = "findings_truncated"


class Fitted(NamedTuple):
    """A prompt that fits, the sha256 of its turns, and flags for the reviewer about how it was made."""

    messages: Messages
    encoded: Encoded
    sha256: str
    flags: tuple[str, ...] = ()

    def flagged(self, *flags: str) -> Fitted:
        """Return a copy with more flags."""
        return self._replace(flags=self.flags + flags) if flags else self


class Fitter:
    """Makes prompts that fit. Raises RowError for a row that cannot become a prompt."""

    def __init__(self, templates: Templates, job: Job, encoder: Encoder) -> None:
        self._templates, self._encoder = templates, encoder
        self._system, self._truncates = job.prompt.system, job.prompt.too_long == "truncate"
        self._limit = job.model.max_seq_length - job.sampling.settings().max_new_tokens

    def fit(self, row: Row) -> Fitted:
        """Return the row's prompt. Raises RowError, MachineError if no row can become one."""
        try:
            return self._fit(row)
        except (RowError, MachineError, MemoryError):
            raise
        except Exception as error:  # a bug, or an unforeseen cell: one row must not end the run
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__}, {Path(place.filename).name} line {place.lineno}"
            raise RowError(f"the prompt could not be made ({where})") from None

    def _fit(self, row: Row) -> Fitted:
        messages, encoded = self._attempt(row, row.values)
        if self._too_long(encoded):
            if not self._truncates:
                raise RowError(
                    f"the prompt is too long: {encoded.length} tokens, and model.max_seq_length - "
                    f"sampling.max_new_tokens leaves room for {self._limit}"
                )
            messages, encoded = self._cut(row)
            return Fitted(messages, encoded, messages_sha256(messages), (TRUNCATED,))
        return Fitted(messages, encoded, messages_sha256(messages))

    def _attempt(self, row: Row, values: Mapping[str, Any]) -> tuple[Messages, Encoded]:
        messages = render(row_template(self._templates, row.template), values, system=self._system)
        return messages, self._encoder.encode(messages)

    def _too_long(self, encoded: Encoded) -> bool:
        return encoded.length is not None and encoded.length > self._limit

    def _cut(self, row: Row) -> tuple[Messages, Encoded]:
        """Return the prompt with as many words of its longest cell as fit."""
        texts = {name: value for name, value in row.values.items() if isinstance(value, str)}
        longest = max(texts, key=lambda name: len(texts[name]), default="")
        text = texts.get(longest, "").strip()
        ends = [gap.start() for gap in re.finditer(r"\s+", text)]
        fitting = None
        low, high = 0, len(ends)  # the first `low` ends fit, those from `high` on do not
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


_NO_PROMPT = Fitted(Messages((), ""), Encoded(None, None), "")


class Work(NamedTuple):
    """A prompt for the engine, and what its result needs from the row."""

    row: Row
    attempt: int
    prompt: Prompt
    fitted: Fitted
    screening: Screening = "off"

    @property
    def length(self) -> int:
        """The prompt's length in tokens; 0 if the engine cannot count them."""
        return self.prompt.encoded.length or 0


class Kept(NamedTuple):
    """A row that never reaches the engine, as its result: failed or held."""

    position: int
    result: Result


class Pipeline:
    """Turns the rows of one invocation into prompts, and completions into results."""

    def __init__(
        self,
        prepared: Prepared,
        job: Job,
        encoder: Encoder,
        screen: Screen,
        *,
        state: State,
        released: Collection[tuple[str, str]],
    ) -> None:
        """`state` gives each row's next attempt. Held rows are read from it now, attempts later.

        `released` has the row ids and content hashes of the rows that a person released.
        """
        self._fields, self._screen, self._state, self._released = prepared.fields, screen, state, released
        self._fitter = Fitter(prepared.templates, job, encoder)
        self._held: Bools = np.any(state.status == HELD, axis=1)  # before this invocation, which may release some
        self._seed = int(job.sampling.seed)
        self._form = prepared.form
        self._max_new_tokens = job.sampling.settings().max_new_tokens

    def rows(self, table: Path, todo: Bools, suspects: Suspects) -> Iterator[Work | Kept]:
        """Yield the outcome of every key to do, in input order. Raises RunError if the table is damaged."""
        wanted: Bools = np.any(todo, axis=1)
        for row in read_rows(table, self._fields, wanted):
            samples = [int(sample) + 1 for sample in np.flatnonzero(todo[row.position])]
            killers = [sample for sample in samples if suspects.is_condemned(Key(row.row_id, sample))]
            yield from self._failed(row, killers, RowError(CRASHED))
            if samples := [sample for sample in samples if sample not in killers]:
                yield from self._row(row, samples)

    def _row(self, row: Row, samples: Sequence[int]) -> Iterator[Work | Kept]:
        try:
            fitted = self._fitter.fit(row)
        except RowError as error:
            yield from self._failed(row, samples, error)
            return
        screening = self._screening(row)
        hits = self._screen.of_row(row, fitted.messages) if screening != "off" else ()
        fitted = fitted.flagged(*flags(IN_INPUT, hits))
        for sample in samples:
            work = self._work(row, sample, fitted, screening)
            if hits and screening == "hold":
                # Not an attempt: once released, the row gets the same attempts, seed and so text as if it had never
                # been held.
                yield self._kept(work._replace(attempt=work.attempt - 1), "held", reason(IN_INPUT, hits))
            else:
                yield work

    def _screening(self, row: Row) -> Screening:
        """Return the effect of a hit on this row: a held row stays held until a person releases it."""
        if (row.row_id, row.content_hash) in self._released:
            return "off" if self._screen.mode == "off" else "flag"
        return "hold" if self._held[row.position] else self._screen.mode

    def _work(self, row: Row, sample: int, fitted: Fitted, screening: Screening) -> Work:
        attempt = int(self._state.attempt[row.position, sample - 1]) + 1
        seed = row_seed(self._seed, row.row_id, sample, attempt)
        prompt = Prompt(Key(row.row_id, sample), fitted.messages, fitted.encoded, seed, self._max_new_tokens)
        return Work(row, attempt, prompt, fitted, screening)

    def _failed(self, row: Row, samples: Sequence[int], error: RowError) -> Iterator[Kept]:
        for sample in samples:
            yield self._kept(self._work(row, sample, _NO_PROMPT, "off"), "failed", error.what)

    def _kept(self, work: Work, status: Status, error: str) -> Kept:
        now = int(time.time() * 1000)
        length = work.fitted.encoded.length
        completion = Completion(work.prompt.key, "", "error", error, length, 0, 0.0, None, 0.0, 0.0, 0.0, now, now)
        return Kept(work.row.position, _result(work, completion, status, error))

    def result(self, work: Work, completion: Completion) -> tuple[Result, str]:
        """Return the result of a completion, and the kind of error if a flag rule failed."""
        contents = parts_of(self._form, completion.text) if self._form else None
        if contents is None:  # in a form nothing is reasoning
            completion = without_reasoning(completion)
        error = completion.error
        if error is None and not completion.text.strip():
            error = "the model returned empty text"
        if error is not None:
            return _result(work, completion, "failed", error), ""
        generated = f"{completion.text}\n{completion.reasoning}" if completion.reasoning else completion.text
        hits = identifiers_in(generated) if work.screening != "off" else ()
        work = work._replace(fitted=work.fitted.flagged(*flags(IN_OUTPUT, hits)))
        if hits and work.screening == "hold":
            return _result(work, completion, "held", reason(IN_OUTPUT, hits)), ""
        cut = sections_of(self._form, contents, completion.cut_sections) if self._form and contents else {}
        found, fault = _checked(work, completion, cut)
        result = _result(work._replace(fitted=work.fitted.flagged(*found.flags)), completion, "ok", None)
        return result._replace(findings_kept=found.kept, findings_lost=found.lost), fault


def _checked(work: Work, completion: Completion, cut: Mapping[str, str]) -> tuple[Checked, str]:
    """Return what the rules find in a generated text; a limit ended its sections in `cut`.

    A rule that fails is a bug, but must not fail rows.
    """
    # Not for `check`, which imports this module and has no texts: compiling the rules takes time.
    from gxr_batch.text_checks.flags import NOT_COMPUTED, Checked, Evidence, checked

    end: Literal["stop", "length"] = "length" if completion.finish_reason == "length" else "stop"
    prompt = work.fitted.messages.turns[-1].text
    try:
        # Screening has its own flags, by rule, and may be disabled, so it is skipped here.
        return checked(Evidence(completion.text, prompt, work.row.values, end, identifiers=(), cut=cut)), ""
    except Exception as error:
        return Checked([NOT_COMPUTED]), type(error).__name__


def _result(work: Work, completion: Completion, status: Status, error: str | None) -> Result:
    row, prompt = work.row, work.prompt
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
        flags=list(work.fitted.flags),
        prompt_tokens=completion.prompt_tokens,
        new_tokens=tokens,
        max_new_tokens=prompt.max_new_tokens,
        seed=prompt.row_seed,
        attempt=work.attempt,
        seconds_queued=completion.seconds_queued if generated else None,
        seconds_to_first_token=completion.seconds_to_first_token,
        seconds_generating=seconds if generated else None,
        seconds_share=completion.seconds_share if generated else None,
        tokens_per_second=tokens / seconds if seconds > 0 and tokens is not None else None,
        rows_in_batch=completion.rows_in_batch if generated else None,
        started_at=completion.started_at_ms,
        finished_at=completion.finished_at_ms,
        template=row.template,
        prompt_sha256=work.fitted.sha256 or None,
        reasoning=completion.reasoning if text is not None else None,
    )
