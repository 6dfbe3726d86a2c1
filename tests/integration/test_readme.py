"""The documents agree with the program: help, links, commands. Run as a script, this writes the help again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from places import ROOT

from gxr_batch.cli import VERBS, main
from gxr_batch.job import make_job

README = ROOT / "README.md"
RENEW = "PYTHONPATH=tests/support python tests/integration/test_readme.py"
DOCUMENTS = [
    path
    for folder in (".", "docs", "benchmarks", "inputs", "jobs/schedule")
    for path in sorted((ROOT / folder).glob("*.md"))
]
BLOCKS = re.compile(r"<!-- help -->.*?(?=\n## )", re.DOTALL)


def help_blocks() -> str:
    """Return the section as the program gives it today."""
    runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    blocks = []
    for verb in VERBS:
        shown = runner.invoke(main, [verb, "--help"], prog_name="gxr-batch", terminal_width=100).output.rstrip()
        blocks.append(f"<details><summary><code>gxr-batch {verb}</code></summary>\n\n```\n{shown}\n```\n\n</details>\n")
    return "<!-- help -->\n\n" + "\n".join(blocks)


def test_the_readme_shows_the_programs_own_help():
    found = BLOCKS.search(README.read_text())
    assert found is not None
    assert found[0].strip() == help_blocks().strip(), f"run: {RENEW}"


def test_the_readme_names_every_exit_code():
    from gxr_batch.cli.exit_codes import Exit

    text = README.read_text()
    assert all(f"| {code.value} |" in text for code in Exit)


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, spelled as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(document):
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands_of(document: Path) -> list[list[str]]:
    """Return the arguments of every gxr-batch command that a document shows, in the text or on a line of its own."""
    text = document.read_text()
    shown = re.findall(r"`gxr-batch ([^`\n]+)`", text) + re.findall(
        r"^ *[^\s<]*gxr-batch ([^`\n]+)$", text, re.MULTILINE
    )
    return [shlex.split(line.replace("…", "text"), comments=True) for line in shown]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_shown_is_one_that_the_program_parses(document):
    for arguments in commands_of(document):
        command: click.Command = main
        rest = list(arguments)
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            found = command.get_command(click.Context(command), rest.pop(0))
            assert found is not None, arguments
            command = found
        if rest:  # a bare verb is its name, not a command to type
            shown = command.make_context("gxr-batch", rest)
            make_job("shown", shown.params.get("overrides", ()))


if __name__ == "__main__":
    README.write_text(BLOCKS.sub(lambda _: help_blocks(), README.read_text()))
