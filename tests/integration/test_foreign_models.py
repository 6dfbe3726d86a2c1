"""Broken and hostile models, tokenizers, chat templates and adapters: one message with file and key, exit code 4."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from places import SUPPORT

CHUNKS = 40  # of about 270 cases each
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


def test_a_hostile_or_broken_folder_is_refused_by_check_and_run_with_file_and_key(tmp_path):
    outcomes = played(tmp_path, "attacks:2:5", "values:11:271")
    assert len(outcomes) >= SAMPLED
    assert troubles(outcomes) == []


@pytest.mark.long
def test_every_hostile_folder_is_refused_with_file_and_key(tmp_path):
    assert troubles(played(tmp_path, "attacks:0:1")) == []


@pytest.mark.long
@pytest.mark.parametrize("first", range(CHUNKS))
def test_every_broken_value_of_every_file_ends_in_one_message(tmp_path, first):
    assert troubles(played(tmp_path, f"values:{first}:{CHUNKS}")) == []
