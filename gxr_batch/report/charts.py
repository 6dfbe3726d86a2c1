"""Charts: Vega-Lite specifications, drawn to SVG when the page is made, so that the page needs no library.

Colours are the page's own CSS variables, so that one drawing serves light, dark and paper. Every chart comes with its
figures as a table, for those who cannot see it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from gxr_batch.report.series import Histogram

Spec = dict[str, Any]
_WIDTH, _HEIGHT = 560, 170
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, LINE, MARK = "var(--ink)", "var(--muted)", "var(--line)", "var(--mark)"
_AXIS = {
    "labelColor": MUTED, "titleColor": MUTED, "gridColor": LINE, "domainColor": LINE, "tickColor": LINE,
    "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8, "labelPadding": 4,
}  # fmt: skip
# The labels of the axes count as part of the width, so that all charts are drawn at one scale.
_FIT = {"type": "fit-x", "contains": "padding"}
_CONFIG = {
    "aria": False,  # labels on every mark would be a fifth of the page; the table beside the chart says it better
    "background": None,
    "font": _FONT,
    "view": {"stroke": None},
    "axis": _AXIS,
    "legend": {"labelColor": INK, "labelFontSize": 12, "title": None, "orient": "top", "symbolType": "square"},
}
_BARS_MOST = 14
# Room for the names of bars, and for one letter of the widest usual font: the reader's is not known here.
_LABEL, _LETTER = 230, 7.5


class Chart(NamedTuple):
    """One chart of the page: its drawing, and the same figures as a table (`header`, then `rows`)."""

    title: str
    note: str
    svg: Markup
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def draw(spec: Spec) -> Markup:
    """Return a Vega-Lite specification as SVG."""
    import vl_convert  # type: ignore[import-untyped,unused-ignore]

    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": _WIDTH,
        "height": _HEIGHT,
        "autosize": _FIT,
        **spec,
    }
    svg = vl_convert.vegalite_to_svg({**whole, "config": _CONFIG}, vl_version="6.4")
    return Markup(svg)  # Vega escapes the texts that it draws; tests/test_report.py tries


def histogram_chart(title: str, unit: str, found: Histogram) -> Chart:
    """Return how many rows lie in each step of a figure."""
    data = [
        {"from": float(low), "to": float(high), "rows": float(count)}
        for low, high, count in zip(found.edges[:-1], found.edges[1:], found.counts, strict=True)
    ]
    ticks = whole_ticks(found.counts.max())
    spec = {
        "data": {"values": data},
        "mark": {"type": "rect", "color": MARK, "stroke": "var(--paper)", "strokeWidth": 1},
        "encoding": {
            "x": {
                "field": "from",
                "type": "quantitative",
                "title": unit,
                "axis": {"grid": False},
                "scale": {"nice": False, "zero": False},
            },
            "x2": {"field": "to"},
            "y": {
                "field": "rows",
                "type": "quantitative",
                "title": None,
                "axis": {"tickCount": ticks, "format": ",d"},
                "scale": {"nice": ticks},
            },
            "y2": {"datum": 0},
        },
    }
    note = f"rows by {unit}; half of them take at most {figure(found.median)}"
    if found.beyond:
        note += f"; the last bar holds {found.beyond:,} still longer ones"
    rows = [(f"{figure(one['from'])} to {figure(one['to'])}", figure(one["rows"])) for one in data if one["rows"]]
    return Chart(title, note, draw(spec), (unit, "rows"), tuple(rows))


def whole_ticks(most: float) -> int:
    """Return how many ticks an axis from 0 to so many rows can have; no row is half."""
    return int(min(5, max(1, most)))


def bar_chart(title: str, note: str, counts: Mapping[str, int], total: int) -> Chart:
    """Return counts by name as bars, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ordered[:_BARS_MOST]
    if len(ordered) > len(shown):
        note += f"; the {_BARS_MOST} most frequent of {len(ordered)}"
    extent = min(_LABEL, max(len(name) for name in counts) * _LETTER)
    data = [{"name": name, "rows": count, "label": f"{count:,}"} for name, count in shown]
    y = {
        "field": "name",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelLimit": _LABEL, "minExtent": extent, "ticks": False, "domain": False, "labelColor": INK},
    }
    x = {"field": "rows", "type": "quantitative", "title": None, "axis": None}
    spec = {
        "height": {"step": 26},
        "data": {"values": data},
        "encoding": {"y": y, "x": x},
        "layer": [
            {"mark": {"type": "bar", "color": MARK, "height": 16}},
            {
                "mark": {"type": "text", "align": "left", "dx": 5, "color": INK, "fontSize": 12},
                "encoding": {"text": {"field": "label"}},
            },
        ],
    }
    rows = [(name, f"{count:,}", f"{count / max(total, 1):.1%}") for name, count in ordered]
    return Chart(title, note, draw(spec), ("kind", "rows", "share"), tuple(rows))


def figure(value: float) -> str:
    """Return a number as the tables beside the charts say it."""
    if not np.isfinite(value):
        return ""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:,.3g}"
