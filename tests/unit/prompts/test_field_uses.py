"""Which fields a template needs: what replaces a missing cell, and what each row must have."""

from __future__ import annotations

import pytest

from gxr_batch.errors import RowError
from gxr_batch.job import PromptSection
from gxr_batch.prompts import Templates, compile_template
from gxr_batch.prompts.library import builtin_names
from gxr_batch.prompts.render import render


def own(source: str):
    return compile_template("own", source, "own.md.j2")


def text(source: str, **cells) -> str:
    return render(own(source), cells, system="").turns[0].text


def failure(source: str, **cells) -> str:
    with pytest.raises(RowError) as caught:
        text(source, **cells)
    return caught.value.what.removeprefix("the template own ")


OPTIONAL = [
    "{{ x | default('none') }}",
    "{{ x | d('none', true) }}",
    "{{ x | trim | default('none') }}",
    "{{ x | clause | default('none', true) }}",
    "{{ x or 'none' }}",
    "{{ 'none' if not x else x }}",
    "{{ x if flag else 'none' }}",
    "{{ x if x is defined else 'none' }}",
    "{{ 'yes' if x is none else x }}",
    "{% if x is defined %}{{ x }}{% endif %}none",
    "{% for label, value in [('X', x)] if value %}{{ label }}{% else %}none{% endfor %}",
    "{% for label, value in [('X', x)] %}{% if value %}{{ label }}{% endif %}{% endfor %}none",
    "{% for one in x %}{{ one }}{% else %}none{% endfor %}",
    "{% set one = x or 'none' %}{{ one }}",
    "{% set one = x %}{% if one %}{{ one }}{% endif %}none",
    "{{ x.part or 'none' }}",
    "{{ (x | number) or 'none' }}",
    "{% if x == 'a' %}{{ x }}{% else %}none{{ x }}{% endif %}",
    "{% if flag %}{% elif x == 'a' %}{{ x }}{% else %}none{{ x }}{% endif %}",
    "{{ x if x == 'a' else 'none' }}",
    "{% if x != '' %}{% endif %}{{ x }}none",
    "{% if x != none %}{% endif %}{{ x }}none",
    "{% for value in [x] %}{% if value == 1 %}{{ value }}{% endif %}{% endfor %}none",
]


@pytest.mark.parametrize("source", OPTIONAL)
def test_a_field_with_something_in_its_place_is_optional(source):
    assert "x" not in own(source).required
    assert text(source) in {"none", "yes"}


REQUIRED = [
    "{{ x }}",
    "{{ x | upper }}",
    "{{ x.part }}",
    "a{{ x ~ 'b' }}",
    "{{ x | default('none') }} {{ x }}",
    "{% for one in x %}{{ one }}{% endfor %}a",
    "{{ y or 'none' }}{{ x }}",
    "{% if y %}{{ x }}{% endif %}a",
    "{% if x == 'normal' %}Be brief. {% endif %}a{{ x }}",
    "{% if x is eq 'normal' or x in ['a', 'b'] %}Be brief. {% endif %}a{{ x }}",
    "{{ 'Be brief. ' if x == 'normal' }}a{{ x }}",
]


@pytest.mark.parametrize("source", REQUIRED)
def test_any_other_field_is_required(source):
    assert "x" in own(source).required
    assert failure(source, y="y") == "needs x, which this row does not have"


def test_a_row_that_lacks_all_alternatives_fails_and_names_them():
    source = "Report: {{ findings or impression }}"
    assert text(source, impression="normal") == "Report: normal"
    assert failure(source) == "needs findings or impression, which this row does not have"
    assert failure("R: {{ findings if findings else impression }}").startswith("needs findings or impression, ")
    assert failure("R: {{ (findings or impression) | upper }}").startswith("needs findings or impression, ")
    assert failure("R: {{ findings | default(impression) }}").startswith("needs findings or impression, ")


def test_what_only_one_branch_builds_on_is_needed_only_there():
    source = "{{ ('of ' ~ size ~ ' cm') if measured else 'not measured' }}"
    assert own(source).required == ()
    assert text(source) == "not measured"
    assert text(source, measured="yes", size="2") == "of 2 cm"
    assert failure(source, measured="yes") == "needs size, which this row does not have"
    assert failure("{{ findings or ('prior: ' ~ prior) }}") == "needs prior, which this row does not have"


def test_alternatives_that_a_condition_asks_about_may_all_be_missing_as_before():
    source = "{% if a %}A{% endif %}{% if b %}B{% endif %}-{{ a or b }}"
    assert text(source) == "-"


def test_an_empty_prompt_is_refused():
    assert failure("{% for one in [a, b] if one %}{{ one }}{% endfor %}") == "gives an empty prompt"


def test_no_prompt_says_none_for_a_missing_cell():
    for name in ("upper", "lower", "title", "capitalize", "trim", "string", "replace('a', 'b')", "truncate(5)"):
        assert text("{% if x %}{% endif %}-{{ x | " + name + " }}") == "-"


def test_what_is_joined_shows_cells_as_prompts_do_and_no_missing_ones():
    optional = "{% if age or sex %}{% endif %}"
    assert text(optional + "{{ age ~ ', ' ~ sex }}", age=65.0) == "65,"
    assert text(optional + "{{ [age, sex, x | default(none)] | join(', ') }}", age=65.0) == "65"
    assert text("{{ age | string }} {{ age | string == '65' }}", age=65.0) == "65 True"
    assert text("{{ words | join('-') }}{{ 'abc' | join('.') }}", words=[1.0, None, "x"]) == "1-xa.b.c"
    assert text("{{ parts | join('; ', attribute='a') }}", parts=[{"a": "x"}, {"a": "y"}]) == "x; y"
    assert "cannot be filled" in failure("{{ 'a' ~ nothing.at.all }}", nothing=1)


def test_a_run_that_began_under_version_1_of_the_rules_keeps_them():
    def before(source: str, **cells) -> str:
        return render(compile_template("own", source, "own.md.j2", 1), cells, system="").turns[0].text

    optional = "{% if age or sex %}{% endif %}"
    assert before(optional + "{{ age ~ ', ' ~ sex }}", age=65.0) == "65.0, None"
    assert before(optional + "{{ [age, sex] | join(', ') }}", age=65.0) == "65.0, None"
    assert before("{{ age | string }}", age=65.0) == "65.0"
    assert before("{% if x == 'normal' %}Be brief. {% endif %}a{{ x }}") == "a"
    assert before("{{ patient(age, sex) }}", age="65", sex="w") == "a 65-year-old w patient"


def test_a_member_that_the_row_lacks_is_missing_like_a_cell():
    assert text("{{ study.text or study.summary }}", study={"text": None, "summary": "normal"}) == "normal"
    assert failure("R: {{ study.text }}", study={"text": None}) == "needs study.text, which this row does not have"


def test_number_reads_text_and_leaves_a_missing_cell_without_a_value():
    source = "{% if edema | number == 1 %}edema{% endif %}{% if mass | number %}mass{% endif %}-"
    assert text(source, edema="1.0", mass="0.0") == "edema-"
    assert text(source, edema="1", mass=" 2 ") == "edemamass-"
    assert text(source, edema="NA", mass=None) == "-"
    assert text("{% if age | number > 60 %}old{% endif %}-") == "-"
    assert text("{{ size | number * 10 }} mm", size="2.5") == "25 mm"
    assert text("{{ size | number }}", size="\N{MINUS SIGN}1.50") == "-1.5"


@pytest.mark.parametrize("cell", ["positive", "1,234", "2,5", "1.2.3", "9" * 500, "0x1f", "1_000"])
def test_number_refuses_what_is_no_number_or_two(cell):
    what = failure("{{ x | number }}", x=cell)
    assert what == "needs a number where this row has other text"


def test_a_template_whose_missing_cells_read_otherwise_than_before_has_another_fingerprint():
    for source in ("{% if x is defined %}{{ x }}{% endif %}", "{% if x %}.{% endif %}{{ x | d('none') }}"):
        assert own(source).fingerprint != own(source).sha256
    for source in ("{{ x | default('none') }}", "{{ x or y }}", "{% if x %}{{ x | clause }}{% endif %}"):
        assert own(source).fingerprint == own(source).sha256
    templates = Templates(PromptSection())
    for name in builtin_names():
        assert templates.get(name).fingerprint == templates.get(name).sha256
