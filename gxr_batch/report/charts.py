"""Charts: Vega-Lite specifications, drawn to SVG when the page is made, so that the page needs no library.

The charts of the newest stretch of work (rows by state, rows a minute, tokens a second, slots in use), histograms of
what a row took, and bars of names. Colours are the page's own CSS variables, so that one drawing serves light, dark and
paper. Every chart comes with its figures as a table, for those who cannot see it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timezone
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from gxr_batch.report.aggregate import Floats, Histogram, Night

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
    return Markup(svg)  # Vega escapes the texts that it draws; tests/integration/test_report.py tries


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


# The layers from the ground up, and their colours.
_LAYERS = {"generated": "var(--ok)", "failed": "var(--failed)", "held": "var(--held)", "left": "var(--left)"}


class _Clock(NamedTuple):
    """The edges of the night's steps as the axis has them and as the tables say them."""

    moments: list[float]
    labels: list[str]
    axis: Spec
    steps: str


def night_charts(night: Night, left: int, slots: float | None, zone: timezone) -> list[Chart]:
    """Return the charts; `left` rows are still to do, `slots` is how many rows the engine could take at once."""
    clock = _clock(night, zone)
    return [
        _progress(night, left, clock),
        _steps("Rows a minute", "rows/min", night.rows_a_minute, clock),
        _steps("Tokens a second", "tok/s", night.tokens_a_second, clock),
        _steps("Slots in use", "rows side by side", night.rows_in_progress, clock, most=slots),
    ]


def _clock(night: Night, zone: timezone) -> _Clock:
    # A clock that is read in UTC shows the time of the zone.
    moments = [float(edge) + zone.utcoffset(None).total_seconds() * 1000 for edge in night.edges]
    form = "%H:%M" if night.step_seconds >= 60 else "%H:%M:%S"
    labels = [datetime.fromtimestamp(moment / 1000, UTC).strftime(f"%d %b {form}") for moment in moments]
    axis: Spec = {"field": "at", "type": "temporal", "title": None, "scale": {"type": "utc"}}
    axis["axis"] = {"format": form, "grid": False, "labelOverlap": True, "tickCount": 6}
    return _Clock(moments, labels, axis, f"in steps of {_length(night.step_seconds)}")


def _progress(night: Night, left: int, clock: _Clock) -> Chart:
    done: dict[str, Any] = {name: night.finished["ok" if name == "generated" else name] for name in list(_LAYERS)[:3]}
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
    note = f"rows of the table, {total:,.0f} in all"
    if night.earlier_rows:
        note += f"; {night.earlier_rows:,} were finished before this night"
    return Chart("Progress over the night", note, draw(spec), ("time", *names), tuple(rows))


def _steps(title: str, unit: str, values: Floats, clock: _Clock, most: float | None = None) -> Chart:
    """Return a figure as one bar a step, with a dashed line where `most` is."""
    edges = zip(clock.moments[:-1], clock.moments[1:], values, strict=True)
    data = [{"at": at, "to": to, "value": float(value)} for at, to, value in edges]
    y = {"field": "value", "type": "quantitative", "title": None, "axis": {"tickCount": 5}, "scale": {"nice": 5}}
    bars = {"x": clock.axis, "x2": {"field": "to"}, "y": y, "y2": {"datum": 0}}
    layers: list[Spec] = [{"mark": {"type": "rect", "color": MARK}, "encoding": bars}]
    if most:
        line = {"type": "rule", "color": INK, "strokeDash": [4, 3]}
        layers.append({"mark": line, "encoding": {"y": {"datum": most, "type": "quantitative"}}})
    note = f"{unit}, {clock.steps}" + (f"; the dashed line is all {most:.0f} slots" if most else "")
    rows = [(label, figure(value)) for label, value in zip(clock.labels, values, strict=False)]
    return Chart(title, note, draw({"data": {"values": data}, "layer": layers}), ("from", unit), tuple(rows))


def _length(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 3600 else f"{seconds / 3600:g} h"
