"""Charts of what happened over the night: rows by state, rows a minute, tokens a second, slots in use."""

from __future__ import annotations

from datetime import UTC, datetime, timezone
from typing import Any, NamedTuple

from gxr_batch.report.aggregate import Floats
from gxr_batch.report.charts import INK, MARK, Chart, Spec, draw, figure, whole_ticks
from gxr_batch.report.series import Night

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
