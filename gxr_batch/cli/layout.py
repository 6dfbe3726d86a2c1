"""How results are laid out as text: 80 columns, no colour, the same in a terminal and in a log file."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence

WIDTH = 80
_LABEL = 11


def wrapped(text: str, indent: str = "", *, width: int = WIDTH) -> list[str]:
    """Return a text as lines of at most `width` columns. Paths and other long words are never broken."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def labelled(entries: Iterable[tuple[str, str]]) -> list[str]:
    """Return `  label      text` lines; what does not fit is continued below the text."""
    indent = " " * (_LABEL + 2)
    return [line for label, text in entries for line in wrapped(f"  {label:<{_LABEL}}{text}", indent)]


def columns(lines: Sequence[Sequence[str]], texts: Collection[int]) -> list[str]:
    """Return rows of cells as an aligned table; the columns at the places `texts` are aligned left, others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    ]


def duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds, e.g. 0:07:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def rate(value: float) -> str:
    """Return a speed with one decimal below 100, and none above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def mib(size: int) -> str:
    """Return a size in bytes as MiB, or GiB from 10 GiB on."""
    return f"{size / 2**30:,.1f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.1f} MiB"
