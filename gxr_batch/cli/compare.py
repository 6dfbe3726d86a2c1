"""`gxr-batch compare`: the same rows of two runs, in figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gxr_batch.cli.options import open_run

if TYPE_CHECKING:
    from gxr_batch.audit.comparison import Compared
    from gxr_batch.ledger import RunReader


@click.command(name="compare")
@click.argument("this_run", metavar="RUN1", type=click.Path(path_type=Path))
@click.argument("other_run", metavar="RUN2", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(this_run: Path, other_run: Path, as_json: bool) -> None:
    """Compare the same rows of two runs: flags, lengths, and what reviewers found.

    Rows are matched by row id and sample. Those whose cells differ, or that have no text in one run, are left out and
    counted. "only here" counts rows with a flag or error in RUN1 only, "only there" in RUN2 only; p is McNemar's exact
    test: how likely so uneven counts are if the runs are equally good. Works during a run; writes nothing.

    \b
    Example:
      gxr-batch compare outputs/warmer outputs/demo
    """
    from gxr_batch.audit import comparison

    runs = open_run(this_run), open_run(other_run)
    found = comparison.compare_runs(*runs)
    if as_json:
        names = {name: str(run.folder) for name, run in zip(("this", "other"), runs, strict=True)}
        click.echo(json.dumps({"runs": names, **comparison.as_json(found)}, indent=2))
    else:
        click.echo("\n".join(_text(found, runs)))


def _text(found: Compared, runs: Sequence[RunReader]) -> Iterator[str]:
    from gxr_batch.audit.comparison import difference_texts, method_text
    from gxr_batch.cells import quoted
    from gxr_batch.cli.layout import columns, labelled, wrapped
    from gxr_batch.rows.columns import counted

    texts = f"{counted(found.texts, 'text')} of " if found.texts > found.rows else ""
    left = (
        (found.changed, "with other cells"),
        (found.without_text, "without a text in one run"),
        (found.only_this, "only in this run"),
        (found.only_other, "only in the other"),
    )
    why = ", ".join(f"{count:,} {reason}" for count, reason in left if count)
    yield from wrapped(f"{texts}{counted(found.rows, 'row')} compared; left out: {why or 'none'}")
    yield from labelled(zip(("this run", "other run"), (quoted(run.folder) for run in runs), strict=True))
    means = {name: mean for name, mean in found.means.items() if mean is not None}
    if means:
        yield ""
        head = ("mean per text", "this run", "other run", "difference", "interval")
        lines = [
            (name, f"{mean.this:,.1f}", f"{mean.other:,.1f}", *difference_texts(mean)) for name, mean in means.items()
        ]
        yield from columns([head, *lines], {0})
    if found.texts:
        yield ""
        yield from _counts_table(found)
        yield ""
        yield from wrapped(method_text(found))
    for note in _notes(found, runs):
        yield from wrapped(f"note: {note}")


def _counts_table(found: Compared) -> list[str]:
    from gxr_batch.audit.comparison import p_text
    from gxr_batch.cells import quoted
    from gxr_batch.cli.layout import WIDTH, columns

    counts = dict(found.flags)
    if found.read:
        counts[f"an error (of {found.read:,} read)"] = found.judged
    head = ("texts with", "this run", "other run", "only here", "only there", "p")
    lines = [(quoted(name), *(f"{one:,}" for one in both[:4]), p_text(both.p)) for name, both in counts.items()]
    excess = max(map(len, columns([head, *lines], {0}))) - WIDTH
    if excess > 0:
        most = max(len(head[0]), max(len(name) for name, *_ in lines) - excess)
        lines = [(name if len(name) <= most else f"{name[: most - 1]}…", *rest) for name, *rest in lines]
    return columns([head, *lines], {0})


def _notes(found: Compared, runs: Sequence[RunReader]) -> Iterator[str]:
    from gxr_batch.rows.columns import counted

    if found.unknown:
        yield f"{counted(found.unknown, 'text')} read in both runs not counted: approved with edits, without counts"
    for name, run, damaged in zip(("this run", "the other run"), runs, found.damaged, strict=True):
        if run.holder is not None:
            yield f"{name} is in progress"
        if damaged:
            yield f"{counted(damaged, 'damaged part')} of {name} left out; run its job again to generate the rows again"
