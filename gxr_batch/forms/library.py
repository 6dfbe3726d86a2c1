"""Finds forms: those of the job itself, the built-in ones, and files of the user's own."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import replace
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gxr_batch.errors import JobFileError
from gxr_batch.files import read_text, why_unreadable
from gxr_batch.forms.form import Form
from gxr_batch.job import FORM_VERSION, FormSection, Job

_SUFFIX = ".toml"


@cache
def builtin_form_names() -> tuple[str, ...]:
    """Return the names of the built-in forms, sorted."""
    entries = (entry.name for entry in files(__package__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in entries if name.endswith(_SUFFIX)))


def form_source(name: str, version: int = FORM_VERSION) -> str:
    """Return the text of a built-in form, as it was in a version, or of a form file. Raises JobFileError if none."""
    if name in builtin_form_names():
        return _builtin(name, version).read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix != _SUFFIX:
        near = difflib.get_close_matches(name, builtin_form_names(), n=1)
        known = f"known: {', '.join(builtin_form_names())}; or give the path of a .toml file"
        raise JobFileError(
            "Unknown form name.", where="form.name", next_step=f"did you mean {near[0]}?" if near else known
        )
    try:
        return read_text(path)
    except FileNotFoundError:
        raise JobFileError(
            "There is no such form file.",
            where=str(path.absolute()),
            next_step="relative paths start at the current directory",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(
            f"The form file cannot be read: {why_unreadable(error)}.", where=str(path.absolute())
        ) from None


def _builtin(name: str, version: int) -> Traversable:
    """Return the file of a built-in form; those that a later version changed are kept for runs that have begun."""
    folder = files(__package__)
    earlier = [folder.joinpath(f"version_{older}", name + _SUFFIX) for older in range(version, FORM_VERSION)]
    return next((file for file in earlier if file.is_file()), folder.joinpath(name + _SUFFIX))


def read_form(name: str, version: int = FORM_VERSION) -> tuple[FormSection, str]:
    """Return a built-in form, or one in a file, and its description. Raises JobFileError."""
    source = form_source(name, version)
    where = f"built-in form {name}" if name in builtin_form_names() else str(Path(name).absolute())
    try:
        data: dict[str, Any] = tomllib.loads(source)
    except (ValueError, RecursionError) as error:
        why = f": {error}" if isinstance(error, tomllib.TOMLDecodeError) else ""
        raise JobFileError(f"The form file is not valid TOML{why}.", where=where, next_step="fix that line") from None
    description = data.pop("description", "")
    if "form" in data and len(data) == 1:
        raise JobFileError(
            "A form file has no [form] section: its keys are at the top.",
            where=where,
            next_step="remove the line [form], and write [section.X] instead of [form.section.X]",
        )
    if "version" in data:
        raise JobFileError(
            "A form file has no version: the job has it.",
            where=where,
            next_step="remove the line; --set form.version=... sets it",
        )
    try:
        section = FormSection.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]") or "form"
        what = first["msg"].removeprefix("Value error, ")
        raise JobFileError(f"The form file cannot be used: {key}: {what}.", where=where) from None
    if section.name or not section.sections or not isinstance(description, str):
        raise JobFileError(
            "A form file lists its headings in sections, and may have description, request and section.",
            where=where,
            next_step="gxr-batch forms show teaching_case is an example",
        )
    return section, description


def _inline(section: FormSection) -> FormSection:
    if not section.name:
        return section
    return read_form(section.name, section.version)[0].model_copy(update={"version": section.version})


def with_form_inline(job: Job) -> Job:
    """Return the job with the form that it names written out, so that nothing that reads it needs the file.

    Raises JobFileError if there is no such form.
    """
    if not job.form.name:
        return job
    section = _inline(job.form)
    return job.with_values({f"form.{key}": value for key, value in section.model_dump().items()})


def form_of(job: Job) -> Form | None:
    """Return the form of a job's texts, None if they have none. Raises JobFileError if it names an unknown one."""
    section = _inline(job.form)
    return replace(Form.of(section), checked=job.generator == "api") if section.sections else None
