"""What the documents show: blocks with the comment above each, and a reader who runs a page's commands in a folder."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import click
from click.testing import CliRunner
from openpyxl import load_workbook
from places import ROOT

from gxr_batch.cli import main
from gxr_batch.job import make_job

DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "benchmarks", "inputs", "outputs", "jobs/schedule")
    for path in ROOT.glob(f"{folder}/*.md")
)
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<kind>[\w{}-]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the comment above it, split at the colon."""

    kind: str
    body: str
    mark: str
    reason: str

    @property
    def lines(self) -> list[str]:
        """The command lines, without comments and blank lines."""
        return [line for line in self.body.splitlines() if line.strip() and not line.startswith("#")]


def blocks(document: Path) -> Iterator[Block]:
    """Yield the blocks of a document in order."""
    for found in _BLOCK.finditer(document.read_text()):
        mark, _, reason = (found["mark"] or "").partition(":")
        yield Block(found["kind"], found["body"], mark.strip(), reason.strip())


def inline_commands(document: Path) -> list[str]:
    """Return the gxr-batch commands inside the text of a document."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+", " ", shown).replace("…", "text") for shown in re.findall(r"`(gxr-batch [^`]+)`", text)]


def arguments_of(line: str) -> list[str] | None:
    """Return the arguments of a gxr-batch command line, None of any other line."""
    words = shlex.split(line, comments=True)
    return words[1:] if words and Path(words[0]).name == "gxr-batch" else None


def parse(arguments: list[str]) -> None:
    """Parse a command as the program does. Raises ClickException or GxrError for one that it refuses."""
    command: click.Command = main
    rest = list(arguments)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(click.Context(command), rest.pop(0))
        if found is None:
            raise click.UsageError(f"no such command: {arguments}")
        command = found
    if rest:  # a bare verb is its name, not a command to type
        make_job("shown", command.make_context("gxr-batch", rest).params.get("overrides", ()))


class Reader:
    """Follows a page in a folder: saves the files that it shows and runs its commands, with the echo engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("inputs", "jobs"):
            shutil.copytree(ROOT / name, folder / name)
        self._names: dict[str, object] = {}

    def follow(self, block: Block) -> None:
        """Do what a reader does with a block: save it, type it, or nothing."""
        if block.mark == "file":
            (self.folder / block.reason).write_text(block.body)
        elif block.mark == "not run":
            return
        elif block.kind == "python":
            self._use_echo()
            exec(compile(block.body, "page", "exec"), self._names)
        elif block.kind in {"bash", "console", "shell", "sh"}:
            for line in block.lines:
                self._type(line)

    def _type(self, line: str) -> None:
        arguments = arguments_of(line)
        assert arguments is not None, f"only gxr-batch can be run here; mark the block as not run: {line}"
        self._use_echo()
        if arguments[0] in {"generate", "bench"}:
            arguments += ["--set", "engine.kind=echo"]
        if arguments[:2] == ["review", "import"]:
            self._review(self.folder / arguments[-1])
        done = CliRunner().invoke(main, arguments, prog_name="gxr-batch")
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"

    def _use_echo(self) -> None:
        """Set the echo engine in every job file of the folder."""
        for path in [*self.folder.glob("*.toml"), *self.folder.glob("jobs/*.toml")]:
            text = path.read_text()
            engine = tomllib.loads(text).get("engine")
            if engine is None:
                path.write_text(f'{text}\n[engine]\nkind = "echo"\n')
            elif "kind" in engine:
                path.write_text(re.sub(r'(^\[engine\][^\[]*^kind = )"\w+"', r'\1"echo"', text, flags=re.MULTILINE))
            else:
                path.write_text(re.sub(r"^\[engine\].*$", '[engine]\nkind = "echo"', text, flags=re.MULTILINE))

    @staticmethod
    def _review(sheet: Path) -> None:
        """Play the reviewer, who approves every case."""
        book = load_workbook(sheet)
        rows = list(book["Cases"].iter_rows())
        header = next(place for place, row in enumerate(rows) if any(cell.value == "gxr_row_id" for cell in row))
        columns = {cell.value: place for place, cell in enumerate(rows[header])}
        for case in rows[header + 1 :]:
            for column, value in (
                ("gxr_review_status", "approved"),
                ("gxr_reviewer", "A"),
                ("gxr_reviewed_at", date.today()),
            ):
                case[columns[column]].value = value
        book.save(sheet)
