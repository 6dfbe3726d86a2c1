"""The command that a message about a missing package names works where the user is."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT

from gxr_batch import extras
from gxr_batch.errors import ModelUnavailable

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_in_the_project_folder_the_command_uses_short_paths(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv/bin/python"))
    assert extras.install_command("ray") == ".venv/bin/python -m pip install -c constraints.txt -e '.[ray]'"


def test_elsewhere_the_command_names_the_project_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = extras.install_command("finetune")
    assert command.endswith(f"-m pip install -c {ROOT}/constraints.txt -e '{ROOT}[finetune]'")


def test_without_a_project_folder_the_command_says_where_to_type_it(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "_PROJECT", tmp_path)
    command = extras.install_command("ray")
    assert command.endswith("-e 'FOLDER[ray]', where FOLDER is the source folder of gxr-batch")


def test_paths_with_blanks_and_quotes_are_quoted(monkeypatch, tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "_PROJECT", folder)
    words = shlex.split(extras.install_command("ray"))
    assert words[-4:] == ["-c", f"{folder}/constraints.txt", "-e", f"{folder}[ray]"]


def test_a_deleted_current_folder_changes_nothing(monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert extras.install_command("ray").endswith(f"-e '{ROOT}[ray]'")


def test_vllm_gets_a_separate_environment_by_a_target_of_the_makefile(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = extras.install_command("vllm")
    assert command == "make -C . vllm-cuda (NVIDIA GPU) or make -C . vllm-cpu, then use .venv-vllm/bin/gxr-batch"
    for target in ("vllm-cuda", "vllm-cpu"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_missing_packages_are_named_with_the_command():
    with pytest.raises(ModelUnavailable) as caught:
        extras.require("ray", "sys", "no_such_package", purpose="The ray engine", where="here")
    assert caught.value.what == "The ray engine needs no_such_package, which is not installed."
    assert caught.value.next_step == extras.install_command("ray")


def test_every_extra_that_the_code_asks_for_exists():
    used = {"demo", "finetune", "ray", "vllm"}
    assert used <= set(EXTRAS)
    text = "".join(path.read_text() for path in Path(ROOT / "gxr_batch").rglob("*.py"))
    assert "pip install 'gxr-batch[" not in text
