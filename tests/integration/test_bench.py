"""`bench`: this machine's figures, measured with the engine of `run`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import Workplace

from gxr_batch.bench import _peak_bytes


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_every_slot_count_is_measured_lowest_first(work):
    found = json.loads(work.gxr("bench", "--set", "engine.kind=echo", "--slots", "8,1", "--json").stdout)
    assert [one["slots"] for one in found["measurements"]] == [1, 8]
    assert [one["rows"] for one in found["measurements"]] == [2, 16]
    assert all(one["rows_a_minute"] > 0 and one["memory_bytes"] > 2**20 for one in found["measurements"])


def test_the_output_is_a_markdown_table(work):
    lines = work.gxr("bench", "--set", "engine.kind=echo", "--slots", "1,2").stdout.splitlines()
    assert "| Hardware | Loading time | Inference time (256 tokens) | Memory usage |" in lines
    assert sum(line.startswith("| 1 |") or line.startswith("| 2 |") for line in lines) == 2


def test_memory_includes_child_processes():
    alone = _peak_bytes()
    held = 256 * 2**20
    code = f"held = bytearray({held}); held[::4096] = b'x' * len(held[::4096]); print(); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert _peak_bytes() >= alone + held
        child.kill()


def test_slots_that_are_not_positive_numbers_are_refused(work):
    assert "takes whole numbers" in work.gxr("bench", "--slots", "many", expect=2).stderr
    assert "takes whole numbers" in work.gxr("bench", "--slots", "0", expect=2).stderr


@pytest.mark.model
def test_a_real_model_is_measured(work, demo_model_dir):
    found = json.loads(work.gxr("bench", "--slots", "2", "--max-new-tokens", "8", "--json").stdout)
    (one,) = found["measurements"]
    assert found["engine"] == "transformers"
    assert found["load_seconds"] > 0
    assert one["tokens_a_second"] > 1


def test_set_options_apply_and_the_api_engine_is_refused(work):
    found = json.loads(
        work.gxr(
            "bench", "--set", "engine.kind=echo", "--set", "sampling.max_new_tokens=3", "--slots", "1", "--json"
        ).stdout
    )
    assert found["max_new_tokens"] == 3
    refused = work.gxr("bench", "--set", "engine.kind=api", expect=2).stderr
    assert "measures this machine" in refused
    assert "gxr-batch run my.toml --limit 50" in refused
    api = ("--set", "engine.kind=api", "--set", "api.model=x")
    refused = work.gxr("generate", "--prompt", "x", "--adapter", "folder", *api, expect=2)
    assert "a server has its own weights" in refused.stderr
