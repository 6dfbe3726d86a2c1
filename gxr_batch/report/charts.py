"""Draws charts from Vega-Lite specifications to SVG, so that the report needs no script library.

Charts of the latest period of work (rows by state, rows per minute, tokens per second, slots in use), histograms per
row, and bar charts. Colours are CSS variables of the page, for light mode, dark mode and print. For accessibility, each
chart has its figures as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timezone
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from gxr_batch.cells import in_xml, quoted
from gxr_batch.report.aggregate import Floats, Histogram, Period

Spec = dict[str, Any]
_WIDTH, _HEIGHT = 560, 170
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, LINE, MARK = "var(--ink)", "var(--muted)", "var(--line)", "var(--mark)"
_AXIS = {
    "labelColor": MUTED, "titleColor": MUTED, "gridColor": LINE, "domainColor": LINE, "tickColor": LINE,
    "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8, "labelPadding": 4,
}  # fmt: skip
# The width includes the axis labels, so that all charts have the same scale.
_FIT = {"type": "fit-x", "contains": "padding"}
_CONFIG = {
    "aria": False,  # labels on every mark would be a fifth of the page; the chart's table replaces them
    "background": None,
    "font": _FONT,
    "view": {"stroke": None},
    "axis": _AXIS,
    "legend": {"labelColor": INK, "labelFontSize": 12, "title": None, "orient": "top", "symbolType": "square"},
}
_BARS_MOST = 14
# Maximum width of bar names, and of a letter in the widest common font, as the reader's font is unknown.
_LABEL, _LETTER = 230, 7.5


class Chart(NamedTuple):
    """One chart: its drawing, and its figures as a table (`header`, then `rows`)."""

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
    return Markup(svg)  # Vega escapes the texts that it draws, see tests/integration/test_report.py


def histogram_chart(title: str, unit: str, found: Histogram) -> Chart:
    """Return a histogram as a chart."""
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
    note = f"rows by {unit}; median {figure(found.median)}"
    if found.beyond:
        note += f"; the last bar includes {found.beyond:,} higher values"
    rows = [(f"{figure(one['from'])} to {figure(one['to'])}", figure(one["rows"])) for one in data if one["rows"]]
    return Chart(title, note, draw(spec), (unit, "rows"), tuple(rows))


def whole_ticks(most: float) -> int:
    """Return how many ticks an axis from 0 to `most` rows can have at whole numbers."""
    return int(min(5, max(1, most)))


def bar_chart(title: str, note: str, counts: Mapping[str, int], total: int) -> Chart:
    """Return counts by name as bars, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ordered[:_BARS_MOST]
    if len(ordered) > len(shown):
        note += f"; the {_BARS_MOST} most frequent of {len(ordered)}"
    extent = min(_LABEL, max(len(name) for name in counts) * _LETTER)
    # The library ends the process at a character that XML does not allow, and takes minutes for long names.
    data = [{"name": in_xml(quoted(name)), "rows": count, "label": f"{count:,}"} for name, count in shown]
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
    """Return a number as shown in the tables of the charts."""
    if not np.isfinite(value):
        return ""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:,.3g}"


# The layers from the bottom up, and their colours.
_LAYERS = {"generated": "var(--ok)", "failed": "var(--failed)", "held": "var(--held)", "left": "var(--left)"}


class _Clock(NamedTuple):
    """The edges of the period's steps, for the axis and for the tables."""

    moments: list[float]
    labels: list[str]
    axis: Spec
    steps: str


def period_charts(period: Period, left: int, slots: float | None, zone: timezone) -> list[Chart]:
    """Return the charts of a period; `left`: rows still to do, `slots`: the engine's slots."""
    clock = _clock(period, zone)
    return [
        _progress(period, left, clock),
        _steps("Rows per minute", "rows/min", period.rows_a_minute, clock),
        _steps("Tokens per second", "tok/s", period.tokens_a_second, clock),
        _steps("Slots in use", "rows at the same time", period.rows_in_progress, clock, most=slots),
    ]


def _clock(period: Period, zone: timezone) -> _Clock:
    # Shifted by the zone's offset, because the axis shows UTC.
    moments = [float(edge) + zone.utcoffset(None).total_seconds() * 1000 for edge in period.edges]
    form = "%H:%M" if period.step_seconds >= 60 else "%H:%M:%S"
    labels = [datetime.fromtimestamp(moment / 1000, UTC).strftime(f"%d %b {form}") for moment in moments]
    axis: Spec = {"field": "at", "type": "temporal", "title": None, "scale": {"type": "utc"}}
    axis["axis"] = {"format": form, "grid": False, "labelOverlap": True, "tickCount": 6}
    return _Clock(moments, labels, axis, f"in steps of {_length(period.step_seconds)}")


def _progress(period: Period, left: int, clock: _Clock) -> Chart:
    done: dict[str, Any] = {name: period.finished["ok" if name == "generated" else name] for name in list(_LAYERS)[:3]}
    total = sum(float(values[-1]) for values in done.values()) + left
    done["left"] = total - sum(done.values())
    names = [name for name in _LAYERS if done[name].any()]
    values = [
        {"at": moment, "state": name, "rows": float(done[name][place]), "order": order}
        for order, name in enumerate(names)
        for place, moment in enumerate(clock.moments)
    ]
    colours = {"domain": names, "range": [_LAYERS[name] for name in names]}
    y: Spec = {"field": "rows", "type": "quantitative", "stack": "zero", "title": None}
    y["axis"] = {"tickCount": whole_ticks(total), "format": ",d"}
    spec: Spec = {
        "data": {"values": values},
        "mark": "area",
        "encoding": {
            "x": clock.axis,
            "y": y,
            "color": {"field": "state", "type": "nominal", "scale": colours},
            "order": {"field": "order", "type": "quantitative"},
        },
    }
    rows = [(label, *(figure(done[name][place]) for name in names)) for place, label in enumerate(clock.labels)]
    note = f"rows of the table, {total:,.0f} in total"
    if period.earlier_rows:
        note += f"; {period.earlier_rows:,} were finished in earlier periods"
    return Chart("Progress", note, draw(spec), ("time", *names), tuple(rows))


def _steps(title: str, unit: str, values: Floats, clock: _Clock, most: float | None = None) -> Chart:
    """Return a figure with one bar per step, and a dashed line at `most`."""
    edges = zip(clock.moments[:-1], clock.moments[1:], values, strict=True)
    data = [{"at": at, "to": to, "value": float(value)} for at, to, value in edges]
    y = {"field": "value", "type": "quantitative", "title": None, "axis": {"tickCount": 5}, "scale": {"nice": 5}}
    bars = {"x": clock.axis, "x2": {"field": "to"}, "y": y, "y2": {"datum": 0}}
    layers: list[Spec] = [{"mark": {"type": "rect", "color": MARK}, "encoding": bars}]
    if most:
        line = {"type": "rule", "color": INK, "strokeDash": [4, 3]}
        layers.append({"mark": line, "encoding": {"y": {"datum": most, "type": "quantitative"}}})
    note = f"{unit}, {clock.steps}" + (f"; dashed line: all {most:.0f} slots" if most else "")
    rows = [(label, figure(value)) for label, value in zip(clock.labels, values, strict=False)]
    return Chart(title, note, draw({"data": {"values": data}, "layer": layers}), ("from", unit), tuple(rows))


def _length(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 3600 else f"{seconds / 3600:g} h"
