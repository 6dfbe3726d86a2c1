"""The templates that a job can name: built-in ones, the job's own by name, or one file by path."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from gxr_batch.cells import quoted
from gxr_batch.errors import TemplateError
from gxr_batch.files import read_text, why_unreadable
from gxr_batch.forms import Form, request_of
from gxr_batch.job import PROMPT_VERSION, PromptSection
from gxr_batch.prompts.template import Template, compile_template

_SUFFIX = ".md.j2"


class Templates:
    """All templates of one job. Raises TemplateError if one that the job names is missing or invalid."""

    def __init__(self, section: PromptSection, form: Form | None = None) -> None:
        """`form` is what every prompt asks for, whichever template makes it."""
        self.column, self._version = section.template_column, section.version
        self._request = request_of(form) if form else ""
        self._built_in: dict[str, Template] = {}
        self._own = {name: self._asking(self._read(name, Path(path))) for name, path in section.templates.items()}
        chosen = section.template
        file = chosen.endswith(".j2")
        self.default = self._asking(self._read(Path(chosen).name, Path(chosen))) if file else self.get(chosen)

    @property
    def own(self) -> tuple[str, ...]:
        """The names in [prompt.templates]."""
        return tuple(self._own)

    def get(self, name: str) -> Template:
        """Return a template by name. Raises TemplateError, with the closest name, if there is none."""
        if name in self._own:
            return self._own[name]
        if name in builtin_names():
            if name not in self._built_in:
                self._built_in[name] = self._asking(_builtin(name, self._version))
            return self._built_in[name]
        if hasattr(self, "default") and name == self.default.name:
            return self.default
        known = [*self._own, *builtin_names()]
        near = difflib.get_close_matches(name, known, n=1)
        raise TemplateError(
            "Unknown template name.",
            where="prompt.template",
            next_step=f"did you mean {quoted(near[0])}?"
            if near
            else f"known: {', '.join(map(quoted, known))}; or give the path of a .j2 file",
        )

    def _read(self, name: str, path: Path) -> Template:
        try:
            source = read_text(path)
        except FileNotFoundError:
            raise TemplateError(
                "There is no such template file.",
                where=str(path.absolute()),
                next_step="relative paths start at the current directory",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(
                f"The template cannot be read: {why_unreadable(error)}.", where=str(path.absolute())
            ) from None
        return compile_template(name, source, str(path), self._version)

    def _asking(self, template: Template) -> Template:
        return replace(template, request=self._request) if self._request else template

    def available(self) -> dict[str, str]:
        """Return every name that a row may choose, with what the template is for."""
        names = [self.default.name, *self._own, *builtin_names()]
        return {name: self.get(name).description for name in dict.fromkeys(names)}


def version_of_run(fingerprint: Mapping[str, Any], job: Mapping[str, Any]) -> Any:
    """Return the `prompt.version` with which a run began; one that never opened an engine has its job's."""
    if fingerprint:
        return fingerprint.get("prompt.version", 1)
    return (job.get("prompt") or {}).get("version", PROMPT_VERSION)


@cache
def builtin_names() -> tuple[str, ...]:
    """Return the names of the built-in templates, sorted."""
    entries = (entry.name for entry in files(__package__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in entries if name.endswith(_SUFFIX)))


@cache
def _builtin(name: str, version: int) -> Template:
    source = files(__package__).joinpath(name + _SUFFIX).read_text(encoding="utf-8")
    return compile_template(name, source, f"built-in template {name}", version)
