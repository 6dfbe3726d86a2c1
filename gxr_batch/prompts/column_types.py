"""Columns whose types do not suit the templates: structs printed as a whole, text compared with numbers, ..."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa

from gxr_batch.cells import is_bytes, is_list, is_number, is_text, quoted
from gxr_batch.errors import TemplateError
from gxr_batch.prompts.library import Templates
from gxr_batch.prompts.template import Template
from gxr_batch.rows.columns import FieldMap, plausible


def refuse_nested(templates: Templates, fields: FieldMap, schema: pa.Schema) -> None:
    """Raise TemplateError if a template prints a column as a whole that has no text form: a struct, a map, ..."""
    for template in _chosen(templates, fields):
        for field, line in template.uses.whole.items():
            column = fields.columns.get(field)
            if column is None or (advice := _advice(field, schema.field(column).type)) is None:
                continue
            raise TemplateError(
                f"The template {quoted(template.name)} prints {quoted(field)}, but the column {quoted(column)} holds "
                f"{_kind_name(schema.field(column).type)}, which cannot be printed as a whole.",
                where=f"input.columns.{quoted(field)}; template {quoted(template.name)}, line {line}",
                next_step=advice,
            )


def mismatch(templates: Templates, fields: FieldMap, schema: pa.Schema) -> TemplateError | None:
    """Return the error for templates that compare or calculate with a column of another type, None if all is well.

    Such a comparison gives the same answer for every row, without any error.
    """
    found: list[str] = []
    places: list[str] = []
    steps: list[str] = []
    for template in _chosen(templates, fields):
        uses = template.uses
        for what, compared, rules in (
            ("a number", uses.with_number, _NOT_WITH_NUMBERS),
            ("a text", uses.with_text, _NOT_WITH_TEXT),
            ("true or false", uses.with_truth, _NOT_WITH_TRUTH),
        ):
            for wrong, holds, step in rules:
                seen = dict(_typed(compared, fields, schema, wrong))
                if not seen:
                    continue
                columns = ", ".join(_named(name, fields.columns[name]) for name in seen)
                found.append(
                    f"The template {quoted(template.name)} compares or calculates {columns} with {what}, but the "
                    "table has "
                    f"{holds} there: the answer is the same for every row, or the row fails."
                )
                places.append(
                    f"template {quoted(template.name)}, line {', '.join(map(str, sorted(set(seen.values()))))}"
                )
                steps.append(step.format(next(iter(seen))))
    if not found:
        return None
    return TemplateError(" ".join(found), where="; ".join(places), next_step="; ".join(dict.fromkeys(steps)))


def _chosen(templates: Templates, fields: FieldMap) -> list[Template]:
    """Return the templates that the job itself names. A row that names another one fails by itself."""
    names = [fields.default]
    if fields.template_column:
        names += templates.own
    return [templates.get(name) for name in dict.fromkeys(names)]


def _typed(
    uses: Mapping[str, int], fields: FieldMap, schema: pa.Schema, wrong: Callable[[pa.DataType], bool]
) -> Iterator[tuple[str, int]]:
    for field, line in uses.items():
        column = fields.columns.get(field)
        if column is not None and wrong(_decoded(schema.field(column).type)):
            yield field, line


def _named(field: str, column: str) -> str:
    return quoted(field) if field == column else f"{quoted(field)} (column {quoted(column)})"


def _decoded(kind: pa.DataType) -> pa.DataType:
    return _decoded(kind.value_type) if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_string_view(kind) or is_bytes(kind)


def _is_date(kind: pa.DataType) -> bool:
    return bool(pa.types.is_date(kind) or pa.types.is_timestamp(kind))


# Kinds of columns that are never equal to a number, a text, or true and false: what the table has, what to write.
_CONTAINS = "ask what the list contains: write `in {}`"
_NOT_WITH_NUMBERS = (
    (_is_text, "text", "write {} | number in the template"),
    (_is_date, "dates", "compare a part of the date, such as {}.year"),
    (is_list, "lists", _CONTAINS),
)
_NOT_WITH_TEXT = (
    (is_number, "numbers", "write {} without quotes around the number"),
    (pa.types.is_boolean, "true and false", "write {} alone, without a comparison"),
    (pa.types.is_temporal, "dates or times", "write {} | string to compare the text that prompts show"),
    (is_list, "lists", _CONTAINS),
)
_NOT_WITH_TRUTH = (
    (_is_text, "text", 'compare {0} with its text, such as "True", or write {0} | number for 1 and 0'),
    (_is_date, "dates", "write {} alone, without a comparison"),
    (is_list, "lists", _CONTAINS),
)


def _advice(field: str, kind: pa.DataType) -> str | None:
    """Return what to write for a field that cannot be printed as a whole, None if it can."""
    kind = _decoded(kind)
    if pa.types.is_struct(kind):
        return f"name a part of it in your own template, such as {{{{ {_member(field, kind)} }}}}"
    if pa.types.is_map(kind):
        return f'name a key of it in your own template, such as {{{{ {field}["KEY"] }}}}'
    if is_list(kind):
        if _advice("one", kind.value_type) is None:
            return None
        inner = _decoded(kind.value_type)
        part = _member("one", inner) if pa.types.is_struct(inner) else 'one["KEY"]'
        return f"loop over it in your own template, such as {{% for one in {field} %}}{{{{ {part} }}}}; {{% endfor %}}"
    if pa.types.is_interval(kind) or pa.types.is_union(kind):
        return "save the column as text, or map the field to another column"
    return None


def _member(field: str, kind: pa.StructType) -> str:
    names = [member.name for member in kind]
    first = next((name for name, member in zip(names, kind, strict=True) if _is_text(member.type)), None)
    first = first or (names[0] if names else "PART")
    if not plausible(names):
        first = "PART"
    return f"{field}.{first}" if first.isidentifier() else f'{field}["{first}"]'


def _kind_name(kind: pa.DataType) -> str:
    kind = _decoded(kind)
    if is_list(kind):
        return f"lists of {_kind_name(kind.value_type)}"
    names = {"struct": pa.types.is_struct, "map": pa.types.is_map}
    return next((f"{name}s" for name, is_kind in names.items() if is_kind(kind)), f"{kind} values")
