"""The fewest tokens that hold a form, so that a job with fewer is refused before its model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gxr_batch.errors import JobFileError
from gxr_batch.forms.form import Form, Part
from gxr_batch.forms.layout import SEPARATOR
from gxr_batch.forms.library import form_of
from gxr_batch.job import Job
from gxr_batch.job.form_section import LEAST_SECTION

_NUMBER_TOKENS = 12  # a digit each, at most


def least_of_part(part: Part) -> int:
    """Return the fewest tokens that a section may have to itself."""
    if part.kind == "choice":  # a model may spell it in single bytes
        return 1 + max(len(choice.encode()) for choice in part.choices)
    return _NUMBER_TOKENS if part.kind == "number" else LEAST_SECTION


def least_tokens(form: Form, openings: Sequence[int], blank: int) -> int:
    """Return the fewest tokens of a text that holds every heading and a few tokens of each section, and its end token.

    `openings` are the tokens of each section's opening, `blank` those of a blank line.
    """
    return sum(openings) + (len(openings) - 1) * blank + sum(map(least_of_part, form.parts)) + 1


def refuse_short_limit(job: Job, count: Callable[[str], int]) -> None:
    """Raise JobFileError if sampling.max_new_tokens cannot hold the job's form; `count` returns a text's tokens."""
    form, limit = form_of(job), job.sampling.settings().max_new_tokens
    if form is None:
        return
    blank = max(count(SEPARATOR), count("\n"))
    least = least_tokens(form, [count(part.opening) for part in form.parts], blank)
    if limit < least:
        raise JobFileError(
            f"The form needs at least {least} tokens: its headings, and a few for each section.",
            where=f"[form], sampling.max_new_tokens = {limit}",
            next_step=f"--set sampling.max_new_tokens={least}, or more",
        )
