"""The documents agree with the program: generated pages, links, shown commands, Python examples, and the built site.

A page's commands run in order in a folder with copies of inputs/ and jobs/ and with the files that the page shows, with
the echo engine in place of the model. A block that cannot run has a comment above it, `<!-- not run: reason -->`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from shown import DOCUMENTS, Reader, arguments_of, blocks, inline_commands, parse

from gxr_batch.cli.exit_codes import Exit

sys.path.insert(0, str(ROOT / "docs"))
from generate import PAGES

README = ROOT / "README.md"
DOCS = ROOT / "docs"
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 8000


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_is_made_from_the_program_is_up_to_date(page):
    assert page.read_text() == PAGES[page](), "run: python docs/generate.py"


def test_every_exit_code_is_explained():
    text = (DOCS / "run-folder.md").read_text()
    assert all(f"| {code.value} |" in text for code in Exit)


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, spelled as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_every_link_leads_to_a_file_and_a_heading(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = re.sub(r"\s+", "", link).partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_document
def test_every_command_shown_in_the_text_is_one_that_the_program_parses(document):
    for shown in inline_commands(document):
        parse(arguments_of(shown) or [])


@every_document
def test_every_block_that_is_not_run_says_why_and_names_what_exists(document):
    for block in blocks(document):
        if block.mark != "not run":
            continue
        assert block.reason, block.body
        for line in block.lines:
            if (arguments := arguments_of(line)) is not None:
                parse(arguments)
            elif script := re.match(r"(?:\S*python|sbatch) (?:-\w )?(\w+/\S+)", line):
                assert (ROOT / script[1]).exists(), line
            elif target := re.match(r"make ([\w-]+)", line):
                assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


@every_document
def test_a_reader_who_follows_the_page_gets_no_error(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path)
    for block in blocks(document):
        reader.follow(block)


def built(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", *options, str(DOCS), str(folder)]
    return subprocess.run(command, text=True, capture_output=True, check=False, timeout=300)


def test_the_site_builds_without_warnings_and_requests_nothing_from_other_hosts(tmp_path):
    pytest.importorskip("sphinx", reason="Sphinx is not installed (extra docs)")
    drawn = shutil.which("dot") is not None
    done = built(tmp_path, "-b", "html") if drawn else built(tmp_path, "-b", "dummy")
    assert done.returncode == 0, done.stderr
    if not drawn:
        pytest.skip("Graphviz is not installed: no diagram was drawn (apt-get install graphviz)")
    for page in tmp_path.rglob("*.html"):
        elsewhere = re.findall(
            r"""<(?:script|link|img|iframe|object)\b[^>]*(?:src|href|data)=["'](?:https?:)?//[^"']*""", page.read_text()
        )
        assert not elsewhere, page.name
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\s]*", sheet.read_text()), sheet.name
