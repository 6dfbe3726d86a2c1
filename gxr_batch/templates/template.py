"""One compiled template: which fields it needs and uses, and what of its text is the same for every row.

Templates run in jinja2's sandbox, without files, imports or globals but our own words. A cell is data: nothing in it is
ever read as a template.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2 import Template as Compiled
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gxr_batch.errors import TemplateError
from gxr_batch.templates.words import as_text, clause, patient

_FILE_NODES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


@dataclass(frozen=True, kw_only=True)
class Template:
    """A template that compiles. `fields` stand in order of appearance, `required` are those it cannot do without.

    A field that an `if` asks about is optional, any other is required. `literal_prefix` is the text before the first
    field or condition. `sha256` is over the source with LF line ends.
    """

    name: str
    description: str
    source: str
    sha256: str
    fields: tuple[str, ...]
    required: tuple[str, ...]
    literal_prefix: str
    compiled: Compiled = field(repr=False, compare=False)

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the prompt text; `values` has every field, None where the row has none. Raises jinja2's errors."""
        return self.compiled.render(values).strip()


def compile_template(name: str, source: str, where: str) -> Template:
    """Compile a template. Raises TemplateError with its place where it is not valid or leaves the sandbox."""
    source = source.replace("\r\n", "\n")
    environment = _environment()
    try:
        tree = environment.parse(source)
        compiled = environment.from_string(source)
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"The template does not compile: {error.message}.",
            where=f"{where}, line {error.lineno}",
            next_step="mend that line",
        ) from None
    if reader := next(tree.find_all(_FILE_NODES), None):
        raise TemplateError(
            "A template cannot include or import other files.",
            where=f"{where}, line {reader.lineno}",
            next_step="copy the text in",
        )
    undeclared = meta.find_undeclared_variables(tree) - environment.globals.keys()
    fields = tuple(dict.fromkeys(name.name for name in tree.find_all(nodes.Name) if name.name in undeclared))
    optional = set(_asked_about(tree))
    template = Template(
        name=name,
        description=_description(source),
        source=source,
        sha256=hashlib.sha256(source.encode()).hexdigest(),
        fields=fields,
        required=tuple(name for name in fields if name not in optional),
        literal_prefix=_literal_prefix(tree),
        compiled=compiled,
    )
    _refuse_escapes(template, where)
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=as_text)
    environment.globals = {"patient": patient}
    environment.filters["clause"] = clause
    return environment


def _asked_about(tree: nodes.Template) -> Iterator[str]:
    """Yield the names that stand in the test of an `if`, as a statement or inside an expression."""
    asking: list[nodes.If | nodes.CondExpr] = [*tree.find_all(nodes.If), *tree.find_all(nodes.CondExpr)]
    for test in (node.test for node in asking):
        yield from (name.name for name in ([test] if isinstance(test, nodes.Name) else test.find_all(nodes.Name)))


def _literal_prefix(tree: nodes.Template) -> str:
    text = ""
    for statement in tree.body:
        if not isinstance(statement, nodes.Output):
            break
        for part in statement.nodes:
            if not isinstance(part, nodes.TemplateData):
                return text.lstrip()
            text += part.data
    return text.lstrip()


def _description(source: str) -> str:
    comment = re.match(r"\s*\{#-?\s*(.*?)\s*-?#\}", source, re.DOTALL)
    return comment[1] if comment else ""


def _refuse_escapes(template: Template, where: str) -> None:
    """Fill the template once with harmless text, so that a way out of the sandbox shows before any row is read."""
    try:
        template.fill(dict.fromkeys(template.fields, "x"))
    except SecurityError:
        raise TemplateError(
            "The template reaches for what the sandbox does not allow.",
            where=where,
            next_step="use fields, filters and conditions only",
        ) from None
    except Exception:  # what harmless text cannot fill, a row's own cells may: rows tell
        pass
