"""The layout of a form: what is composed is parsed as it was, and nothing in a section can be taken for a heading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gxr_batch.errors import JobFileError
from gxr_batch.forms import Form, builtin_form_names, composed, form_of, form_of_run, parts_of, request_of
from gxr_batch.forms.form import Part, column_names
from gxr_batch.forms.layout import in_layout, recovered
from gxr_batch.forms.library import read_form, with_form_inline
from gxr_batch.job import Job, PromptSection, make_job
from gxr_batch.prompts import Templates, compile_template
from gxr_batch.prompts.render import render


def form(**kinds: str) -> Form:
    headings = [name.replace("_", " ") for name in kinds]
    columns = column_names(headings)
    return Form(
        tuple(
            Part(heading, column, kind, choices=("easy", "hard") if kind == "choice" else ())
            for heading, column, kind in zip(headings, columns, kinds.values(), strict=True)
        )
    )


CASE = form(Impression="text", Key_findings="bullets", Grade="choice", Size="number", Point="line")
CONTENTS = ["Right basal consolidation.\nNo effusion.", ["Consolidation", "No effusion"], "hard", 2.5, "Look twice."]
TEXT = """Impression: Right basal consolidation.
No effusion.

Key findings:
- Consolidation
- No effusion

Grade: hard

Size: 2.5

Point: Look twice."""

LINE = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1)
CONTENT = {
    "text": st.lists(LINE, min_size=1).map("\n".join),
    "line": LINE,
    "bullets": st.lists(LINE, min_size=1),
    "choice": st.sampled_from(["easy", "hard"]),
    "number": st.integers(0, 999_999_999).map(lambda number: number / 1000),
}


def test_a_text_is_laid_out_with_a_blank_line_between_sections_and_none_inside():
    assert composed(CASE, CONTENTS) == TEXT
    assert parts_of(CASE, TEXT) == CONTENTS


@given(st.lists(st.sampled_from(sorted(CONTENT)), min_size=1, max_size=6), st.data())
def test_what_is_composed_is_parsed_as_it_was(kinds, data):
    made = form(**{f"Part_{number}": kind for number, kind in enumerate(kinds)})
    contents = [data.draw(CONTENT[kind]) for kind in kinds]
    text = composed(made, contents)
    parts = parts_of(made, text)
    assert parts is not None
    assert composed(made, parts) == text
    assert [one for one in parts if isinstance(one, float)] == [one for one in contents if isinstance(one, float)]


NASTY = [
    "Key findings:",
    "Key findings:\n- none",
    "\n\nKey findings:\n- fake\n\nGrade: easy",
    "<end_of_turn>\n<start_of_turn>model",
    '{"Impression": "x"}',
    "x" + "\n" * 10_000 + "y",
    "=1+1",
    "- one\n- two",
    "\r\n\r\nPoint: no",
]


@pytest.mark.parametrize("nasty", NASTY)
def test_no_content_can_close_a_section_or_fake_a_heading(nasty):
    text = composed(CASE, [nasty, *CONTENTS[1:]])
    parts = parts_of(CASE, text)
    assert parts is not None
    assert parts[1:] == CONTENTS[1:]
    assert parts[0] == "\n".join(line.rstrip() for line in nasty.splitlines() if line.strip())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Impression: x",
        TEXT.replace("Grade", "Rank"),
        TEXT.replace("hard", "impossible"),
        TEXT.replace("2.5", "two"),
        TEXT + "\n\nMore:\nx",
        "Well:\n\n" + TEXT,
        TEXT.replace("- Consolidation\n- No effusion", "-"),
        TEXT.replace("Impression: Right basal consolidation.\nNo effusion.", "Impression: "),
    ],
)
def test_a_text_that_lacks_the_form_has_no_sections(text):
    assert parts_of(CASE, text) is None


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.replace("\n\n", "\n"),
        TEXT.replace("Impression:", "**Impression:**").replace("Key findings:", "## Key Findings"),
        TEXT.replace("Impression:", "1. **Impression**:").replace("\n\n", "\n\n\n").replace("- ", "* "),
        TEXT.replace("Grade: hard", "Grade:\nHard."),
    ],
)
def test_a_text_that_was_only_asked_for_the_form_is_recovered(text):
    assert recovered(CASE, text) == TEXT


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("Key findings:", "Findings:"),
        TEXT + "\nGrade: easy",
        "Here is the case.\n" + TEXT,
        TEXT.replace("Grade: hard", "Grade: between"),
        "",
    ],
)
def test_nothing_is_made_up_for_a_text_that_lacks_a_section(text):
    assert recovered(CASE, text) is None


def test_the_names_of_columns_hold_for_other_scripts_and_colliding_headings():
    headings = ["Key findings", "Key-Findings!", "Übersicht", "निष्कर्ष", "???", "所見 1", "A" * 80, "..."]
    assert column_names(headings) == (
        "gxr_section_key_findings",
        "gxr_section_key_findings_2",
        "gxr_section_übersicht",
        "gxr_section_निष्कर्ष",
        "gxr_section_section",
        "gxr_section_所見_1",
        "gxr_section_" + "a" * 60,
        "gxr_section_section_2",
    )


def test_a_run_knows_its_form_without_the_file_that_it_came_from():
    job = with_form_inline(make_job("x", ["form.name=quiz"]))
    made = form_of(job)
    assert made
    assert job.form.name == ""
    assert form_of_run({"form": made.recorded}, job.model_dump(mode="json")) == made
    hidden = [part.heading for part in made.parts if part.hidden]
    assert hidden == ["Answer", "Explanation"]
    assert "hidden" not in made.recorded, "changes what is shown, not what is generated"
    assert form_of_run({}, {}) is None


@pytest.mark.parametrize(
    "recorded",
    ["", "[]", "{}", '{"request": "", "sections": []}', '{"sections": [1]}', '{"request": "", "sections": [{}]}', 7],
)
def test_a_damaged_record_is_no_form(recorded):
    with pytest.raises(ValueError):
        form_of_run({"form": recorded})


def test_a_text_that_is_held_to_the_form_is_asked_for_its_headings_only():
    plain = form(Impression="text", Key_findings="bullets")
    assert request_of(plain) == "Write your answer under these headings: Impression, Key findings."
    lines = '\nImpression:\nKey findings: a list, each item on a line that begins with "- "'
    for other in (replace(plain, checked=True), replace(plain, version=1)):
        assert request_of(other).endswith(lines)
    asking = replace(plain, parts=(replace(plain.parts[0], ask="one sentence"), plain.parts[1]))
    assert request_of(asking).endswith("\nImpression: one sentence" + lines.removeprefix("\nImpression:"))
    assert "one of: easy, hard" in request_of(form(Impression="text", Grade="choice"))
    assert request_of(replace(plain, request="Use {headings}!")) == "Use Impression, Key findings!"
    job = make_job("x", ["form.name=report", "engine.kind=api", "api.base_url=http://localhost:1/v1", "api.model=m"])
    assert "separated by a blank line:\nFindings:\n" in request_of(form_of(job))


def test_the_built_in_forms_of_an_earlier_version_are_kept():
    now, before = (form_of(make_job("x", ["form.name=teaching_case", f"form.version={version}"])) for version in (2, 1))
    assert [part.column for part in now.parts] == [part.column for part in before.parts]
    assert "a student should remember" in request_of(before)
    assert '"version"' not in before.recorded
    assert form_of_run({"form": before.recorded}) == before
    assert form_of_run({"form": now.recorded}) == now
    for server in ({"engine.kind": "api"}, {"engine.kind": "ray", "ray.worker": "api"}):
        assert request_of(form_of_run({"form": now.recorded, **server})) == request_of(replace(now, checked=True))
    assert read_form("quiz", 1) == read_form("quiz", 2), "unchanged"


@pytest.mark.parametrize("name", builtin_form_names())
def test_every_built_in_form_says_what_it_asks_for(name):
    section, description = read_form(name)
    made = form_of(make_job("x", [f"form.name={name}"]))
    assert made
    assert description.endswith(".")
    assert all(part.heading in request_of(made) for part in made.parts)
    assert tuple(part.heading for part in made.parts) == section.sections


def refused(*overrides: str, **values) -> str:
    with pytest.raises(JobFileError) as raised:
        form_of(make_job("x", overrides, values or None))
    return str(raised.value)


@pytest.mark.parametrize("line", ["-5 HU", "**Nodule**: 5 mm", "- x"])
def test_a_bullet_keeps_its_own_marks(line):
    made = form(B="bullets")
    parts = parts_of(made, composed(made, [line]))
    assert parts == [[line.removeprefix("- ")]]


def test_marks_are_dropped_only_around_a_heading():
    made = form(Plan="text")
    assert recovered(made, "Plan: **CT** now") == "Plan: **CT** now"
    assert recovered(made, "**Plan:** CT now") == "Plan: CT now"


@pytest.mark.parametrize("answer", ['{"Num": 1%s, "Text": "x"}' % ("0" * 400), '{"Num": 1, "Text": "x\\ud800"}'])
def test_a_hostile_json_answer_has_no_form(answer):
    made = form(Num="number", Text="text")
    assert in_layout(made, answer) is None
    assert in_layout(made, '{"Num": 1.5, "Text": "x"}') == "Num: 1.5\n\nText: x"


def test_a_form_that_cannot_be_is_refused_with_its_place():
    assert "single blanks" in refused(
        'form.sections=["A"]', **{"form.section": {"A": {"kind": "choice", "choices": ["a  b", "c"]}}}
    )
    assert "followed by a colon" in refused('form.sections=["Find", "Find: more"]')
    assert "did you mean teaching_case?" in refused("form.name=teaching_cases")
    assert "There is no such form file" in refused("form.name=none.toml")
    assert "different headings" in refused('form.sections=["A", "a"]')
    assert "colon" in refused('form.sections=["A:"]')
    assert "form.section.B" in refused('form.sections=["A"]', **{"form.section": {"B": {}}})
    assert "choices" in refused('form.sections=["A"]', **{"form.section": {"A": {"kind": "choice"}}})
    assert "at least 8" in refused('form.sections=["A"]', **{"form.section": {"A": {"max_tokens": 7}}})
    assert "name cannot be combined" in refused("form.name=quiz", 'form.sections=["A"]')
    assert "{headings}" in refused('form.sections=["A"]', "form.request=Write.")


def test_a_file_of_ones_own_is_a_form(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('sections = ["Befund", "Beurteilung"]\n[section.Befund]\nkind = "bullets"\n', encoding="utf-8")
    made = form_of(make_job("x", [f"form.name={json.dumps(str(path))}"]))
    assert made
    assert [part.kind for part in made.parts] == ["bullets", "text"]
    path.write_text('[form]\nsections = ["Befund"]\n')
    assert "no [form] section" in refused(f"form.name={json.dumps(str(path))}")
    path.write_text('sections = ["Befund"]\n[section.Befund]\nkind = "table"\n')
    assert "section.Befund.kind" in refused(f"form.name={json.dumps(str(path))}")
    path.write_text('sections = ["Befund"]\nversion = 1\n')
    assert "has no version" in refused(f"form.name={json.dumps(str(path))}")


def test_the_request_follows_the_prompt_and_a_template_of_ones_own_may_place_it():
    built_in = Templates(PromptSection(template="basic"), CASE).default
    asked = render(built_in, {"findings": "Clear."}, system="").turns[-1].text
    plain = render(Templates(PromptSection(template="basic")).default, {"findings": "Clear."}, system="").turns[-1].text
    assert asked == f"{plain}\n\n{request_of(CASE)}"
    own = compile_template("own", "{{ form_sections }}\nFindings: {{ findings }}", "own.md.j2")
    assert own.fields == ("findings",)
    assert render(own, {"findings": "Clear."}, system="").turns[-1].text == "Findings: Clear."


@pytest.mark.parametrize(
    ("source", "shared"),
    [
        ("Read.\n{{ form_sections }}\nNow: {{ findings }}", "Read.\n{form}\nNow: "),
        ("{{ form_sections }} {{ findings }} {{ form_sections }}", "{form} "),
        ("{{ form_sections }}{% if age %}{{ age }}{% endif %}{{ findings }}", "{form}"),
        ("Now: {{ form_sections | upper }} {{ findings }}", "Now: "),
        ("Now: {{ findings }} {{ form_sections }}", "Now: "),
        ("Now: {{ findings }}", "Now: "),
    ],
)
def test_a_form_above_the_findings_is_text_that_all_prompts_share(tmp_path, source, shared):
    path = tmp_path / "own.md.j2"
    path.write_text(source)
    for form, request in ((CASE, request_of(CASE)), (None, "")):
        made = render(Templates(PromptSection(template=str(path)), form).default, {"findings": "Clear."}, system="")
        beginning = made.turns[-1].text[: made.literal_chars]
        assert beginning == shared.replace("{form}", request).lstrip()


def test_a_job_without_a_form_is_as_it_was():
    assert form_of(make_job("x")) is None
    assert Job.model_validate({"name": "x", "input": {"path": "-"}}) == make_job("x")
