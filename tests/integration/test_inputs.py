"""The sample tables: enough different cases, none without findings."""

from __future__ import annotations

import csv
import runpy

import pyarrow.parquet as pq
import pytest
from places import ROOT

INPUTS = ROOT / "inputs"
COLUMNS = ["case_id", "age", "sex", "history", "presentation", "findings", "comparison"]


def rows(name: str) -> list[dict]:
    if name.endswith(".csv"):
        with (INPUTS / name).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, strict=True))
    return pq.read_table(INPUTS / name).to_pylist()


@pytest.mark.parametrize("name", ["findings.csv", "followup.parquet"])
def test_a_table_has_at_least_forty_different_cases(name):
    found = rows(name)
    assert len(found) >= 40
    assert list(found[0]) == COLUMNS
    assert len({row["case_id"] for row in found}) == len(found)
    assert len({row["findings"] for row in found}) == len(found)
    assert all(row["findings"].strip() for row in found)


def test_optional_cells_are_sometimes_empty():
    for column in ("history", "presentation", "comparison"):
        assert any(not row[column] for row in rows("findings.csv"))


def test_the_script_reproduces_the_parquet_file():
    made = runpy.run_path(str(INPUTS / "make_followup.py"))["table"]()
    assert made.equals(pq.read_table(INPUTS / "followup.parquet"))
