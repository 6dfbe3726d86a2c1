"""The project's own text avoids the phrases of phrases.toml. Run as a script with paths, it lists where they occur."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PHRASES: dict[str, str] = tomllib.loads(Path(__file__).with_name("phrases.toml").read_text())["phrases"]
# Not prose of the project: tables, prompts and model texts, word lists, licences, run folders of earlier versions.
EXEMPT = (
    "tests/data/",
    "tests/unit/phrases.toml",
    "tests/unit/test_language.py",
    "inputs/findings.csv",
    "inputs/make_followup.py",
    "inputs/training/",
    "benchmarks/main_findings.csv",
    "gxr_batch/prompts/",
    "gxr_batch/models/demo_adapter/",
    "LICENSE",
)
# Texts that runs of earlier versions hold, in results or in run.json: they stay as they were written.
STORED = (
    "the whole text stands in results.parquet",
    "broke off its answer",
    "broke off the connection",
    "for a reason of its own",
    "leaves room for",
    "beside the 4-bit weights",
    "beside the weights, by vLLM",
)
SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".c",
    ".h",
    ".js",
    ".html",
    ".css",
    ".service",
    ".timer",
    ".slurm",
    ".sh",
    ".j2",
    "",
}


def texts(names: Sequence[str]) -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        exempt = name.startswith(EXEMPT) and not (name.startswith("gxr_batch/prompts/") and name.endswith(".py"))
        if not exempt and Path(name).suffix in SUFFIXES and (ROOT / name).is_file():
            yield ROOT / name


def occurrences(path: Path) -> Iterator[str]:
    """Yield each banned phrase in a file with its place and what to write; test names count as sentences."""
    spaced = [phrase.replace(" ", r"\s+") for phrase in PHRASES]
    pattern = re.compile("|".join(rf"(?P<p{place}>\b(?:{phrase})\b)" for place, phrase in enumerate(spaced)), re.I)
    text = path.read_text()
    for stored in STORED:
        text = text.replace(stored, "=" * len(stored))
    if path.suffix == ".py":
        text = re.sub(r"\bdef test_\w+", lambda name: name[0].replace("_", " "), text)
    flat = re.sub(r"\n[ \t]*(?:#+ |\* |// )?", lambda gap: "\n" + " " * (len(gap[0]) - 1), text)
    for found in pattern.finditer(re.sub(r"\n(?! *\n)", " ", flat)):
        place = int(str(found.lastgroup).removeprefix("p"))
        line = text.count("\n", 0, found.start()) + 1
        yield f"{path.relative_to(ROOT)}:{line}: {found[0]!r}; write: {list(PHRASES.values())[place]}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1\n# The run goes\n# on, and so on.\n", 2),
        ("def test_a_row_is_told_of_it(): pass\n", 1),
        ('say("start anew")\n', 1),
        ("def f():\n    # Read it once\n    # more.\n", 2),
    ],
)
def test_a_phrase_is_found_over_line_ends_and_in_names_of_tests(tmp_path, monkeypatch, text, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(text)
    (hit,) = occurrences(tmp_path / "a.py")
    assert hit.startswith(f"a.py:{line}: ")


def test_stored_texts_and_other_words_are_no_hits(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "a.py").write_text('"the server broke off its answer"\n# neither_anew_here nor understood\n')
    assert list(occurrences(tmp_path / "a.py")) == []


@pytest.mark.parametrize(
    "folder", ["gxr_batch", "tests", "docs benchmarks jobs inputs outputs", "*.md *.toml *.txt Makefile"]
)
def test_no_banned_phrase_occurs(folder):
    found = [hit for path in texts(folder.split()) for hit in occurrences(path)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    for path in texts(sys.argv[1:]):
        for hit in occurrences(path):
            print(hit)
