"""Templates: what they need, how they read, and that nobody gets out of them."""

from __future__ import annotations

import itertools
import re

import pytest

from gxr_batch.errors import RowError, TemplateError
from gxr_batch.job import Job, PromptSection
from gxr_batch.prompts import field_map, render, row_template
from gxr_batch.templates import Templates, compile_template
from gxr_batch.templates.words import clause, patient


def text(template: str, **values) -> str:
    return render(Templates(PromptSection()).get(template), values, system="").turns[-1].text


def own(source: str):
    return compile_template("own", source, "own.md.j2")


def test_the_guides_clinical_case_comes_out_word_for_word():
    assert text(
        "clinical_case",
        age=65,
        sex="male",
        history="smoking",
        presentation="shortness of breath and cough for 3 days",
        findings="increased opacity in the right lower lobe with some air bronchograms visible.",
    ) == (
        "You are an expert radiologist. Analyze this chest X-ray of a 65-year-old male with a history of smoking, "
        "presenting with shortness of breath and cough for 3 days. The X-ray shows increased opacity in the right "
        "lower lobe with some air bronchograms visible."
    )


def test_the_guides_basic_and_comparative_layouts_come_out_word_for_word():
    assert text("basic", findings="a small pleural effusion") == (
        "You are an expert radiologist. Analyze this chest X-ray showing a small pleural effusion."
    )
    assert text("comparative", condition_a="pulmonary edema", condition_b="pneumonia") == (
        "You are an expert radiologist. Compare the findings in a chest X-ray showing pulmonary edema versus one "
        "showing pneumonia. What are the key differentiating features?"
    )


def test_the_educational_template_teaches_its_topic():
    topic = "what characteristics differentiate bacterial pneumonia from viral pneumonia"
    assert text("educational", topic=topic).startswith(
        f"You are an expert radiologist teaching medical students. Explain {topic} on a chest X-ray."
    )


OPTIONAL = {
    "age": [None, "65", 8, "6 months"],
    "sex": [None, "F", "unknown"],
    "history": [None, "smoking."],
    "presentation": [None, "cough"],
    "comparison": [None, "none available."],
}


@pytest.mark.parametrize("findings", ["clear lungs", "The lungs are clear. No effusion."])
def test_every_combination_of_present_and_missing_cells_reads_as_a_sentence(findings):
    for values in itertools.product(*OPTIONAL.values()):
        made = text("clinical_case", findings=findings, **dict(zip(OPTIONAL, values, strict=True)))
        assert not re.search(r"  | [.,]|\.\.|,\.|None|^\s|\s$|\n", made), made
        assert made.endswith(".")
        assert ("with a history of smoking" in made) == (values[2] is not None)


@pytest.mark.parametrize(
    ("age", "sex", "words"),
    [
        (65, "M", "a 65-year-old male"),
        ("8", "girl", "an 8-year-old girl"),
        (11.0, "F", "an 11-year-old female"),
        ("18 years", "man", "an 18-year-old man"),
        ("6 months", "male", "a 6-month-old male"),
        ("3 wks", None, "a 3-week-old patient"),
        (None, "F", "a female patient"),
        (None, None, "a patient"),
        ("elderly", "woman", "an elderly woman"),
        ("65", "unknown", "a 65-year-old patient"),
    ],
)
def test_patients_are_named_as_people_name_them(age, sex, words):
    assert patient(age, sex) == words


def test_a_clause_loses_its_full_stop_and_a_sentence_gets_its_lead():
    assert clause(" Clear lungs. ", lead="the following: ") == "the following: Clear lungs"
    assert clause("clear lungs.", lead="the following: ") == "clear lungs"
    assert clause("ETT tip at the carina", lead="the following: ") == "ETT tip at the carina"
    assert clause(2.0) == "2"


def test_a_field_that_an_if_asks_about_is_optional_and_any_other_is_required():
    made = own("Start. {{ findings }}{% if age %} {{ age }}{% endif %}{{ ' ' ~ sex if sex else '' }} {{ view }}")
    assert made.fields == ("findings", "age", "sex", "view")
    assert made.required == ("findings", "view")
    assert made.literal_prefix == "Start. "


def test_the_same_text_with_other_line_ends_is_the_same_template():
    assert own("a\r\n{{ x }}").sha256 == own("a\n{{ x }}").sha256
    assert own("a\n{{ x }} ").sha256 != own("a\n{{ x }}").sha256


@pytest.mark.parametrize("empty", [None, "", "   "])
def test_a_row_without_a_required_field_fails_with_the_fields_name(empty):
    with pytest.raises(RowError) as caught:
        text("basic", findings=empty)
    assert caught.value.what == "the template basic needs findings, which this row does not have"


def test_a_row_that_breaks_its_template_fails_without_its_text():
    broken = own("{{ findings.split(':')[1] }}")
    with pytest.raises(RowError) as caught:
        render(broken, {"findings": "canary"}, system="")
    assert "canary" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_cell_is_never_read_as_a_template():
    assert "{{ 7 * 7 }}{% raw %}" in text("basic", findings="{{ 7 * 7 }}{% raw %}")


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
def test_known_ways_out_of_the_sandbox_lead_nowhere(source):
    try:
        made = own(source)
    except TemplateError:
        return
    with pytest.raises(RowError):
        render(made, dict.fromkeys(made.fields, "x"), system="")


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


def test_own_templates_are_found_by_name_and_by_path(tmp_path):
    path = tmp_path / "own.md.j2"
    path.write_text("{# Mine. #}\nLook: {{ findings }}\n")
    by_name = Templates(PromptSection(template="mine", templates={"mine": str(path)}))
    assert by_name.default.source == Templates(PromptSection(template=str(path))).default.source
    assert by_name.available()["mine"] == "Mine."
    assert render(by_name.default, {"findings": "x"}, system="").turns[0].text == "Look: x"


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(TemplateError) as caught:
        Templates(PromptSection(template="clinical_cas"))
    assert caught.value.next_step == "did you mean clinical_case?"


def test_a_missing_template_file_is_named_with_its_absolute_path(tmp_path):
    with pytest.raises(TemplateError) as caught:
        Templates(PromptSection(template=str(tmp_path / "none.j2")))
    assert str(tmp_path / "none.j2") in caught.value.where


def test_the_system_text_stands_in_a_turn_of_its_own():
    made = render(Templates(PromptSection()).get("basic"), {"findings": "x"}, system=" Be brief. ")
    assert tuple(made.turns[0]) == ("system", "Be brief.")
    assert made.turns[1].role == "user"
    assert made.turns[1].text[: made.literal_chars].endswith("showing ")


def job(**sections) -> Job:
    return Job.model_validate({"name": "x", "input": {"path": "x.csv"}, **sections})


def test_everything_that_the_table_lacks_is_named_at_once_with_the_nearest_columns():
    work = job(
        input={"path": "x.csv", "columns": {"history": "indicaton"}},
        prompt={"template": "comparative", "template_column": "kind"},
    )
    with pytest.raises(TemplateError) as caught:
        field_map(Templates(work.prompt), work, ["condition", "indication", "uid"])
    assert "condition_a (nearest: condition), condition_b (nearest: condition)" in caught.value.what
    assert "indicaton (nearest: indication)" in caught.value.what
    assert "kind" in caught.value.what
    assert "[input.columns]" in caught.value.next_step


def test_a_mapping_for_a_field_that_no_template_uses_is_refused():
    work = job(input={"path": "x.csv", "columns": {"findngs": "text"}}, prompt={"template": "basic"})
    with pytest.raises(TemplateError, match=r"findngs \(nearest: findings\)"):
        field_map(Templates(work.prompt), work, ["text", "findings"])


def test_foreign_columns_fill_fields_by_their_mapping():
    work = job(input={"path": "x.csv", "columns": {"history": "indication"}})
    fields = field_map(Templates(work.prompt), work, ["uid", "indication", "comparison", "findings"])
    assert fields.columns == {"history": "indication", "comparison": "comparison", "findings": "findings"}


def test_a_template_column_may_name_any_template_but_no_path():
    work = job(prompt={"template": "basic", "template_column": "kind"})
    templates = Templates(work.prompt)
    fields = field_map(templates, work, ["findings", "topic", "kind"])
    assert set(fields.templates) >= {"basic", "educational", "comparative", "clinical_case"}
    assert row_template(templates, "educational").name == "educational"
    with pytest.raises(RowError) as caught:
        row_template(templates, "../canary.j2")
    assert "canary" not in str(caught.value)
