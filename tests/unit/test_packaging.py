"""What a wheel contains: every data file of the package, and the licences of code and adapter."""

from __future__ import annotations

import hashlib
import tomllib

from places import ROOT

PACKAGE = ROOT / "gxr_batch"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_data_file_of_the_package_is_named_for_the_wheel():
    globs = PROJECT["tool"]["setuptools"]["package-data"]["gxr_batch"]
    packed = {path for glob in globs for path in PACKAGE.glob(glob)}
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert packed == data


def test_the_adapters_terms_are_included_in_the_licences():
    notice = PACKAGE / "models/demo_adapter/NOTICE"
    assert str(notice.relative_to(ROOT)) in PROJECT["project"]["license-files"]
    assert "Gemma Terms of Use" in notice.read_text()


def test_the_adapters_model_card_names_the_training_data_in_the_repository():
    data = ROOT / "inputs/training/teaching_cases.jsonl"
    model_card = (PACKAGE / "models/demo_adapter/README.md").read_text()
    assert hashlib.sha256(data.read_bytes()).hexdigest() in model_card
