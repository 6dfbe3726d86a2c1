"""Prompts: how rows read in each template, and which columns fill which fields."""

from __future__ import annotations

import itertools
import re
from decimal import Decimal

import pytest

from gxr_batch.errors import RowError, TemplateError
from gxr_batch.job import Job, PromptSection
from gxr_batch.prompts import Templates, compile_template
from gxr_batch.prompts.filters import clause, patient, printed, stop
from gxr_batch.prompts.render import field_map, render, row_template, unfilled


def text(template: str, **values) -> str:
    return render(Templates(PromptSection()).get(template), values, system="").turns[-1].text


def own(source: str):
    return compile_template("own", source, "own.md.j2")


def test_the_guides_clinical_case_is_reproduced_word_for_word():
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


def test_the_guides_basic_and_comparative_layouts_are_reproduced_word_for_word():
    assert text("basic", findings="a small pleural effusion") == (
        "You are an expert radiologist. Analyze this chest X-ray showing a small pleural effusion."
    )
    assert text("comparative", condition_a="pulmonary edema", condition_b="pneumonia") == (
        "You are an expert radiologist. Compare the findings in a chest X-ray showing pulmonary edema versus one "
        "showing pneumonia. What are the key differentiating features?"
    )


def test_the_guides_educational_layout_is_reproduced_word_for_word_also_for_one_topic():
    topic = "what characteristics differentiate bacterial pneumonia from viral pneumonia"
    assert text("educational", topic=topic) == (
        f"You are an expert radiologist teaching medical students. Explain {topic} on a chest X-ray. "
        "Describe the typical presentation of each."
    )
    assert text("educational", topic="tension pneumothorax").endswith("Describe the typical presentation.")


OPTIONAL = {
    "age": [None, "65", 0, 8.0, float("nan"), "6 months", "90+", "unknown"],
    "sex": [None, "F", "unknown", "1"],
    "history": [None, "smoking.", "prior TB?"],
    "presentation": [None, "cough", "fever,"],
    "comparison": [None, "none available."],
}


@pytest.mark.parametrize("findings", ["clear lungs", "The lungs are clear. No effusion.", " pneumothorax? "])
def test_every_combination_of_present_and_missing_cells_reads_as_a_sentence(findings):
    for values in itertools.product(*OPTIONAL.values()):
        made = text("clinical_case", findings=findings, **dict(zip(OPTIONAL, values, strict=True)))
        assert not re.search(r"  | [.,?]|\.\.|,\.|\?\.|,,|\( | \)|None|nan|\.0|^\s|\s$|\n", made), made
        assert made.endswith((".", "?"))
        assert ("with a history of " in made) == (values[2] is not None)


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
        (0, "M", "a 0-year-old male"),
        ("0.5", "F", "a 0.5-year-old female"),
        ("065Y", "M", "a 65-year-old male"),
        ("65 y/o", "f", "a 65-year-old female"),
        ("6 months old", "Female", "a 6-month-old female"),
        ("one-year-old", "boy", "a one-year-old boy"),
        ("Elderly", None, "an elderly patient"),
        ("n/a", "male", "a male patient"),
        ("90+", "M", "a male patient (age: 90+)"),
        ("1 year 6 months", "girl", "a girl (age: 1 year 6 months)"),
        (65, 2.0, "a 65-year-old patient"),
        (65, "intersex", "a 65-year-old intersex patient"),
        (65, "W", "a 65-year-old female"),
        ("8 Monate", "männlich", "a male patient (age: 8 Monate)"),
        (65, "d", "a 65-year-old patient"),
    ],
)
def test_patients_are_described_as_people_describe_them(age, sex, words):
    assert patient(age, sex) == words


def test_a_clause_loses_its_full_stop_and_a_sentence_gets_a_lead():
    assert clause(" Clear lungs. ", lead="the following: ") == "the following: Clear lungs"
    assert clause("clear lungs.", lead="the following: ") == "clear lungs"
    assert clause("ETT tip at the carina", lead="the following: ") == "ETT tip at the carina"
    assert clause("A nodule,", lead="the following: ") == "the following: A nodule"
    assert clause(2.0) == "2"
    assert (stop("PE?"), stop("clear."), stop(None)) == ("", ".", ".")


@pytest.mark.parametrize("empty", [None, "", "   "])
def test_a_row_without_a_required_field_fails_and_names_the_field(empty):
    with pytest.raises(RowError) as caught:
        text("basic", findings=empty)
    assert caught.value.what == "the template basic needs findings, which this row does not have"


def test_a_row_that_breaks_its_template_fails_without_quoting_its_text():
    broken = own("{{ findings.split(':')[1] }}")
    with pytest.raises(RowError) as caught:
        render(broken, {"findings": "canary"}, system="")
    assert "canary" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_cell_is_never_read_as_a_template():
    assert "{{ 7 * 7 }}{% raw %}" in text("basic", findings="{{ 7 * 7 }}{% raw %}")


def test_spaces_from_a_template_are_kept_and_spaces_around_a_cell_are_removed():
    made = own("X-ray{{ ' of a ' ~ age ~ '-year-old' if age }}: {{ findings }}")
    assert render(made, {"age": " 65 ", "findings": " x\n"}, system="").turns[0].text == "X-ray of a 65-year-old: x"


def test_parquet_numbers_print_as_people_write_them():
    values = [65.0, 65.5, Decimal("65.0"), 65, None, "65.0", True]
    assert [str(printed(value)) for value in values] == ["65", "65.5", "65", "65", "", "65.0", "True"]
    with pytest.raises(RowError, match="needs findings"):
        text("basic", findings=float("nan"))


def test_the_system_text_is_a_separate_turn():
    made = render(Templates(PromptSection()).get("basic"), {"findings": "x"}, system=" Be brief. ")
    assert tuple(made.turns[0]) == ("system", "Be brief.")
    assert made.turns[1].role == "user"
    assert made.turns[1].text[: made.literal_chars].endswith("showing ")


def job(**sections) -> Job:
    return Job.model_validate({"name": "x", "input": {"path": "x.csv"}, **sections})


def test_everything_that_the_table_lacks_is_named_at_once_with_the_closest_columns():
    work = job(
        input={"path": "x.csv", "columns": {"history": "indicaton"}},
        prompt={"template": "comparative", "template_column": "kind"},
    )
    with pytest.raises(TemplateError) as caught:
        field_map(Templates(work.prompt), work, ["condition", "indication", "uid"])
    assert "condition_a (closest: condition), condition_b (closest: condition)" in caught.value.what
    assert "indicaton (closest: indication)" in caught.value.what
    assert "kind" in caught.value.what
    assert "[input.columns]" in caught.value.next_step


def test_a_mapping_for_a_field_that_no_template_uses_is_refused():
    work = job(input={"path": "x.csv", "columns": {"findngs": "text"}}, prompt={"template": "basic"})
    with pytest.raises(TemplateError, match=r"findngs \(closest: findings\)"):
        field_map(Templates(work.prompt), work, ["text", "findings"])


def test_mapped_columns_fill_fields():
    work = job(input={"path": "x.csv", "columns": {"history": "indication"}})
    fields = field_map(Templates(work.prompt), work, ["uid", "indication", "comparison", "findings"])
    assert fields.columns == {"history": "indication", "comparison": "comparison", "findings": "findings"}


def test_a_template_column_may_name_any_template_but_not_a_path():
    work = job(prompt={"template": "basic", "template_column": "kind"})
    templates = Templates(work.prompt)
    fields = field_map(templates, work, ["findings", "topic", "kind"])
    assert set(fields.templates) >= {"basic", "educational", "comparative", "clinical_case"}
    assert row_template(templates, "educational").name == "educational"
    with pytest.raises(RowError) as caught:
        row_template(templates, "../canary.j2")
    assert caught.value.what == "column kind names a template that does not exist"


@pytest.mark.parametrize("column", ["id   findings", "id^findings", "id~Findings"])
def test_a_table_that_was_read_as_one_column_gets_a_hint_about_its_delimiter(column):
    job = Job.model_validate({"name": "x", "input": {"path": "x.csv"}, "prompt": {"template": "basic"}})
    with pytest.raises(TemplateError) as caught:
        field_map(Templates(job.prompt), job, [column])
    assert caught.value.next_step.startswith("the table was read as one column: set input.delimiter")
    with pytest.raises(TemplateError) as caught:
        field_map(Templates(job.prompt), job, ["Report findings"])
    assert 'findings = "Report findings"' in caught.value.next_step


def test_an_optional_field_that_no_column_fills_is_reported_if_one_was_probably_meant(tmp_path):
    path = tmp_path / "own.md.j2"
    path.write_text("{{ findings }} {{ histroy or Sex or '' }} {{ source_text or '' }} {{ size or '' }}")
    job = Job.model_validate({"name": "x", "input": {"path": "x.csv"}, "prompt": {"template": str(path)}})
    templates = Templates(job.prompt)

    def said(*columns):
        found = unfilled(templates, field_map(templates, job, columns), columns)
        return sorted(found, key=str.lower)

    assert said("findings", "history", "sex", "source_text") == [
        "no column fills the field histroy of the template own.md.j2; did you mean history?",
        "no column fills the field Sex of the template own.md.j2; did you mean sex?",
    ]
    assert said("findings", "histroy", "Sex", "text") == [
        "no column fills the field source_text of the template own.md.j2; columns that begin with source_ come from a "
        "run folder as input.path"
    ]
    assert said("findings", "source_row_id", "source_text") == []
