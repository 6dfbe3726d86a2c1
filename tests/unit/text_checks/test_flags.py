"""Each flag fires on what it describes and not on what only looks like it; no row is lost because of a flag."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from importlib import resources

import pytest
from flag_pairs import RULED, SETS, cases, evidence, scores
from running import Workplace

from gxr_batch.run.pipeline import TRUNCATED
from gxr_batch.text_checks.flags import FLAGS, NOT_COMPUTED, Evidence, checked, flags_of
from gxr_batch.text_checks.flags.contradictions import kept_and_lost
from gxr_batch.text_checks.flags.evidence import Reading
from gxr_batch.text_checks.flags.lexicon import DEVICES, TABLES, WORDS, spots_in
from gxr_batch.text_checks.flags.sentences import sentences_of, words_of

FLOOR = 0.9
PHRASES, PAIRS = TABLES["findings"]["phrases"], TABLES["findings"]["pairs"]
# Of the held-out pairs, which were written without knowledge of the rules: recall and precision.
BELOW_FLOOR = {("held out", "finding_invented"): (0.5, 1.0), ("held out", "finding_lost"): (0.8, 0.85)}
CLEAR = "The lungs are clear. Heart size is normal. No pleural effusion and no pneumothorax."


def flags(text: str, findings: str = "Small right pleural effusion.", **cells: str) -> list[str]:
    """Return the flags of a text, without that of findings it leaves out: most texts here are about one of them."""
    return [name for name in flags_of(evidence(text, findings=findings, **cells)) if name != "finding_lost"]


# --- the seeded errors


@pytest.fixture(scope="module", params=SETS)
def table(request):
    return request.param, scores(cases(request.param))[0]


@pytest.mark.parametrize("flag", RULED)
def test_seeded_errors_are_found_and_clean_texts_left_alone(table, flag):
    name, found = table
    recall, precision = BELOW_FLOOR.get((name, flag), (FLOOR, FLOOR))
    assert found[flag].recall >= recall
    assert found[flag].precision >= precision


def test_every_flag_has_enough_seeded_errors():
    planted = [case.planted for name in SETS for case in cases(name) if case.planted]
    assert len(planted) >= 150
    assert {flag: planted.count(flag) for flag in RULED if planted.count(flag) < 8} == {}


def test_no_faulty_text_is_in_two_sets():
    texts = [
        {case.evidence.text for case in cases(name) if case.planted not in {"", "control_tokens_in_input"}}
        for name in SETS
    ]
    assert sum(map(len, texts)) == len(set.union(*texts))


# --- the legend


def test_flags_are_in_the_order_of_the_legend_and_each_has_a_description():
    text = "I can see in the attached image: the effusion has grown since the prior film.<end_of_turn>"
    found = flags(text)
    assert found == ["leaked_turn_markers", "claims_to_see_image", "invented_comparison"]
    assert found == [name for name in FLAGS if name in found]
    assert all(sentence.endswith(".") for sentence in FLAGS.values())
    assert TRUNCATED in FLAGS
    assert NOT_COMPUTED in FLAGS


# --- rules, one by one


def test_a_text_that_paraphrases_the_findings_has_no_flag():
    assert flags("There is a small effusion on the right, which blunts the costophrenic angle.") == []


@pytest.mark.parametrize("ending", [".", "!", "?", "…", '."', ".)", ".**", "。"])
def test_a_text_that_reaches_its_limit_at_the_end_of_a_sentence_is_not_cut(ending):
    assert flags_of(evidence(f"A small effusion{ending}", findings="x", finish_reason="length")) == []


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("No effusion is present.", "a small effusion"),
        ("Effusion: absent.", "a small effusion"),
        ("An effusion is not seen.", "a small effusion"),
        ("The effusion has resolved.", "a small effusion"),
        ("The lungs are free of nodules.", "two nodules"),
        ("There is neither a mass nor a nodule.", "two nodules"),
        ("Bullae, nodules or cavities are not visible.", "two nodules"),
        ("The heart is not enlarged.", "cardiomegaly"),
        ("There isn't any pneumothorax.", "a pneumothorax"),
        ("The trachea is midline.", "the trachea is deviated to the left"),
        ("Bones: Normal.", "a right rib fracture"),
        ("The pleural spaces are normal.", "a small effusion"),
        ("The lungs are clear.", "pneumonia"),
        ("The mediastinal contours are normal.", "a wide mediastinum"),
        ("The cardiomediastinal silhouette is normal.", "cardiomegaly"),
    ],
)
def test_a_negation_of_a_given_finding_is_flagged(said, given):
    assert flags(said, given) == ["negates_given_finding"]


@pytest.mark.parametrize(
    "said",
    [
        "An effusion cannot be excluded.",
        "A further effusion is not seen.",
        "No large effusion is present.",
        "There is no change of the effusion.",
        "No effusion on the left.",
        "In simple pneumonia there is usually no effusion.",
        "No pneumothorax, small right effusion.",
        "No pneumothorax is seen, the effusion is small.",
        "No pneumothorax and a small effusion.",
        "Not only an effusion is present.",
    ],
)
def test_a_hedge_or_a_restricted_negation_contradicts_nothing(said):
    assert flags(said) == []


@pytest.mark.parametrize(
    "said",
    [
        "A pneumothorax would appear as a thin line.",
        "Pneumothorax is the most feared complication.",
        "A small pneumothorax cannot be ruled out.",
        "The differential diagnosis includes pneumothorax and effusion.",
        "**Differential diagnosis:**\n- Pneumothorax on the left is seen\n- Effusion",
        "Look for a pneumothorax at the apex.",
        "If there is a pneumothorax, drain it.",
        "A skin fold can be mistaken for a pneumothorax on the left.",
        "There is no consolidation, effusion, or pneumothorax.",
        "The lungs show neither an effusion nor a pneumothorax.",
    ],
)
def test_teaching_about_an_absent_finding_does_not_assert_it(said):
    assert flags(said, CLEAR) == []


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("You are a radiographer. A patient comes to you with a cough.", "echoes_prompt"),
        ("The effusion is small (Figure 2).", "claims_to_see_image"),
        ("The effusion is small. した場合", "other_language"),
        ("The effusion is small. Lines. Lines. Lines. Lines.", "repeats_itself"),
        ("The effusion is small. I am an AI and cannot give advice.", "refusal"),
        ("The effusion is small.\nmodel\n", "leaked_turn_markers"),
    ],
)
def test_what_small_models_leave_in_a_text_is_flagged(text, flag):
    assert flags(text) == [flag]


@pytest.mark.parametrize(
    "text",
    [
        "The provided X-ray findings point to an effusion.",
        "A right effusion (from Greek πλευρά, the side) is present.",
        "| sign | left | right |\n|---|---|---|\n| effusion | yes | yes |",
        "| sign | right | left |\n|---|---|---|\n| effusion | yes | no |",
        "The level of T10 to L1 is normal.",
        "Old films, if there are any, should be compared.",
    ],
)
def test_a_text_that_only_looks_faulty_is_not_flagged(text):
    assert flags(text) == []


def test_earlier_findings_in_the_row_may_be_mentioned():
    said = "The effusion that was present on the earlier film is gone: there was a moderate effusion."
    assert flags(said, CLEAR, comparison="moderate effusion last week") == []


def test_a_finding_not_seen_before_is_present_now():
    findings = "Small right apical pneumothorax, not seen before the procedure."
    assert flags("There is a small right apical pneumothorax.", findings) == []
    assert flags("No pneumothorax is seen.", findings) == ["negates_given_finding"]
    assert flags("There is a pneumothorax.", "A pneumothorax is not seen.") == ["asserts_negated_finding"]
    findings = "9 mm right lower lobe nodule, not well seen on prior exams."
    assert flags("There is a 9 mm nodule in the right lower lobe.", findings) == []
    findings = "A pneumothorax is not seen, compared with the prior film."
    assert flags("There is a pneumothorax.", findings) == ["asserts_negated_finding"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("Interval resolution of right pneumothorax. Scoliosis.", "No pneumothorax. Scoliosis."),
        ("Limited evaluation of fractures. Scoliosis.", "No fracture. Scoliosis."),
    ],
)
def test_what_is_resolved_or_looked_for_may_be_denied(row, text):
    assert flags_of(evidence(text, findings=row)) == []


def test_a_finding_on_the_other_side_is_flagged_and_a_side_of_something_else_is_not():
    assert flags("A small effusion is seen on the left.") == ["side_flipped"]
    assert flags("A small effusion is present. The left lung is clear.") == []
    assert flags("A small effusion is present, and the left heart border is sharp.") == []
    assert flags("Bilateral effusions are present.", "Effusion on both sides.") == []


def test_other_words_for_a_finding_are_known():
    assert flags("The cardiothoracic ratio is increased.", "Heart size is normal.") == ["asserts_negated_finding"]
    assert flags("The heart rate is increased.", "Heart size is normal.") == []
    assert kept_and_lost_of("The mass pushes the trachea to the left.", "Tracheal shift to the left.")[1] == []
    assert kept_and_lost_of("Free subdiaphragmatic gas is seen.", "Pneumoperitoneum.")[1] == []
    assert flags("A left IJ catheter is seen.", "Right IJ line.") == ["side_flipped"]
    assert kept_and_lost_of("An endotracheal tube.", "ETT and NGT in situ.")[1] == ["enteric_tube"]
    assert flags("Right midlung scar is seen.", "Right midlung opacity.") == []
    assert flags("There is a clear pleural line.", "A left pneumothorax.") == []


def test_the_other_side_may_be_normal():
    text = "Left rib fracture and effusion. The right lung and pleura are normal."
    assert flags(text, "Left rib fracture. Left effusion.") == []
    text = "The left lung and pleura are normal."
    assert flags(text, "Left effusion.") == ["negates_given_finding"]


def test_a_device_on_the_other_side_is_flagged_and_the_side_where_a_line_ends_is_not():
    drain, line = "Right basal drain.", "Left subclavian line with its tip in the right atrium. Right effusion."
    assert flags("Left basal drain in place.", drain) == ["side_flipped"]
    assert flags("Air in the left pleural space is drained: drainage, then drain it again.", drain) == []
    assert flags("A right subclavian line is seen.", line) == ["side_flipped"]
    assert flags("The central line ends in the right atrium, and projects over the right heart.", line) == []
    assert flags("Right effusion with a central venous catheter in place.", line) == []


def test_a_removed_device_is_absent_and_negating_a_property_does_not_negate_the_device():
    assert flags("A chest drain is present.", "The left chest drain has been removed.") == ["asserts_negated_finding"]
    assert flags("The chest drain has been removed.", "Chest drain on the left.") == ["negates_given_finding"]
    assert flags("The chest drain can be removed soon.", "Chest drain on the left.") == []
    assert flags("No central line complication, no kink of the central line.", "Right jugular line.") == []
    assert flags("No pneumothorax is seen around the chest drain.", "Chest drain on the left.") == []


def test_either_side_counts_as_no_side():
    drained = "A chest drain is inserted on the right or left, in front of the axilla."
    assert flags(f"{drained} The drain is on the right.", "Chest drain on the right.") == []
    drained = "A drain on the right or the left side. Chest drain is inserted on the left or on the right."
    assert flags(drained, "Chest drain on the right.") == []
    assert flags("Effusion on the left and the right lung is clear.", "Right effusion.") == ["side_flipped"]
    assert flags("The right or left pleural effusion may grow.", "Left pleural effusion.") == []


TWO_LOBES = "Consolidation in the right upper lobe and left lower lobe."


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (TWO_LOBES, "Left lower lobe and right upper lobe consolidation."),
        (TWO_LOBES, "There is consolidation in the left lower lobe."),
        (TWO_LOBES, "Bilateral consolidation is present."),
        (TWO_LOBES.replace(".", " without effusion."), "Bilateral consolidation, no effusion."),
        (TWO_LOBES.replace(".", ", consistent with pneumonia."), "Bilateral pneumonia is seen."),
        ("Right middle lobe and left lower lobe opacities.", "Opacities on both sides."),
        ("Nodules in the left upper lobe, right middle lobe and right base are seen.", "Bilateral nodules."),
        ("Left greater than right effusions.", "Bilateral effusions."),
        ("Consolidations have developed in the left upper lobe and both lower lobes.", "Bilateral consolidation."),
        ("Effusions, right > left.", "There are effusions on both sides."),
    ],
)
def test_a_finding_in_two_lobes_may_be_on_both_sides(row, text):
    assert flags(text, row) == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (TWO_LOBES.replace("left", "right"), TWO_LOBES),
        ("Effusion on the left and right lower lobe consolidation.", "Right effusion, left consolidation."),
        ("Effusion at the left base and the right lung is clear.", "Effusion at the right base."),
        ("Cardiomegaly, left effusion and right basal nodule.", "Right effusion. Cardiomegaly. Left basal nodule."),
        ("RLL consolidation.", "Left lower lobe consolidation."),
        ("Lt effusion.", "A right effusion is present."),
    ],
)
def test_a_side_stays_with_its_finding(row, text):
    assert flags(text, row) == ["side_flipped"]


def test_a_measurement_may_be_given_in_another_unit():
    assert flags("The nodule measures 22 mm.", "a nodule of 2.2 cm") == []
    assert flags("The nodule measures 23 mm.", "a nodule of 2.2 cm") == ["number_not_in_input"]


def test_an_age_may_be_in_a_separate_cell():
    assert flags("This 65-year-old man has an effusion.", age="65", sex="male") == []
    assert flags("This 56-year-old man has an effusion.", age="65", sex="male") == ["number_not_in_input"]


# --- fields


def test_a_flag_whose_field_is_missing_from_the_template_is_not_computed():
    text = "There is a left pneumothorax of 4 cm. It has grown since the prior film."
    assert flags_of(evidence(text, template="educational", topic="pneumothorax")) == []
    assert "invented_comparison" not in flags_of(evidence(text, template="basic", findings="a pneumothorax"))
    assert "invented_comparison" in flags_of(evidence(text, findings="a pneumothorax"))


def test_a_row_with_a_comparison_may_compare():
    assert flags("The effusion has grown since the prior film.", comparison="smaller last week") == []


def test_a_row_whose_findings_compare_may_be_repeated():
    assert flags("The pneumothorax has enlarged.", "The pneumothorax has enlarged.") == []
    assert flags("The heart has enlarged.", "The heart is enlarged.") == ["invented_comparison"]
    assert flags("The effusion has grown.", "First chest drain placed, effusion.") == ["invented_comparison"]


@pytest.mark.parametrize("missing", [None, "", "  ", float("nan")])
def test_a_blank_cell_is_not_a_comparison(missing):
    values = {"findings": "an effusion", "comparison": missing}
    said = "The effusion has grown since the prior film."
    assert flags_of(Evidence(said, "", values, "stop")) == ["invented_comparison"]


def test_cells_of_any_type_and_length_are_read():
    values = {"findings": ["an", "effusion"], "age": 65, "comparison": None, "presentation": b"\xff"}
    assert flags_of(Evidence("An effusion. " + "é" * 5, "", values, "stop")) == []
    flags_of(Evidence("<" * 50_000 + "no " * 50_000, "no " * 90_000, {"findings": "not a nodule, " * 50_000}, "stop"))


def test_a_sentence_without_end_is_cut():
    words = words_of("a left effusion and " * 1000 + ". The lungs are clear.")
    sentences = sentences_of(words)
    assert max(map(len, sentences)) <= 150
    assert sentences[-1] == words_of("The lungs are clear.")


PIECES = ["a ", "no ", "no effusion, ", "1 ", "1 mm ", "<a ", "[", "i can ", "prior ", "\n", "x" * 9, "left nodule "]
PIECES += [
    "but nodule if ",
    "\nyou are",
    "the left and the right effusion with ",
    "provided chest ",
    "?",
    "\u2019",
    "é ",
]


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_takes_long(piece):
    text = piece * (20_000 // len(piece)) + "you are a radiologist"
    began = time.process_time()
    flags_of(Evidence(text, f"You are a radiologist. {text[:9000]}", {"findings": text, "comparison": None}, "length"))
    assert time.process_time() - began < 3


# --- in a run


def test_a_run_writes_the_flags_of_its_rows(tmp_path):
    work = Workplace(tmp_path)
    work.table([("C1", "Small effusion."), ("C2", "Small effusion.<end_of_turn>")])
    work.run()
    first, second = (row["gxr_flags"] for row in work.results())
    assert "echoes_prompt" in first, "the echo engine repeats the prompt"
    assert second[0] == "control_tokens_in_input"


def test_a_rule_that_fails_loses_no_row_and_its_message_is_not_logged(tmp_path, monkeypatch):
    from gxr_batch.job import load_job
    from gxr_batch.run.invocation import Options
    from gxr_batch.run.runner import run
    from gxr_batch.run.stop import Stopper

    def fail(_):
        raise ValueError("SECRET of a cell")

    work = Workplace(tmp_path)
    work.table(3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gxr_batch.text_checks.flags.checked", fail)
    run(load_job(tmp_path / "j.toml"), Options(), Stopper(), lambda _: None, lambda _: None)
    rows = work.results()
    assert [row["gxr_flags"] for row in rows] == [[NOT_COMPUTED]] * 3
    assert {(row["gxr_findings_kept"], row["gxr_findings_lost"]) for row in rows} == {(None, None)}
    log = (tmp_path / "outputs/j/log.jsonl").read_text()
    assert "SECRET" not in log
    logged = [line for line in map(json.loads, log.splitlines()) if line["event"] == NOT_COMPUTED]
    assert [line["error"] for line in logged] == ["ValueError"], "once, not for each row"


# --- the word lists


def test_every_word_of_the_lexicon_is_written_as_texts_are_split():
    lists = {**WORDS, **{f"pair {pair['names']}": f"{pair['heads']} {pair['near']}".split() for pair in PAIRS}}
    for table in (TABLES["findings"]["not_after"], TABLES["findings"]["not_before"], TABLES["sides"]["words"]):
        lists |= {f"{name}: {words}": f"{name} {words}".split() for name, words in table.items()}
    names = {*PHRASES, *(name for pair in PAIRS for name in pair["names"].split())}
    wrong = {
        key: word for key, words in lists.items() for word in words if words_of(word) != [word] and word not in names
    }
    assert not wrong
    assert not {word for words in TABLES["findings"]["same_place"].values() for word in words.split()} - names


def test_no_word_is_in_a_list_twice():
    text = resources.files("gxr_batch.text_checks").joinpath("flags/lexicon.toml").read_text(encoding="utf-8")
    lists = re.findall(r'^(.+?) = "(?:"")?([^"]*)"', text, re.MULTILINE)
    assert len(lists) > 100
    assert not [(name, word) for name, words in lists for word, n in Counter(words.split()).items() if n > 1]


def test_every_spelling_of_a_finding_is_found_as_that_finding():
    assert set(PHRASES) >= DEVICES
    for finding, spellings in PHRASES.items():
        assert [spot.findings for spelling in spellings for spot in spots_in(words_of(spelling))] == [(finding,)] * len(
            spellings
        )


@pytest.mark.parametrize(
    ("said", "finding", "not_said"),
    [
        ("Large hiatal hernia behind the heart.", "hiatus_hernia", "cardiomegaly"),
        ("A small nodule behind the heart.", "nodule", "cardiomegaly"),
        ("The large left effusion obscures the heart border.", "pleural_effusion", "cardiomegaly"),
        ("A central mass near the mediastinum.", "mass", "mediastinal_shift"),
        ("The heart is enlarged and vascularity is normal.", "cardiomegaly", "congestion"),
    ],
)
def test_words_of_one_finding_do_not_name_another(said, finding, not_said):
    row = f"{said} No pneumothorax."
    assert kept_and_lost_of("", row) == ([], [finding])
    assert flags_of(evidence(f"{said} The lungs are expanded.", findings=row)) == []


# --- what real reports and texts about them taught


@pytest.mark.parametrize(
    "row",
    [
        "No effusion, large left bulla, or pneumothorax.",
        "The lungs are clear of focal airspace disease, pneumothorax, or pleural effusion.",
        "No focal consolidation, suspicious pulmonary opacity, or pneumothorax.",
        "There is no pleural line to suggest pneumothorax.",
        "No visible pneumothorax, focal opacity, or effusion is seen.",
        "Negative for focal consolidation, large effusion, or pneumothorax.",
    ],
)
def test_a_list_under_one_negation_is_denied_as_a_whole(row):
    assert flags("There is a small pneumothorax.", row) == ["asserts_negated_finding"]
    assert flags("No pneumothorax is seen.", row) == []


def test_a_new_item_after_a_negated_one_is_a_finding():
    row = "No pneumothorax, a small left effusion and bilateral nodules."
    assert flags("No effusion. Nodules on both sides.", row) == ["negates_given_finding"]
    assert flags("Left effusion, nodules, no pneumothorax.", row) == []


def test_an_upper_limit_is_neither_normal_nor_enlarged():
    row = "Heart size upper limits of normal."
    assert flags("The heart is enlarged.", "The heart is borderline in size.") == []
    assert flags("The heart is not enlarged.", "Borderline enlarged heart.") == ["negates_given_finding"]
    assert flags("The heart is not enlarged.", "Heart size remains slightly large.") == ["negates_given_finding"]
    assert flags("The heart is enlarged.", row) == []
    assert flags("The heart is normal.", row) == []


@pytest.mark.parametrize("text", ["Cardiomegaly: no sign of a cause.", "Mild cardiomegaly: no visible oedema."])
def test_a_denial_after_a_colon_is_about_what_it_names(text):
    assert flags(text, "Mild cardiomegaly.") == []


@pytest.mark.parametrize(
    "text", ["Effusion: no.", "Effusion: none.", "Pleural effusion: absent.", "Effusion - none", "| Effusion | no |"]
)
def test_a_denial_that_is_all_there_is_after_a_finding_is_one(text):
    assert flags(text) == ["negates_given_finding"]


def test_what_is_not_fully_there_is_not_denied():
    assert flags("The lung is not fully collapsed, so some air moves.", "The right lung is collapsed.") == []


def test_no_large_effusion_denies_only_a_large_one():
    row = "No large pleural effusion. Scoliosis."
    assert flags("Large pleural effusion: fluid in the pleura. Scoliosis.", row) == ["asserts_negated_finding"]
    assert flags("There is a small effusion. Scoliosis.", row) == []


def test_a_finding_that_is_taken_for_given_is_stated():
    row = "No pneumothorax. Rib fractures."
    assert flags("Rib fractures. No cause for the pneumothorax is seen.", row) == ["asserts_negated_finding"]


@pytest.mark.parametrize(
    ("text", "denied"),
    [
        ("Normal chest X-ray without pneumonia.", True),
        ("Normal chest X-ray with scoliosis.", False),
        ("A scoliosis. There is no radiographic abnormality to discuss.", True),
        ("Scoliosis. A normal film does not exclude tuberculosis.", False),
        ("Scoliosis, no acute abnormality.", False),
    ],
)
def test_a_film_called_normal_denies_what_the_row_has(text, denied):
    assert ("negates_given_finding" in flags(text, "Scoliosis. The lungs are clear.")) is denied


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("Cardiomegaly.", "Cardiomegaly. A normal heart occupies less than half of the thorax."),
        ("Cardiomegaly.", "Cardiomegaly. In a normal film the heart is less than half of the thorax."),
        ("Left hilar fullness.", "Left hilar fullness. The normal left hilum is higher than the right."),
        ("Right effusion.", "Right effusion. A normal pleura is not visible."),
    ],
)
def test_teaching_what_is_normal_denies_nothing(row, text):
    assert flags(text, row) == []
    assert flags("The film shows a normal heart.", "Cardiomegaly.") == ["negates_given_finding"]


def test_a_film_with_nothing_but_a_device_may_be_called_normal():
    assert flags("Normal chest film without any abnormality.", "PICC in place. The lungs are clear.") == []


@pytest.mark.parametrize(
    ("cells", "invented"),
    [
        ({"findings": "The heart is enlarged."}, True),
        ({"findings": "The heart is enlarged.", "comparison": "None available."}, True),
        ({"findings": "The heart is enlarged.", "comparison": "2019-05-02"}, True),
        ({"findings": "The heart is enlarged.", "history": "48-year-old man"}, True),
        ({"findings": "The heart is enlarged. Stable scoliosis."}, True),
        ({"findings": "The enlarged heart is stable."}, False),
        ({"findings": "The heart is enlarged.", "comparison": "Film of May: normal heart."}, False),
    ],
)
def test_a_comparison_needs_one_of_the_same_thing_in_the_row(cells, invented):
    text = "The heart is enlarged, unchanged from the earlier film. Scoliosis."
    assert ("invented_comparison" in flags(text, **cells)) is invented


def test_a_word_that_is_joined_with_itself_is_a_loop():
    assert flags("Effusion after irritation and irritation.") == ["repeats_itself"]
    assert flags("Effusion on the left and the left lung is small.", "Left effusion.") == []


# --- findings that are kept, lost and invented


def kept_and_lost_of(text: str, findings: str) -> tuple[list[str], list[str]]:
    return kept_and_lost(Reading(evidence(text, findings=findings)))


def test_findings_are_kept_under_any_name_and_lost_if_the_text_has_none():
    row = "Cardiomegaly. Calcified granuloma at the right apex. Degenerative changes of the spine. No effusion."
    text = "The heart is large. A calcified nodule lies in the right apex. No effusion."
    kept, lost = kept_and_lost_of(text, row)
    assert kept == ["cardiomegaly", "granuloma"]
    assert lost == ["degenerative_spine"]
    assert flags_of(evidence(text, findings=row)) == ["finding_lost"]
    assert checked(evidence(text, findings=row)) == (["finding_lost"], kept, ["degenerative spine"]), "in words"


def test_a_denied_finding_is_lost_but_has_one_flag():
    text = "Normal heart size, no effusion."
    assert kept_and_lost_of(text, "Cardiomegaly.") == ([], ["cardiomegaly"])
    assert flags_of(evidence(text, findings="Cardiomegaly.")) == ["negates_given_finding"]


def test_a_finding_that_only_the_differential_names_in_general_is_lost():
    text = "Impression: clear lungs.\n\nDifferential: Pneumonia may cause an effusion."
    assert kept_and_lost_of(text, "Small effusion.") == ([], ["pleural_effusion"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I am an AI and cannot help with that.",
        "El derrame pleural en el lado derecho no es grande, y los pulmones están bien.",
    ],
)
def test_a_text_that_is_no_case_loses_nothing(text):
    found = checked(evidence(text, findings="Small right pleural effusion."))
    assert "finding_lost" not in found.flags
    assert (found.kept, found.lost) == (None, None)


@pytest.mark.parametrize(
    ("cells", "named"),
    [
        ({"findings": "Small effusion. Sternal wires."}, (["pleural effusion"], ["sternotomy"])),
        ({"findings": "Clear lungs."}, ([], [])),
        ({"findings": None}, (None, None)),
        ({"findings": " "}, (None, None)),
        ({"topic": "effusion"}, (None, None)),
    ],
)
def test_findings_are_compared_only_if_the_row_has_a_findings_cell(cells, named):
    found = checked(Evidence("There is a small effusion on the right.", "", cells, "stop"))
    assert (found.kept, found.lost) == named


@pytest.mark.parametrize(
    ("text", "invented"),
    [
        ("Small right effusion. A left chest drain is in place.", True),
        ("Small right effusion. There is also a nodule.", True),
        ("- Small right effusion\n- Calcified granuloma in the left upper lobe", True),
        ("Small right effusion. A nodule may hide behind it.", False),
        ("Small right effusion. A nodule is a round opacity.", False),
        ("Small right effusion.\n\nDifferential: Pneumothorax is also seen in this age.", False),
        ("Small right effusion. Nodules are common at this age.", False),
    ],
)
def test_a_finding_that_the_row_does_not_have_is_invented(text, invented):
    assert ("finding_invented" in flags(text)) is invented


@pytest.mark.parametrize(
    ("row", "invented"),
    [
        ("Normal.", True),
        ("Normal chest radiograph.", True),
        ("No acute cardiopulmonary abnormality.", True),
        ("The chest is normal.\nNo active disease.\n", True),
        ("No acute disease. Haziness at the left base.", False),
        ("Abnormal study.", False),
        ("Bronchial wall changes.", False),
    ],
)
def test_a_row_that_is_only_normal_has_no_finding(row, invented):
    text = "There is a right pleural effusion."
    assert ("finding_invented" in flags(text, row)) is invented
    assert flags("Normal chest. No effusion. An effusion would be seen as a meniscus.", row) == []
