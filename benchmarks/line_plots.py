"""Plots of a number against the length of history, or against the repeat rate of selections."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.group_table import Records, grouped, quantity
from benchmarks.targets import HISTORY
from longlive_rag_ops.demo.palette import figure
from longlive_rag_ops.extras import need

OURS, PUBLISHED, NATIVE, CEILING = "#e8112d", "#555555", "#1f3b73", "#111111"
PEERS = ("#2e8b57", "#d9730d", "#8e44ad", "#1f6fb4", "#7f6a00", "#b03a2e")
SMALL = 9.5
COPY = "copy"  # a ceiling


@dataclass
class Line:
    """Numbers against one axis."""

    name: str
    role: str
    points: list[tuple[float, float]]


def _lines(records: Records, beginning: str, axis: str) -> list[Line]:
    """A line a contender, of the groups with a title that begins so, over ``shape[axis]``.

    What stands before ``: `` in a contender's name says at which point of several in a group it was timed.
    """
    found: dict[str, Line] = {}
    for title, group in grouped(records).items():
        if title.split(",")[0] != beginning:
            continue
        for record in group:
            if record.median is not None and axis in record.shape and record.role != "part":
                name = record.contender.rpartition(": ")[2]
                line = found.setdefault(name, Line(name, record.role, []))
                line.points.append((float(record.shape[axis]), record.median))
    for line in found.values():
        line.points.sort()
    order = ("ours", "native", "published", "peer", "ceiling")
    return sorted(found.values(), key=lambda line: order.index(line.role))


def _style(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A colour by role; several of one role differ in their dashes, peers in their colour."""
    fixed = {"ours": OURS, "native": NATIVE, "published": PUBLISHED, "ceiling": CEILING}
    seen: dict[str, int] = {}
    styles = []
    for line in lines:
        number = seen[line.role] = seen.get(line.role, -1) + 1
        dashes: Any = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))[number % 4]
        if line.role == "peer":
            styles.append({"color": PEERS[number % len(PEERS)], "linestyle": "-", "linewidth": 1.3, "marker": "."})
        elif line.role == "ceiling":
            styles.append({"color": CEILING, "linestyle": (0, (2, 2)), "linewidth": 1.2})
        else:
            styles.append({"color": fixed[line.role], "linestyle": dashes, "linewidth": 2.2, "marker": "o", "ms": 4})
    return styles


def _line_plot(lines: Sequence[Line], xlabel: str, unit: str, log_x: bool, log_y: bool) -> Any | None:
    if not lines:
        return None
    width, height, legend = 9.6, 5.0, 2.9
    made = figure(width, height)
    axes = made.add_axes((0.95 / width, 0.75 / height, (width - legend - 1.2) / width, (height - 1.65) / height))
    for line, style in zip(lines, _style(lines), strict=True):
        axes.plot(*zip(*line.points, strict=True), label=textwrap.fill(line.name, 32), **style)
    axes.set_xscale("log" if log_x else "linear")
    ticker = need("matplotlib.ticker", "drawing the plots", extra="bench")
    values = [value for line in lines for _, value in line.points if value > 0]
    if log_y and max(values) > 10 * min(values):
        axes.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    else:
        axes.set_ylim(0, 1.12 * max(values, default=1.0))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: quantity(value, unit) if value > 0 else "0"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(xlabel, fontsize=10.5)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.3, which="major")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=SMALL, frameon=False, labelspacing=0.7)
    return made


def draw_retrieval(records: Records) -> Any | None:
    # The copy is not of the whole index where that is large.
    lines = [line for line in _lines(records, "retrieval against history", "history") if line.name != COPY]
    return _line_plot(lines, "frames of history", "s", log_x=True, log_y=True)


def draw_attention(records: Records) -> Any | None:
    lines = [line for line in _lines(records, HISTORY, "history") if line.role != "ceiling"]
    ends = [x for line in lines for x, _ in line.points]
    for record in records:  # what has no history takes the same at any length of it
        level = record.median
        if record.group.split(",")[0] == HISTORY and record.role == "native" and level is not None and ends:
            lines.append(Line(record.contender, "native", [(min(ends), level), (max(ends), level)]))
    return _line_plot(lines, "frames of history", "s", log_x=True, log_y=True)


def draw_traffic(records: Records) -> Any | None:
    group = [record for record in records if record.unit == "B"]
    lines = _lines(group, "bank traffic against repeat rate", "repeat_rate")
    return _line_plot(lines, "share of the selection that was selected before too", "B", log_x=False, log_y=False)
