"""`gxr-batch show`: one case of a run in the terminal, the row's cells first, then the generated text with its mark."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gxr_batch.cli.options import open_run

if TYPE_CHECKING:
    from gxr_batch.ledger import RunReader

_NARROWEST, _WIDEST = 60, 100
_LONGEST_LABEL = 20


@click.command(name="show")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--row", "row_id", metavar="ID", help="Show the case of this row id, with all its samples.")
@click.option("--random", "any_row", is_flag=True, help="Show a generated case picked at random.")
def command(run_folder: Path, row_id: str | None, any_row: bool) -> None:
    """Show one case: the row's cells, then the generated text. Default: the first one generated.

    Works during a run. Cells and texts of rows held by identifier screening are not shown.

    \b
    Examples:
      gxr-batch show outputs/demo
      gxr-batch show outputs/demo --row TC-0003
    """
    if row_id is not None and any_row:
        raise click.UsageError("Give --row or --random, not both.")
    reader = open_run(run_folder)
    cases = _named(reader, row_id) if row_id is not None else [_generated(reader, any_row)]
    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((80, 24)).columns))
    click.echo("\n\n".join("\n".join(_lines(case, width)) for case in cases))


def _named(reader: RunReader, row_id: str) -> list[dict[str, Any]]:
    """Return the finished samples of a row. Raises RunError if there are none."""
    import pyarrow.compute as pc

    from gxr_batch.cells import quoted, rows_of
    from gxr_batch.errors import RunError

    found: list[dict[str, Any]] = []
    for table in _tables(reader):
        here = list(rows_of(table.filter(pc.equal(table["gxr_row_id"], row_id))))
        if found and not here:
            break
        found += here
    if not found:
        raise RunError(
            f"This run has no finished row {quoted(repr(row_id))}.",
            where=str(reader.folder),
            next_step=f"gxr-batch show {reader.folder} --random shows a row that is finished",
        )
    return found


def _generated(reader: RunReader, any_row: bool) -> dict[str, Any]:
    """Return the first generated case, or one drawn at random. Raises RunError if there is none."""
    import pyarrow.compute as pc

    from gxr_batch.cells import rows_of
    from gxr_batch.errors import RunError

    generated = reader.state.counts().ok
    left = random.randrange(generated) if any_row and generated else 0
    for table in _tables(reader):
        ok = table.filter(pc.equal(table["gxr_status"], "ok"))
        if left < ok.num_rows:
            return next(rows_of(ok.slice(left, 1)))
        left -= ok.num_rows
    raise RunError(
        "This run has no generated text yet.",
        where=str(reader.folder),
        next_step=f"gxr-batch status {reader.folder}",
    )


def _tables(reader: RunReader) -> Iterator[Any]:
    from gxr_batch.export.export_rows import open_source

    return open_source(reader, partial=True).tables


def _lines(case: dict[str, Any], width: int) -> Iterator[str]:
    from gxr_batch.cells import as_text, for_terminal, quoted
    from gxr_batch.cli.layout import wrapped
    from gxr_batch.export.export_rows import final_text

    cells = {name: as_text(value) for name, value in case.items() if not name.startswith("gxr_")}
    cells = {quoted(name): for_terminal(text) for name, text in cells.items() if text}
    label = min(_LONGEST_LABEL, max(map(len, cells), default=0))
    yield f"Row {quoted(case['gxr_row_id'])}, sample {case['gxr_sample']}"
    for name, text in cells.items():
        for place, line in enumerate(text.splitlines()):
            yield from wrapped(f"  {name if place == 0 else '':<{label}}  {line}", " " * (label + 4), width=width)
    yield ""
    shown = final_text(case)
    if shown is None:
        reason = for_terminal(case["gxr_error"] or "no reason given")
        yield from wrapped(f"No text: {case['gxr_status']}, {reason}", width=width)
    else:
        yield f"[AI-generated, {_review(case)}]"
        for line in for_terminal(shown).splitlines():
            yield from wrapped(line, width=width)
    hints = {"Flags": case["gxr_flags"], "Not named in the text, or denied": case["gxr_findings_lost"]}
    if any(hints.values()):
        yield ""
    for hint, names in hints.items():
        if names:
            yield from wrapped(for_terminal(f"{hint}: {', '.join(names)}"), width=width)
    yield ""
    yield from wrapped(case["gxr_disclaimer"], width=width)


def _review(case: dict[str, Any]) -> str:
    from gxr_batch.cells import quoted

    if not case["gxr_reviewer"]:
        return "unreviewed"
    status = case["gxr_review_status"].replace("_", " ")
    on = f" on {case['gxr_reviewed_at']:%Y-%m-%d}" if case["gxr_reviewed_at"] else ""
    return f"{status} by {quoted(case['gxr_reviewer'])}{on}"
