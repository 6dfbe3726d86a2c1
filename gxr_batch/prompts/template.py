"""One compiled template: which fields it needs and uses, and how much of its text is the same for every row.

The sandbox decides how templates run and what they may do. A cell is data: nothing in it is ever read as a template.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Template as Compiled
from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError

from gxr_batch.cells import quoted
from gxr_batch.errors import TemplateError
from gxr_batch.job import PROMPT_VERSION
from gxr_batch.prompts.field_uses import Uses, read_uses
from gxr_batch.prompts.sandbox import Sandbox, TooMuchWork, concatenated

# The word of a template for what the job's form asks; no column has this name.
FORM_SECTIONS = "form_sections"
_FILE_NODES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


@dataclass(frozen=True, kw_only=True)
class Template:
    """A template that compiles. `fields` are in order of appearance, `required` are those that it needs.

    `uses` says which fields are optional (field_uses); any other is required. `leading` is the text before the first
    field or condition, in pieces between which form_sections is. `sha256` is over the source with LF line ends.
    `request` is what the job's form adds to every prompt: at its end, or if the template `places_form`, where that has
    the word form_sections.
    """

    name: str
    description: str
    source: str
    sha256: str
    fields: tuple[str, ...]
    required: tuple[str, ...]
    uses: Uses
    leading: tuple[str, ...]
    compiled: Compiled = field(repr=False, compare=False)
    places_form: bool = False
    request: str = ""

    @property
    def fingerprint(self) -> str:
        """The template in a run's fingerprint: `sha256`, marked if earlier versions made other prompts with it."""
        return f"missing cells by newer rules: {self.sha256}" if self.uses.by_new_rules else self.sha256

    @property
    def literal_prefix(self) -> str:
        """The text before the first field or condition: every prompt begins with it."""
        return self.request.join(self.leading).lstrip()

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the prompt text; `values` has every field, None if the row has none. Raises jinja2's errors."""
        # Like `compiled.render`, without rewriting tracebacks, which are never shown.
        cells = {**values, FORM_SECTIONS: self.request} if self.places_form else dict(values)
        text = concatenated(self.compiled.root_render_func(self.compiled.new_context(cells))).strip()
        return f"{text}\n\n{self.request}" if text and self.request and not self.places_form else text


def compile_template(name: str, source: str, where: str, version: int = PROMPT_VERSION) -> Template:
    """Compile a template, by the rules of a version (`prompt.version`).

    Raises TemplateError with its place if it is invalid or leaves the sandbox.
    """
    source = source.replace("\r\n", "\n")
    environment = Sandbox(version)
    try:
        tree = environment.parse(source)
        undeclared = meta.find_undeclared_variables(tree)
        places_form = FORM_SECTIONS in undeclared
        undeclared.discard(FORM_SECTIONS)
        leading = _leading(tree)
        fields = tuple(dict.fromkeys(name.name for name in tree.find_all(nodes.Name) if name.name in undeclared))
        _refuse_words_as_fields(tree, environment.globals.keys(), where)
        uses = read_uses(tree, fields, version)
        environment.limit_work(tree)
        compiled = environment.from_string(tree)
        compiled.globals = dict(compiled.globals)  # each prompt would copy jinja2's chain of mappings to a dict, slowly
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"The template does not compile: {quoted(error.message)}.",
            where=f"{where}, line {error.lineno}",
            next_step="fix that line",
        ) from None
    except (RecursionError, MemoryError, SyntaxError, ValueError):  # nesting too deep or a number too long for Python
        raise TemplateError(
            "The template does not compile: it is nested too deeply or has a huge number.",
            where=where,
            next_step="simplify it",
        ) from None
    if reader := next(tree.find_all(_FILE_NODES), None):
        raise TemplateError(
            "A template cannot include or import other files.",
            where=f"{where}, line {reader.lineno}",
            next_step="copy the text into the template",
        )
    template = Template(
        name=name,
        description=_description(source),
        source=source,
        sha256=hashlib.sha256(source.encode()).hexdigest(),
        fields=fields,
        required=tuple(name for name in fields if name not in uses.optional),
        uses=uses,
        leading=leading,
        compiled=compiled,
        places_form=places_form,
    )
    _refuse_escapes(template, where)
    return template


def _leading(tree: nodes.Template) -> tuple[str, ...]:
    pieces = [""]
    for statement in tree.body:
        if not isinstance(statement, nodes.Output):
            break
        for part in statement.nodes:
            if isinstance(part, nodes.TemplateData):
                pieces[-1] += part.data
            elif isinstance(part, nodes.Name) and part.name == FORM_SECTIONS:
                pieces.append("")
            else:
                return tuple(pieces)
    return tuple(pieces)


def _description(source: str) -> str:
    comment = re.match(r"\s*\{#-?\s*(.*?)\s*-?#\}", source, re.DOTALL)
    return " ".join(comment[1].split()) if comment else ""


def _refuse_words_as_fields(tree: nodes.Template, words: Collection[str], where: str) -> None:
    """Refuse a built-in function used as a field: it would print as a Python object."""
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    names = list(tree.find_all(nodes.Name))
    own = {name.name for name in names if name.ctx != "load"}
    for name in names:
        if name.name in words and name.name not in own and id(name) not in called:
            raise TemplateError(
                f"{name.name} is a function, as in {name.name}(age, sex), not a field.",
                where=f"{where}, line {name.lineno}",
                next_step=f'give the field another name: [input.columns] person = "{name.name}"',
            )


def _refuse_escapes(template: Template, where: str) -> None:
    """Fill the template once with harmless text, so that leaving the sandbox fails before any row is read."""
    try:
        template.fill(dict.fromkeys(template.fields, "x"))
    except TooMuchWork as error:
        raise TemplateError(
            f"The template is too expensive to render: {error.message}.",
            where=where,
            next_step="use fewer or shorter loops",
        ) from None
    except SecurityError:
        raise TemplateError(
            "The template uses something that the sandbox does not allow.",
            where=where,
            next_step="use fields, filters and conditions only",
        ) from None
    except Exception:  # cells of a real row may still fill it; rows will show
        pass
