"""Templates: what they need, how they compile, and that none can leave the sandbox or run forever."""

from __future__ import annotations

from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import pytest

from gxr_batch.errors import RowError, TemplateError
from gxr_batch.job import PromptSection
from gxr_batch.prompts import Templates, compile_template, library
from gxr_batch.prompts.render import render


def own(source: str):
    return compile_template("own", source, "own.md.j2")


def test_a_field_tested_by_an_if_is_optional_and_any_other_is_required():
    made = own("Start. {{ findings }}{% if age %} {{ age }}{% endif %}{{ ' ' ~ sex if sex else '' }} {{ view }}")
    assert made.fields == ("findings", "age", "sex", "view")
    assert made.required == ("findings", "view")
    assert made.literal_prefix == "Start. "


def test_the_same_text_with_other_line_ends_is_the_same_template():
    assert own("a\r\n{{ x }}").sha256 == own("a\n{{ x }}").sha256
    assert own("a\n{{ x }} ").sha256 != own("a\n{{ x }}").sha256


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ findings.__class__.__base__.__subclasses__() }}",
    "{{ findings|attr('__class__') }}{{ (findings|attr('__class__')).mro() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ '%s'.format.__self__ }}{{ '{0.__class__}'.format(findings) }}",
    "{{ ''['format_map']({'x': 1}).__class__ }}",
    "{{ patient.__globals__ }}",
    "{{ findings.__init__.__globals__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_known_ways_out_of_the_sandbox_are_refused(source):
    try:
        made = own(source)
    except TemplateError:
        return
    with pytest.raises(RowError):
        render(made, dict.fromkeys(made.fields, "x"), system="")


ENDLESS = [
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'x' * 10 ** 9 }}{{ findings }}",
    "{{ [findings] * 10 ** 9 }}",
    "{{ findings.ljust(5000000, '.') }}",
    "{% for a in findings %}{% for b in findings %}{% for c in findings %}.{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in findings %}{% for b in findings %}{% for c in findings %}{% set d = a %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}{{ findings }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}{{ findings }}",
    "{% for i in range(10 ** 9) %}{{ findings }}{% endfor %}",
    "{{ '%999999999d' % 1 }}{{ '%*d' % (999999999, 1) }}",
    "{{ '%*d'|format(999999999, 1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=999999999) }}",
    "{{ findings|center(999999999) }}",
    "{{ ['a']|map('center', 999999999)|list }}",
    "{{ (findings|safe).ljust(999999999) }}",
    "{{ ('x' * 99999)|replace('x', 'y' * 99999) }}",
    "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "{{ ('x' * 99999).join((findings * 30)|list) }}",
    "{{ (findings * 30)|list|join('x' * 99999) }}",
    "{{ ('\\t' * 9999).expandtabs(9999) }}",
    "{{ ('a\\n' * 9999)|indent('b' * 9999) }}",
    "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "{{ (1).to_bytes(999999999, 'big') }}",
    "{{ 123|round(-999999999) }}{{ 123|round(999999999, 'ceil') }}",
    "{{ '%999999999d'.encode() % 1 }}",
    "{{ ('{0}' * 30000).format(findings * 30) }}",
    "{{ ('%(x)s' * 19999) % {'x': findings * 30} }}",
    "{{ (findings * 30)|map('replace', 'x', 'y' * 99999)|join }}",
    "{{ (findings * 30)|map('replace', 'x', 'y' * 99999)|sort }}",
    "{% for a in findings recursive %}{% if loop.depth < 9 %}{{ loop(findings) }}{% endif %}{% endfor %}",
    "{% macro m(n, t) %}{% if n %}{{ m(n - 1, t ~ t) }}{% else %}{{ t }}{% endif %}{% endmacro %}{{ m(60, findings) }}",
    "{% macro m(n, t) %}{% if n %}{{ m(n - 1, t + t) }}{% else %}{{ t }}{% endif %}{% endmacro %}{{ m(60, findings) }}",
    "{% macro m(n, t) %}{% if n %}{{ m(n - 1, t * t) }}{% else %}{{ t }}{% endif %}{% endmacro %}{{ m(60, 9) }}",
    "{% macro m(n, t) %}{% if n %}{{ m(n - 1, [t, t]) }}{% else %}{{ t }}{% endif %}{% endmacro %}"
    "{{ m(60, findings) }}",
    "{% macro m(n, t) %}{% if n %}{{ m(n - 1, {1: t, 2: t}) }}{% else %}{{ t|string }}{% endif %}{% endmacro %}"
    "{{ m(60, findings) }}",
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_that_would_never_end_is_refused_at_once(source):
    try:
        made = own(source)
    except TemplateError:
        return
    with pytest.raises(RowError):
        render(made, dict.fromkeys(made.fields, "x" * 3000), system="")


def test_ordinary_text_operations_give_the_same_as_jinja():
    made = own(
        "{{ findings ~ 1 }} {{ findings + '!' }} {{ '%s-%03d' % (findings, 4) }} {{ '{:>3}'.format(2) }} {{ 3 * 4 }}"
        "{{ '{a}'.format_map({'a': 5}) }} {{ ['a', 'b']|join(', ') }} {{ ', '.join('ab') }} {{ findings|center(5) }}"
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(findings) }}{% set b %}[{{ findings }}]{% endset %}{{ b }}"
        " {{ '%s'|format(99999) }} {{ findings|indent(2) }} {{ [findings]|tojson }} {{ findings|replace('x', 'yy') }}"
    )
    assert render(made, {"findings": "x"}, system="").turns[0].text == (
        'x1 x! x-004   2 125 a, b a, b   x  <x>[x] 99999 x ["x"] yy'
    )


@pytest.mark.parametrize("source", ["{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "9" * 6000 + " }}"])
def test_a_template_nested_too_deeply_for_python_is_a_template_error(source):
    with pytest.raises(TemplateError, match="nested too deeply"):
        own(source)


def test_loops_keep_jinjas_loop_variables():
    made = own(
        "{% for f in findings.split(';') %}{{ loop.index }}/{{ loop.length }} {{ f }}"
        "{{ ', ' if not loop.last }}{% endfor %}"
    )
    assert render(made, {"findings": "a;b"}, system="").turns[0].text == "1/2 a, 2/2 b"


def test_a_recursive_loop_and_lists_give_the_same_as_jinja():
    made = own(
        "{% for f in [[1, 2], 3] recursive %}{{ loop(f) if f is iterable else f }}{{ loop.last }} {% endfor %}"
        "{{ ['abc', 'de']|map('center', 5)|join('|') }} {{ findings|batch(2)|list }} {{ '{:>{w}}'.format(1, w=3) }}"
        "{% for a, b in [(1, 2)] %} {{ a }}{{ b }}{% endfor %}{% set a, b = 1, 2 %} {{ a + b }} {{ {'x': a}|tojson }}"
    )
    assert render(made, {"findings": "x"}, system="").turns[0].text == (
        "1False 2True False 3True  abc |  de  [['x']]   1 12 3 {\"x\": 1}"
    )


def test_a_decimal_of_a_parquet_table_can_be_multiplied():
    assert render(own("{{ size * 10 }} mm"), {"size": Decimal("2.5")}, system="").turns[0].text == "25 mm"


def test_a_function_can_be_called_in_a_loop_and_with_keyword_arguments():
    made = own(
        "{% for age in findings.split(';') %}{{ patient(age, 'm') }}, {{ patient(sex='f', age=age) }}; {% endfor %}"
    )
    said = "a 5-year-old male, a 5-year-old female; an 8-year-old male, an 8-year-old female;"
    assert render(made, {"findings": "5;8"}, system="").turns[0].text == said


def test_a_function_cannot_be_used_as_a_field():
    with pytest.raises(TemplateError, match="patient is a function") as caught:
        own("Fine.\n{{ patient }}")
    assert caught.value.where == "own.md.j2, line 2"
    assert own("{% set patient = age %}{{ patient }}").fields == ("age",)


@pytest.mark.parametrize("source", ["{% include '/etc/passwd' %}", "{% import 'x' as y %}", "{% extends 'x' %}"])
def test_templates_cannot_read_files(source):
    with pytest.raises(TemplateError, match="cannot include or import"):
        own(source)


def test_a_template_that_does_not_compile_names_its_line(tmp_path):
    path = tmp_path / "own.md.j2"
    path.write_text("fine\n{% if findings %}\n")
    with pytest.raises(TemplateError) as caught:
        Templates(PromptSection(template=str(path)))
    assert caught.value.where.startswith(f"{path}, line ")


def test_user_templates_are_found_by_name_and_by_path(tmp_path):
    path = tmp_path / "own.md.j2"
    path.write_text("{# Mine. #}\nLook: {{ findings }}\n")
    by_name = Templates(PromptSection(template="mine", templates={"mine": str(path)}))
    assert by_name.default.source == Templates(PromptSection(template=str(path))).default.source
    assert by_name.available()["mine"] == "Mine."
    assert render(by_name.default, {"findings": "x"}, system="").turns[0].text == "Look: x"


def test_an_unknown_template_names_the_closest():
    with pytest.raises(TemplateError) as caught:
        Templates(PromptSection(template="clinical_cas"))
    assert caught.value.next_step == "did you mean clinical_case?"


def test_a_missing_template_file_is_named_with_its_absolute_path(tmp_path):
    with pytest.raises(TemplateError) as caught:
        Templates(PromptSection(template=str(tmp_path / "none.j2")))
    assert str(tmp_path / "none.j2") in caught.value.where


def test_every_template_has_a_one_line_description():
    for name, purpose in Templates(PromptSection()).available().items():
        assert purpose, name
        assert "\n" not in purpose
    assert own("{# Two\n   lines. #}{{ x }}").description == "Two lines."


PROMPTS = Path(library.__file__).parent
BYTES = {
    "basic": "949a81b9821988d362d3a5decb88b46961ff22e903dffe9fe472c1b42d6b3001",
    "clinical_case": "e92831e46432504cf052e082a330fbd55ffec13ae953d208904f37a36f6c20fb",
    "comparative": "e053289901286b3a7188c648300323fe627fd649935ca7c31453d75a77ac7c14",
    "educational": "d3fd977d71f162cf01547f2333ebc5ed0e93ae02c776af9deb86d4e292cef5be",
}


def test_no_byte_of_a_built_in_template_changes_because_existing_runs_use_it():
    assert {name: sha256((PROMPTS / f"{name}.md.j2").read_bytes()).hexdigest() for name in BYTES} == BYTES
