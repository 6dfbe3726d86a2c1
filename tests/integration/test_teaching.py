"""The check of benchmarks/teaching.py: which answers assert the main finding, and which only mention it."""

import importlib.util

import pytest
from places import ROOT

BENCHMARK = ROOT / "benchmarks/teaching.py"
SPELLINGS = ("pneumothorax", "small pneumothorax")


@pytest.fixture(scope="module")
def teaching():
    spec = importlib.util.spec_from_file_location("teaching", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "text",
    [
        "Impression: Small left apical pneumothorax.",
        "Impression: No mediastinal shift, but a pneumothorax on the left.",
        "Impression: Not only an effusion but a pneumothorax.",
        "Impression: There is no doubt about the pneumothorax.",
        "Impression: A lung that does not reach the wall, indicating a pneumothorax.",
        "Impression: Pneumothorax, and no effusion is seen. The mediastinum is not shifted.",
    ],
)
def test_an_asserted_finding_counts(teaching, text):
    assert teaching.names(text, SPELLINGS)


@pytest.mark.parametrize(
    "text",
    [
        "Impression: No effusion, consolidation or pneumothorax.",
        "Impression: There is no evidence of consolidation, of a pleural effusion, or of a pneumothorax.",
        "Impression: A pneumothorax is not seen.",
        "Impression: Pneumothorax has been excluded.",
        "Impression: A bulla, which may be mistaken for a pneumothorax.",
        "Impression: Clear lungs.\n\nDifferential: Pneumothorax.",
        "Impression: Clear lungs.\n\n**Differential diagnosis:** Pneumothorax.",
        "Impression: Clear lungs.\n\nTeaching point: A pneumothorax may hide.",
        "Impression: Hydropneumothorax.",
        "",
    ],
)
def test_a_finding_that_is_denied_or_only_considered_or_absent_does_not_count(teaching, text):
    assert not teaching.names(text, SPELLINGS)


def test_findings_already_named_in_the_input_are_counted_separately(teaching):
    cases = {name: teaching.Case("sample", name, SPELLINGS) for name in ("a", "b", "c")}
    given = {"a": "Small left pneumothorax.", "b": "A thin line at the apex. No effusion.", "c": "A line at the apex."}
    texts = {"a": "Small left pneumothorax.", "b": "Impression: pneumothorax.", "c": "A line at the apex."}
    rows = [
        {"findings": given[name], "history": None, "gxr_row_id": name, "gxr_text": texts[name]}
        | {"gxr_finish_reason": "stop" if name == "a" else "length", "gxr_flags": ["side_flipped"] * (name == "c")}
        for name in cases
    ]
    found = teaching.score(rows, cases)
    assert (found.ended, found.read_off, found.concluded, found.flipped) == ((1, 3), (1, 1), (1, 2), (1, 3))
    assert str(found.concluded) == "1 of 2 (50%)"


def test_every_row_of_both_sets_has_a_label(teaching):
    cases = teaching.labels()
    sample = {row["case"] for row in teaching.table_of("sample")}
    assert sample == {name for name, case in cases.items() if case.set == "sample"}
    assert all(spelling.strip() for case in cases.values() for spelling in case.spellings)
