"""Imports go down the table of packages in docs/architecture.md, never up and never sideways."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from gxr_batch.cli import VERBS

PACKAGE = ROOT / "gxr_batch"
# From the top down. Packages of one level do not import each other.
LEVELS = (
    {"cli"},
    {"library"},
    {"export", "review", "report", "finetune", "chat", "bench"},
    {"audit", "run"},
    {"engines"},
    {"models"},
    {"text_checks"},
    {"ledger", "prompts"},
    {"rows", "forms"},
    {"job"},
    {"records", "cells", "disk", "extras"},
    {"errors", "files"},
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
HEAVY = {
    "torch",
    "transformers",
    "pandas",
    "scipy",
    "krippendorff",
    "accelerate",
    "bitsandbytes",
    "tokenizers",
    "vl_convert",
    "trl",
    "peft",
    "vllm",
    "ray",
    "datasets",
    "openai",
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_a_level():
    assert {package_of(path) for path in modules()} == set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_levels(path):
    package = package_of(path)
    for name in imports_of(path):
        if not name.startswith("gxr_batch."):
            continue
        other = name.split(".")[1]
        assert other == package or LEVEL[package] < LEVEL[other], f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "engines").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_an_engine_imports_no_other_engine(path):
    if path == PACKAGE / "engines" / "__init__.py":
        return  # the only module that knows all engines
    own = path.relative_to(PACKAGE / "engines").parts[0].removesuffix(".py")
    for name in imports_of(path):
        if name.startswith("gxr_batch.engines."):
            assert name.split(".")[2] in {"base", "suspects", own}, f"{path.name} imports {name}"


def test_only_the_command_line_imports_click():
    assert {package_of(path) for path in modules() if "click" in imports_of(path)} == {"cli"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_and_version_import_nothing_heavy(arguments):
    code = (
        "import sys\nfrom gxr_batch.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_command_imports_nothing_heavy_either(verb):
    code = (
        "import sys\nfrom gxr_batch.cli import main\n"
        f"try:\n    main([{verb!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({HEAVY | {'pyarrow', 'pydantic'}!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Example" in done.stdout


def test_only_kernels_import_triton():
    importers = {path.parent for path in modules() if any(name.split(".")[0] == "triton" for name in imports_of(path))}
    assert importers == {PACKAGE / "engines" / "slots" / "gpu" / "kernels"}
