"""Broken and hostile models, tokenizers, chat templates and adapters: one message with file and key, exit code 4."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from places import SUPPORT

CHUNKS = 100  # of about a hundred cases each
SAMPLED = 40


def played(folder, *arguments: str) -> list[dict]:
    """Play cases in a process that forks for each; return their outcomes, and print the figures."""
    command = [sys.executable, str(SUPPORT / "model_mutations.py"), str(folder), *arguments]
    done = subprocess.run(command, text=True, capture_output=True, timeout=590, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *outcomes, figures = map(json.loads, done.stdout.splitlines())
    print(json.dumps(figures, indent=1))
    return outcomes


def troubles(outcomes: list[dict]) -> list[str]:
    return [f"{one['case']}: {trouble}" for one in outcomes for trouble in one["troubles"]]


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.long)])
def test_a_hostile_folder_is_refused_with_file_and_key_by_check_and_run(tmp_path, step):
    outcomes = played(tmp_path, "attacks", str(step))
    assert len(outcomes) > 40 // step
    assert troubles(outcomes) == []


def test_a_broken_value_of_any_file_ends_in_one_message(tmp_path):
    outcomes = played(tmp_path, "11", "271")
    assert len(outcomes) >= SAMPLED - 5
    assert troubles(outcomes) == []


@pytest.mark.long
@pytest.mark.parametrize("first", range(CHUNKS))
def test_every_broken_value_of_every_file_ends_in_one_message(tmp_path, first):
    assert troubles(played(tmp_path, str(first), str(CHUNKS))) == []
