"""Identifier screening finds identifiers written in the usual ways, and no others in ordinary radiology."""

from __future__ import annotations

import csv
import string
import time

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from screening_set import figures, lines

from gxr_batch.text_checks.identifiers import RULES, identifiers_in
from gxr_batch.text_checks.word_lists import read_tables

INPUTS = ROOT / "inputs"


def test_the_set_is_large_and_has_texts_for_every_rule():
    made = lines()
    assert len(made) >= 120
    assert sum(not line.rules for line in made) >= 80
    assert {rule for line in made for rule in line.rules} == set(RULES)
    assert min(one.expected for one in figures().values()) >= 7


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_finds_nearly_all_and_hits_hardly_anything_else(rule):
    one = figures()[rule]
    assert one.recall >= 0.9, one
    assert one.precision >= 0.9, one


def test_rules_are_returned_in_order_and_once_each():
    text = "a@b.example, Dr. Smith and Dr. Jones, MRN 445566, again MRN 445566, c@d.example"
    assert identifiers_in(text) == ("mrn", "name", "email")
    assert identifiers_in("") == ()


@pytest.mark.parametrize(
    "text",
    [
        "2/24", "2.6 cm", "XXXX", "apex.The", "PA", "AP", "lateral decubitus", "T4", "T12", "6th rib", "-100 HU",
        "65-year-old", "3 days", "Hodgkin lymphoma", "Swan-Ganz", "Kerley B lines", "St. John's wort", "MRN XXXX",
        "Dr. XXXX", "XXXX/XXXX/XXXX", "name", "Name:", "Patient:", "Dr.", "@", "MRN", "None", "n/a", "0", "65.0",
    ],
)  # fmt: skip
def test_ordinary_cells_pass(text):
    assert identifiers_in(text) == ()


def test_the_sample_tables_pass():
    with (INPUTS / "findings.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    for column in pq.read_table(INPUTS / "followup.parquet").columns:
        cells += [str(cell) for cell in column.to_pylist()]
    assert [cell for cell in cells if identifiers_in(cell)] == []


def test_an_identifier_is_found_anywhere_in_a_text():
    ordinary = "The left costophrenic angle is blunted by 2.6 cm of fluid"
    for hit, rule in (("MRN 4455667", "mrn"), ("Dr. Okafor", "name"), ("3/4/2019", "date"), ("555-201-8841", "phone")):
        for text in (f"{hit}. {ordinary}", f"{ordinary} ({hit})", f"{ordinary}\n{hit}\n{ordinary}"):
            assert identifiers_in(text) == (rule,), text


def test_a_name_is_not_found_across_two_cells():
    assert identifiers_in("seen by the Dr.\x00Smooth nodule") == ()


@given(st.text(alphabet=string.printable + "éüñİß\u2028\x00\ud800", max_size=400))
def test_any_text_gives_only_known_rules(text):
    found = identifiers_in(text)
    assert list(found) == [rule for rule in RULES if rule in found]


@pytest.mark.parametrize(
    "piece",
    ["A", "1", "1.", "1-", "Aa ", "Dr. ", "mrn-", "12 Aa ", "a@", "a.", "St. ", "Mount Hospital of ", " 9", "+1 ", "\n",
     "Patient: Aa ", "Aa Aa MD ", "may 12 ", "1/2/", "99 ", "12345678", "name: ", "0123 ", "ninety-", "A.", "Aa-",
     "de "],
)  # fmt: skip
def test_a_long_text_of_hostile_pieces_takes_time_in_proportion(piece):
    short, long = (piece * (length // len(piece)) for length in (10_000, 100_000))

    def seconds(text: str) -> float:
        times = []
        for _ in range(3):
            began = time.process_time()
            identifiers_in(text)
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(long) < 40 * max(seconds(short), 1e-3)  # ten times the work; a hundred if it were quadratic


def test_every_word_of_the_lists_is_in_lower_case_for_comparison():
    for table, lists in read_tables("identifiers/words.toml").items():
        for name, words in lists.items():
            text = words if isinstance(words, str) else " ".join(words)
            assert text == text.lower(), f"{table}.{name}"


@pytest.mark.parametrize("word", [*read_tables("identifiers/words.toml")["names"]["titles"].split(), "sr."])
def test_a_name_after_any_title_of_the_list_is_found(word):
    assert "name" in identifiers_in(f"seen with {word} Meyerhoff today")


@pytest.mark.parametrize("word", read_tables("identifiers/words.toml")["names"]["roles"])
def test_a_name_after_any_role_of_the_list_is_found(word):
    assert "name" in identifiers_in(f"{word}: Anna Meyerhoff")
