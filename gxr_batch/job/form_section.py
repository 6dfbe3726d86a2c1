"""[form] of the job file, and of form files: headings, and what may be under each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from gxr_batch.job.section import MOST_TOKENS, FilePath, Section, quoted

_MOST_SECTIONS = 24
_MOST_HEADING = 80  # characters
LEAST_SECTION = 8  # tokens: fewer may not hold a character


def _one_line(value: str) -> str:
    """Return text unchanged; raise ValueError unless it is one printable line with single blanks between words."""
    if not value or value != " ".join(value.split()) or not value.isprintable() or len(value) > _MOST_HEADING:
        raise ValueError(
            f"must be one line of 1 to {_MOST_HEADING} characters that can be printed, with single blanks between words"
        )
    return value


def _heading(value: str) -> str:
    """Return a heading unchanged; raise ValueError if no text can have it."""
    if _one_line(value).endswith(":"):
        raise ValueError("must not end with a colon, which is added")
    return value


Heading = Annotated[str, AfterValidator(_heading)]
SectionKind = Literal["text", "line", "bullets", "choice", "number"]


class FormPart(Section):
    """What one section of a form may hold; `ask` is what the prompt says about it."""

    kind: SectionKind = "text"
    max_tokens: int | None = Field(default=None, ge=LEAST_SECTION, le=MOST_TOKENS)
    choices: tuple[Annotated[str, AfterValidator(_one_line)], ...] = ()
    ask: str = ""
    hidden: bool = False

    @model_validator(mode="after")
    def _what_the_kind_has(self) -> FormPart:
        if (self.kind == "choice") != bool(self.choices):
            raise ValueError('choices and kind = "choice" need each other, as in choices = ["easy", "hard"]')
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("choices must be different")
        if self.max_tokens is not None and self.kind in {"choice", "number"}:
            raise ValueError(f'max_tokens has no meaning with kind = "{self.kind}", which is never cut')
        return self


FORM_VERSION = 2


class FormSection(Section):
    """The form of every text: headings in order, and what may be under each. Without `sections`, `name` says where.

    `request` is added to the prompt, with `{headings}` replaced by the headings. `version` is of the built-in forms'
    words and of how sections share the token limit: a run that has begun keeps its own.
    """

    name: FilePath = ""
    sections: tuple[Heading, ...] = Field(default=(), max_length=_MOST_SECTIONS)
    request: str = ""
    section: dict[str, FormPart] = Field(default_factory=dict)
    version: int = Field(default=FORM_VERSION, ge=1, le=FORM_VERSION)

    @model_validator(mode="after")
    def _one_source(self) -> FormSection:
        if self.name and (self.sections or self.section or self.request):
            raise ValueError(
                "name cannot be combined with sections, section or request: copy the form "
                "(gxr-batch forms show NAME), change it, and name its file"
            )
        folded = [heading.casefold() for heading in self.sections]
        if len(set(folded)) < len(folded):
            raise ValueError("sections must be different headings")
        if any(one.startswith(f"{other}:") for one in folded for other in folded):
            raise ValueError("a heading must not be another one followed by a colon")
        if unknown := [heading for heading in self.section if heading not in self.sections]:
            raise ValueError(f"sections lacks the heading of [form.section.{quoted(unknown[0])}]")
        if self.request and "{headings}" not in self.request:
            raise ValueError("request must contain {headings}, where the headings are named")
        return self
