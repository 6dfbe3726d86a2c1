"""Templates and the types of columns: what cannot be printed, and comparisons that never hold."""

from __future__ import annotations

import pyarrow as pa
import pytest

from gxr_batch.errors import TemplateError
from gxr_batch.job import Job
from gxr_batch.prompts import Templates
from gxr_batch.prompts.column_types import mismatch, refuse_nested
from gxr_batch.prompts.render import field_map

SCHEMA = pa.schema(
    {
        "label": pa.string(),
        "category": pa.dictionary(pa.int8(), pa.string()),
        "bytes": pa.binary(),
        "age": pa.int64(),
        "size": pa.float32(),
        "study": pa.struct([("id", pa.int8()), ("text", pa.string())]),
        "labels": pa.map_(pa.string(), pa.int8()),
        "words": pa.list_(pa.string()),
        "urgent": pa.bool_(),
        "taken": pa.date32(),
        "read_at": pa.timestamp("us"),
        "waited": pa.duration("s"),
        "studies": pa.list_(pa.struct([("text", pa.string())])),
    }
)


def looked_at(folder, source):
    path = folder / "own.md.j2"
    path.write_text(source)
    job = Job.model_validate({"name": "x", "input": {"path": "x.parquet"}, "prompt": {"template": str(path)}})
    templates = Templates(job.prompt)
    fields = field_map(templates, job, SCHEMA.names)
    refuse_nested(templates, fields, SCHEMA)
    return mismatch(templates, fields, SCHEMA)


NEVER = [
    "{% if label == 1.0 %}.{% endif %}",
    "{% if 1 == label %}.{% endif %}",
    "{% if label > 0 %}.{% endif %}",
    "{% if label in [0, 1] %}.{% endif %}",
    "{% if label is eq(1) %}.{% endif %}",
    "{% if 0 < label < 5 %}.{% endif %}",
    "{% if label | trim != -1 %}.{% endif %}",
    "{% if category == 1 %}.{% endif %}",
    "{% if bytes == 1 %}.{% endif %}",
    "{{ 'a' if label == 1 else 'b' }}",
    "{{ label * 10 }}",
    "{{ label + 1 }}",
    "{% if age == '65' %}.{% endif %}",
    "{% if size in ['1.2'] %}.{% endif %}",
    "{% if urgent == 'True' %}.{% endif %}",
    "{% if taken == '2024-01-31' %}.{% endif %}",
    "{% if read_at in ['2024-01-31'] %}.{% endif %}",
    "{% if waited == '1 day' %}.{% endif %}",
    "{% if words == 'Edema' %}.{% endif %}",
    "{% if taken > 2020 %}.{% endif %}",
    "{% if label == true %}.{% endif %}",
    "{% if label is true %}.{% endif %}",
    "{% if label is not false %}.{% endif %}",
    "{% if taken == true %}.{% endif %}",
]


@pytest.mark.parametrize("source", NEVER)
def test_a_comparison_of_text_with_a_number_is_found_before_any_row(tmp_path, source):
    error = looked_at(tmp_path, "x\n" + source)
    assert error is not None
    assert error.where == "template own.md.j2, line 2"
    assert any(
        step in error.next_step
        for step in ("| number", "without quotes", "| string", "alone", "`in words`", "taken.year")
    )


WELL = [
    "{% if label == '1.0' %}.{% endif %}",
    "{% if label | number == 1 %}.{% endif %}",
    "{% if label | float > 0 %}.{% endif %}",
    "{% if label | length > 3 %}.{% endif %}",
    "{% if age == 65 and size > 1.5 %}.{% endif %}",
    "{% if label %}.{% endif %}{{ age * 2 }}",
    "{% if age != '' %}.{% endif %}",
    "{% if label.count(',') > 2 %}.{% endif %}",
    "{% if age | string == '65' %}.{% endif %}",
    "{% if taken | string == '2024-01-31' and urgent | lower == 'true' %}.{% endif %}",
    "{% if urgent and urgent == true and urgent is true and age == true %}.{% endif %}",
    "{% if taken.year == 2024 and 'Edema' in words and words | join == 'Edema' %}.{% endif %}",
    "{{ waited * 2 }}",
]


@pytest.mark.parametrize("source", WELL)
def test_comparisons_of_one_kind_are_no_mismatch(tmp_path, source):
    assert looked_at(tmp_path, source) is None


@pytest.mark.parametrize(
    ("source", "what", "step"),
    [
        ("{{ study }}", "structs", "{{ study.text }}"),
        ("{{ study | clause }}", "structs", "{{ study.text }}"),
        ("{{ 'a' ~ study }}", "structs", "{{ study.text }}"),
        ("{{ labels }}", "maps", '{{ labels["KEY"] }}'),
        ("{{ studies }}", "lists of structs", "{% for one in studies %}{{ one.text }}; {% endfor %}"),
    ],
)
def test_a_column_without_a_text_form_is_refused_with_what_to_write(tmp_path, source, what, step):
    with pytest.raises(TemplateError) as caught:
        looked_at(tmp_path, source)
    assert f"holds {what}, which cannot be printed as a whole" in caught.value.what
    assert step in caught.value.next_step


@pytest.mark.parametrize(
    "source",
    [
        "{{ study.text }}",
        "{% if study %}{{ study['text'] }}{% endif %}",
        "{{ labels.Edema }}{{ labels['Edema'] }}",
        "{% for name, value in labels %}{{ name }}{% endfor %}",
        "{% for one in studies %}{{ one.text }}{% endfor %}",
        "{{ studies | map(attribute='text') | join('; ') }}",
        "{{ words }}{{ words | join(', ') }}{{ words[0] }}",
        "{{ study | tojson }}",
    ],
)
def test_a_column_that_is_taken_apart_is_fine(tmp_path, source):
    assert looked_at(tmp_path, source) is None
