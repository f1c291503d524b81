"""The roofline: rate of each op against its arithmetic intensity, below what the device's copy and product allow.

S. Williams, A. Waterman, D. Patterson: Roofline, an insightful visual performance model, CACM 52 (2009).
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.group_table import Records, grouped, point
from benchmarks.record import Record
from longlive_rag_ops.demo.palette import figure
from longlive_rag_ops.extras import need

ROOF, OURS, PEER = "#333333", "#e8112d", "#2e8b57"
SMALL = 9.5


def draw_roofline(records: Records) -> Any | None:
    """Of the groups at the paper's shape: our fastest engine and the fastest peer."""
    copies, products = _rates(records, "copy", "bytes"), _rates(records, "matmul", "flops")
    marks = []
    for title, group in grouped(records).items():
        if any(point(record.contender) for record in group):
            continue
        for role in ("ours", "peer"):
            placed = [r for r in group if r.role == role and r.median and r.extra.get("intensity")]
            if placed:
                marks.append((title.split(",")[0], min(placed, key=lambda record: record.median or math.inf)))
    if not marks or not copies or not products:
        return None
    width, height = 9.6, 5.4
    made = figure(width, height)
    axes = made.add_axes((0.11, 0.13, 0.85, 0.68))
    bandwidth, peak = statistics.median(copies), statistics.median(products)
    ridge = peak / bandwidth
    xs = [record.extra["intensity"] for _, record in marks] + [ridge]
    left, right = 0.4 * min(xs), 4 * max(xs)
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color=ROOF, linewidth=1.6)
    axes.text(left * 1.15, left * bandwidth * 1.9, f"copy {bandwidth / 1e9:.0f} GB/s", fontsize=SMALL, color=ROOF)
    axes.text(right / 1.1, peak * 1.12, f"matmul {_flops(peak)}", fontsize=SMALL, color=ROOF, ha="right")
    for _, record in marks:
        colour, marker, size = (OURS, "o", 8) if record.role == "ours" else (PEER, "D", 6)
        axes.plot([record.extra["intensity"]], [_rate(record)], marker=marker, color=colour, linestyle="", ms=size)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, 6 * right)
    axes.set_ylim(0.25 * min(left * bandwidth, *(_rate(record) for _, record in marks)), 2 * peak)
    _label(
        axes, [(f"{name}, {_flops(_rate(r))}", r.extra["intensity"], _rate(r)) for name, r in marks if r.role == "ours"]
    )
    axes.yaxis.set_major_formatter(lambda value, _: _flops(value))
    axes.yaxis.set_minor_formatter(need("matplotlib.ticker", "drawing the plots", extra="bench").NullFormatter())
    axes.set_xlabel("operations for each byte that has to move", fontsize=10.5)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.3, which="major")
    handles = [
        axes.plot([], [], marker="o", color=OURS, linestyle="", label="ours")[0],
        axes.plot([], [], marker="D", color=PEER, linestyle="", label="fastest other")[0],
    ]
    axes.legend(handles=handles, loc="lower right", fontsize=SMALL, frameon=False)
    return made


def _label(axes: Any, labels: list[tuple[str, float, float]]) -> None:
    """Names beside points, from the highest down, none on another."""
    apart, floor = 15.0, math.inf  # points
    to_points = 72 / axes.figure.dpi
    for text, x, y in sorted(labels, key=lambda label: -label[2]):
        own = axes.transData.transform((x, y))[1] * to_points
        floor = min(own - 13, floor - apart)
        axes.annotate(text, (x, y), (12, floor - own), textcoords="offset points", fontsize=SMALL)


def _rates(records: Records, ceiling: str, unit: str) -> list[float]:
    """Of a ceiling in every group: it was timed with the group's contenders."""
    return [
        getattr(record, unit) / record.median
        for record in records
        if record.role == "ceiling" and record.contender == ceiling and record.median
    ]


def _rate(record: Record) -> float:
    """Operations a second."""
    return float((record.flops or record.bytes * record.extra["intensity"]) / (record.median or math.inf))


def _flops(rate: float) -> str:
    for limit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if rate >= limit:
            return f"{rate / limit:.3g} {name}FLOP/s"
    return f"{rate:.3g} FLOP/s"
