"""One compiled template: which fields it needs and uses, and what of its text is the same for every row.

How templates run, and what they may do, is the sandbox's business. A cell is data: nothing in it is ever read as a
template.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Template as Compiled
from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError

from gxr_batch.errors import TemplateError
from gxr_batch.prompts.sandbox import Sandbox, TooMuchWork, concatenated

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
        """Return the prompt text; `values` has every field, None if the row has none. Raises jinja2's errors."""
        # As `compiled.render` does, but for the tracebacks that it rewrites: nobody sees them.
        return concatenated(self.compiled.root_render_func(self.compiled.new_context(dict(values)))).strip()


def compile_template(name: str, source: str, where: str) -> Template:
    """Compile a template. Raises TemplateError with its place where it is not valid or leaves the sandbox."""
    source = source.replace("\r\n", "\n")
    environment = Sandbox()
    try:
        tree = environment.parse(source)
        undeclared = meta.find_undeclared_variables(tree)
        prefix = _literal_prefix(tree)
        environment.limit_work(tree)
        compiled = environment.from_string(tree)
        compiled.globals = dict(compiled.globals)  # of the chain of mappings every prompt makes a dict anew, slowly
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"The template does not compile: {error.message}.",
            where=f"{where}, line {error.lineno}",
            next_step="mend that line",
        ) from None
    except (RecursionError, MemoryError, SyntaxError, ValueError):  # nested too deep, or a number too long, for Python
        raise TemplateError(
            "The template does not compile: it is nested too deep, or holds too long a number.",
            where=where,
            next_step="write it simpler",
        ) from None
    if reader := next(tree.find_all(_FILE_NODES), None):
        raise TemplateError(
            "A template cannot include or import other files.",
            where=f"{where}, line {reader.lineno}",
            next_step="copy the text in",
        )
    _refuse_words_as_fields(tree, environment.globals.keys(), where)
    fields = tuple(dict.fromkeys(name.name for name in tree.find_all(nodes.Name) if name.name in undeclared))
    optional = set(_asked_about(tree))
    template = Template(
        name=name,
        description=_description(source),
        source=source,
        sha256=hashlib.sha256(source.encode()).hexdigest(),
        fields=fields,
        required=tuple(name for name in fields if name not in optional),
        literal_prefix=prefix,
        compiled=compiled,
    )
    _refuse_escapes(template, where)
    return template


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
    return " ".join(comment[1].split()) if comment else ""


def _refuse_words_as_fields(tree: nodes.Template, words: Collection[str], where: str) -> None:
    """Refuse a word of ours where a template takes it for a field: it would print as a piece of this program."""
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    names = list(tree.find_all(nodes.Name))
    own = {name.name for name in names if name.ctx != "load"}
    for name in names:
        if name.name in words and name.name not in own and id(name) not in called:
            raise TemplateError(
                f"{name.name} is a word to be called, such as {name.name}(age, sex), not a field.",
                where=f"{where}, line {name.lineno}",
                next_step=f'give the field another name: [input.columns] person = "{name.name}"',
            )


def _refuse_escapes(template: Template, where: str) -> None:
    """Fill the template once with harmless text, so that a way out of the sandbox shows before any row is read."""
    try:
        template.fill(dict.fromkeys(template.fields, "x"))
    except TooMuchWork as error:
        raise TemplateError(
            f"The template is more work than a prompt should be: {error.message}.",
            where=where,
            next_step="use fewer or shorter loops",
        ) from None
    except SecurityError:
        raise TemplateError(
            "The template reaches for what the sandbox does not allow.",
            where=where,
            next_step="use fields, filters and conditions only",
        ) from None
    except Exception:  # what harmless text cannot fill, a row's own cells may: rows tell
        pass
