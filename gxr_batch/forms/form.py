"""A form as the program uses it: its parts in order, their result columns, and what a run records of it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gxr_batch.job import FORM_VERSION, FormPart, FormSection, SectionKind

PREFIX, REVIEW_PREFIX = "gxr_section_", "gxr_review_section_"
_MOST_NAME = 60  # characters of a column's name after the prefix
# Texts begin on the line of their heading, as models write them: below it, one continues with a list.
_AFTER_HEADING = {"bullets": "\n-"}


@dataclass(frozen=True)
class Part:
    """One section: its heading, its result column, and what may be under it."""

    heading: str
    column: str
    kind: SectionKind
    max_tokens: int | None = None
    choices: tuple[str, ...] = ()
    ask: str = ""
    hidden: bool = False

    @property
    def review_column(self) -> str:
        """The column of a sheet in which a reviewer corrects the section."""
        return REVIEW_PREFIX + self.column.removeprefix(PREFIX)

    @property
    def opening(self) -> str:
        """The text with which the section begins: its heading, and what follows up to where its content may differ."""
        return f"{self.heading}:{_AFTER_HEADING.get(self.kind, '')}"


@dataclass(frozen=True)
class Form:
    """The sections that every text of a run has; `request` is the sentence of the prompt that asks for them.

    Under `version` 1, a section without its own limit gets an equal share of the tokens that are left. Under 2 it may
    take up to half as much again, as lists are longer than impressions, but leaves each section after it three quarters
    of such a share; and the request is shorter. `checked` means that the engine cannot hold texts to the form, and
    looks at them afterwards.
    """

    parts: tuple[Part, ...]
    request: str = ""
    version: int = FORM_VERSION
    checked: bool = False

    @classmethod
    def of(cls, section: FormSection) -> Form:
        """Return the form of a job section that lists its headings."""
        columns = column_names(section.sections)
        own = {heading: section.section.get(heading, FormPart()) for heading in section.sections}
        parts = [
            Part(heading, column, **own[heading].model_dump())
            for heading, column in zip(section.sections, columns, strict=True)
        ]
        return cls(tuple(parts), section.request, section.version)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The result columns of the sections, in order."""
        return tuple(part.column for part in self.parts)

    @property
    def recorded(self) -> str:
        """The form but for what is hidden, as one line of JSON, for the run's fingerprint and its readers."""
        sections = []
        for part in self.parts:
            entry: dict[str, Any] = {"heading": part.heading, "kind": part.kind}
            entry |= {"max_tokens": part.max_tokens} if part.max_tokens is not None else {}
            entry |= {"choices": list(part.choices)} if part.choices else {}
            entry |= {"ask": part.ask} if part.ask else {}
            sections.append(entry)
        version = {"version": self.version} if self.version > 1 else {}  # of which earlier versions knew nothing
        return json.dumps({"request": self.request, "sections": sections} | version, ensure_ascii=False)


def form_of_run(fingerprint: Mapping[str, Any], job: Mapping[str, Any] | None = None) -> Form | None:
    """Return the form of a run from its fingerprint, None if it has none; the run's job says which parts are hidden.

    A run that never opened an engine has no fingerprint, and its form is the job's. Raises ValueError for a record that
    is no form.
    """
    recorded = fingerprint.get("form")
    if recorded is None:
        section = FormSection.model_validate((job or {}).get("form") or {}) if not fingerprint else FormSection()
        return Form.of(section) if section.sections else None
    try:
        data = json.loads(str(recorded))
        entries: dict[str, Any] = {entry.pop("heading"): entry for entry in data["sections"]}
        own = ((job or {}).get("form") or {}).get("section") or {}
        hidden = {heading for heading in entries if (own.get(heading) or {}).get("hidden") is True}
        parts = {heading: {**entry, "hidden": heading in hidden} for heading, entry in entries.items()}
        if not entries or len(entries) < len(data["sections"]):
            raise ValueError
        values = {"request": data["request"], "sections": tuple(entries), "section": parts}
        values["version"] = data.get("version", 1)
    except (RecursionError, LookupError, TypeError, AttributeError):
        raise ValueError from None
    generator = fingerprint.get("ray.worker", fingerprint.get("engine.kind"))
    return replace(Form.of(FormSection.model_validate(values)), checked=generator == "api")


def column_names(headings: Sequence[str]) -> tuple[str, ...]:
    """Return the result column of each heading.

    `gxr_section_` and the heading in lower case (Unicode form NFKC), with one underscore for whatever is neither a
    letter, a mark nor a digit, at most 60 characters of it. A heading without any is `section`. Where two are the same,
    the later one ends in _2, _3, and so on.
    """
    names: list[str] = []
    for heading in headings:
        folded = unicodedata.normalize("NFKC", heading).lower()
        kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
        base = "_".join(kept.split())[:_MOST_NAME].rstrip("_") or "section"
        name, number = base, 2
        while PREFIX + name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(PREFIX + name)
    return tuple(names)
