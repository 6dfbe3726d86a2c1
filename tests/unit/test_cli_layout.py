"""How the command line lays out its results: 80 columns, and the same words for the same things."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from gxr_batch.cli import VERBS, layout, main
from gxr_batch.cli.progress import describe
from gxr_batch.ledger import Counts
from gxr_batch.run.invocation import Progress


def test_without_arguments_it_shows_where_to_start():
    shown = CliRunner().invoke(main, [])
    assert shown.exit_code == 0
    assert "Start here:" in shown.output
    assert shown.output.index("gxr-batch init") < shown.output.index("gxr-batch run")
    assert max(map(len, shown.output.splitlines())) <= layout.WIDTH


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_into_80_columns(verb):
    shown = CliRunner().invoke(main, [*verb.split(), "--help"], terminal_width=80).output
    examples = [line for line in shown.splitlines() if "gxr-batch" not in line]
    assert max(map(len, examples)) <= 80


def test_labelled_lines_continue_below_their_text():
    lines = layout.labelled([("memory", "word " * 30), ("", "next"), ("a path", "/a/" + "b" * 90)])
    assert lines[0].startswith("  memory     word word")
    assert lines[1].startswith("             word")
    assert lines[-3].strip() == "next"
    assert lines[-1].strip() == "/a/" + "b" * 90  # paths are never broken


def test_a_line_of_progress_fits_at_a_million_rows():
    counts = Counts(ok=0, failed=0, held=0, left=1_000_000)
    progress = Progress(counts=counts, wanted=1_000_000, done=123_456, new_tokens=31_000_000, seconds=1200.0, failed=12)
    assert describe(progress) == "123,456/1,000,000 rows, 6,173 rows/min, 25,833 tok/s, 2:22:00 left, 12 failed"
    assert len(describe(replace(progress, wanted=48, done=2, new_tokens=500))) < 70


@pytest.mark.parametrize(("value", "shown"), [(0.04, "0.0"), (99.94, "99.9"), (100, "100"), (7_804.6, "7,805")])
def test_speeds_have_as_many_digits_as_matter(value, shown):
    assert layout.rate(value) == shown
