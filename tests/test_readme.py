"""The README's help blocks are the program's own. `python tests/test_readme.py` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from gxr_batch.cli import VERBS, main

README = Path(__file__).parent.parent / "README.md"
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
    assert found[0].strip() == help_blocks().strip(), "run: python tests/test_readme.py"


def test_the_readme_names_every_exit_code():
    from gxr_batch.cli.exits import Exit

    text = README.read_text()
    assert all(f"| {code.value} |" in text for code in Exit)


if __name__ == "__main__":
    README.write_text(BLOCKS.sub(lambda _: help_blocks(), README.read_text()))
