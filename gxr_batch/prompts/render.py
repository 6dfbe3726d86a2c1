"""Row -> Messages: fills a template and builds the turns. `run`, `generate` and `finetune` share it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gxr_batch.cells import is_unicode, quoted
from gxr_batch.errors import RowError, TemplateError
from gxr_batch.job import Job
from gxr_batch.prompts.filters import NotANumber
from gxr_batch.prompts.library import Templates, builtin_names
from gxr_batch.prompts.sandbox import MissingValue, TooMuchWork
from gxr_batch.prompts.template import Template
from gxr_batch.records import SOURCE_PREFIX, Messages, Turn
from gxr_batch.rows.columns import RESERVED_PREFIX, FieldMap, listed, nearest, plausible

# What separates the names of a table that was read as one column.
_UNUSUAL_DELIMITER = re.compile(r"\s{2,}|[~^:\xa6\x01\x1f]")
_SURELY_MEANT = 0.8  # likeness of two names
_JSON = json.JSONEncoder(ensure_ascii=False)


def render(template: Template, values: Mapping[str, Any], *, system: str) -> Messages:
    """Return the turns of a row under a template; `values` maps fields to cells, absent or None = missing.

    The system text is a separate first turn. Raises RowError if a required field is empty or the template
    cannot be filled with these cells.
    """
    cells = {name: _cell(values.get(name)) for name in template.fields}
    empty = [name for name in template.required if cells[name] is None]
    if empty:
        raise RowError(f"the template {template.name} needs {', '.join(empty)}, which this row does not have")
    try:
        text = template.fill(cells)
    except MissingValue as error:
        raise RowError(f"the template {template.name} needs {error}, which this row does not have") from None
    except NotANumber:
        raise RowError(f"the template {template.name} needs a number where this row has other text") from None
    except TooMuchWork as error:
        raise RowError(f"the template {template.name} is more work than a prompt should be: {error.message}") from None
    except Exception as error:  # any error of a template with this cell fails only this row
        raise RowError(f"the template {template.name} cannot be filled ({type(error).__name__})") from None
    if not text:
        raise RowError(f"the template {template.name} gives an empty prompt")
    if not is_unicode(text):
        raise RowError(f"the template {template.name} gives half of a surrogate pair, which is no character")
    turns = (Turn("system", system.strip()), Turn("user", text)) if system.strip() else (Turn("user", text),)
    prefix = template.literal_prefix
    return Messages(turns, template.name, len(prefix) if text.startswith(prefix) else 0)


def _cell(value: Any) -> Any:
    """Return a cell without surrounding spaces, None if it is missing: null, blank or not a number (NaN)."""
    if isinstance(value, str):
        return value.strip() or None
    return None if isinstance(value, float) and math.isnan(value) else value


def messages_sha256(messages: Messages) -> str:
    """Return the sha256 (hex) of a prompt's turns: it identifies a row's prompt without storing it."""
    return hashlib.sha256(_JSON.encode(messages.turns).encode("utf-8", "surrogatepass")).hexdigest()


def row_template(templates: Templates, name: str) -> Template:
    """Return the template that a row names. Raises RowError if there is none, without its name, which is a cell."""
    try:
        return templates.get(name)
    except TemplateError:
        raise RowError(f"column {templates.column} names a template that does not exist") from None


def field_map(templates: Templates, job: Job, columns: Sequence[str]) -> FieldMap:
    """Map the templates' fields to the table's columns.

    Raises TemplateError, naming everything that is missing, with the closest existing names.
    """
    column_of_field = job.input.columns
    chosen = job.prompt.template_column
    default = templates.default
    names = list(templates.available()) if chosen else [default.name]
    fields_of = {name: templates.get(name).fields for name in names}
    fields = {field for used in fields_of.values() for field in used}
    wrong = [f"prompt.template_column = {chosen}"] if chosen and chosen not in columns else []
    wrong += [f"input.columns.{name} = {column}" for name, column in column_of_field.items() if column not in columns]
    mapped = {field: column_of_field.get(field, field) for field in fields}
    missing = [name for name in default.required if mapped[name] not in columns and name not in column_of_field]
    unused = [name for name in column_of_field if name not in fields]
    if wrong or missing or unused:
        raise _mismatch(default, columns, wrong, missing, unused)
    present = {name: column for name, column in mapped.items() if column in columns}
    own = [templates.get(name) for name in (default.name, *templates.own) if name not in builtin_names()]
    return FieldMap(
        templates=fields_of,
        default=default.name,
        template_column=chosen,
        columns=present,
        required=frozenset(default.required),
        tested=frozenset(field for template in own for field in template.uses.tested),
    )


def unfilled(templates: Templates, fields: FieldMap, columns: Sequence[str]) -> Iterator[str]:
    """Yield notices about optional fields of the user's templates that no column fills, but probably should.

    These are fields with nearly the name of a column that no other field uses, and columns of a run.
    """
    unused = [name for name in columns if name not in fields.columns.values()]
    for name in dict.fromkeys((fields.default, *(templates.own if fields.template_column else ()))):
        if name in builtin_names():
            continue
        for field in templates.get(name).fields:
            if field in fields.columns:
                continue
            near = nearest(field, unused, cutoff=_SURELY_MEANT)
            if near:
                yield (
                    f"no column fills the field {quoted(field)} of the template {quoted(name)}; did you mean "
                    f"{quoted(near[0])}?"
                )
            elif field.startswith(SOURCE_PREFIX) and not any(column.startswith(SOURCE_PREFIX) for column in columns):
                yield (
                    f"no column fills the field {quoted(field)} of the template {quoted(name)}; columns that begin "
                    f"with {SOURCE_PREFIX} come from a run folder as input.path"
                )


def _mismatch(
    template: Template, columns: Sequence[str], wrong: list[str], missing: list[str], unused: list[str]
) -> TemplateError:
    sentences = []
    if missing:
        sentences.append(
            f"The template {quoted(template.name)} needs columns that are not in the table: {_near(missing, columns)}."
        )
    if wrong:
        named = [text.rpartition(" = ")[2] for text in wrong]
        sentences.append(f"The job names columns that are not in the table: {_near(named, columns)}.")
    if unused:
        sentences.append(f"No template uses these fields of [input.columns]: {_near(unused, template.fields)}.")
    return TemplateError(
        " ".join(sentences),
        where="; ".join(map(quoted, wrong)) or "[input.columns]",
        next_step=_way_out(columns, wrong, missing),
    )


def _way_out(columns: Sequence[str], wrong: list[str], missing: list[str]) -> str:
    """Return the line to write in [input.columns], as precisely as the names allow."""
    if not wrong and not missing:
        return "delete these lines from [input.columns], or choose a template that uses these fields"
    fields = {text.partition(" = ")[0].removeprefix("input.columns."): text.rpartition(" = ")[2] for text in wrong}
    fields |= {name: name for name in missing}
    results = [name for name in fields.values() if name.startswith(RESERVED_PREFIX)]
    if results:
        return (
            "set input.path to the folder of a run to read its results; there "
            f"{quoted(results[0])} is called {quoted(SOURCE_PREFIX + results[0].removeprefix(RESERVED_PREFIX))}"
        )
    if not plausible(columns):
        return f"the table: {listed(columns)}"
    parts = _UNUSUAL_DELIMITER.split(columns[0].lower()) if len(columns) == 1 else []
    if len(parts) > 1 and any(name.lower() in parts for name in fields.values()):
        return (
            "the table was read as one column: set input.delimiter to the character between its names, "
            "or save it as CSV"
        )
    near = {field: found[0] for field, name in fields.items() if (found := nearest(name, columns))}
    if near.keys() == fields.keys() and "prompt.template_column" not in fields:
        lines = ", ".join(f'{quoted(field)} = "{quoted(column)}"' for field, column in near.items())
        return f"did you mean [input.columns] {lines}? The table: {listed(columns)}"
    example = quoted(missing[0]) if missing else "findings"
    line = f'[input.columns] {example} = "its column"'
    return f"map the field to a column with another name: {line}; the table: {listed(columns)}"


def _near(names: Sequence[str], known: Sequence[str]) -> str:
    """Return the names, each with the closest known name if there is one."""
    found = []
    for name in names:
        near = nearest(name, known)
        found.append(f"{quoted(name)} (closest: {quoted(near[0])})" if near else quoted(name))
    return ", ".join(found)
