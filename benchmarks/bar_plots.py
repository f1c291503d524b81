"""Plots of shares of the device's own rates, and of the parts of a block."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.group_table import Records, grouped, point, quantity, time_over
from benchmarks.record import Record
from benchmarks.targets import BLOCK
from longlive_rag_ops.demo.palette import figure

PARTS = {
    "projections": "#1f3b73",
    "attention": "#5b8bc9",
    "rotation + write": "#f0a202",
    "embedding": "#2e8b57",
    "retrieval": "#e8112d",
    "fetch stall": "#8e44ad",
    "rest": "#c9c9c9",
}
UNSPLIT = "#8c8c8c"
ARITHMETIC, MOVING, PEER = "#1f6fb4", "#2e8b57", "#d9730d"
MOST_BARS = 30
SMALL = 9.5


def draw_ceiling(records: Records) -> Any | None:
    """Our best engine of each group as a bar, the best of the others as a mark; of groups of one point."""
    rows = []
    for title, group in grouped(records).items():
        if any(point(record.contender) for record in group):
            continue
        ours, peer = (_best(group, role) for role in ("ours", "peer"))
        if ours is not None:
            rows.append((title, ours, peer))
    if not rows:
        return None
    left_out, rows = max(0, len(rows) - MOST_BARS), rows[:MOST_BARS]
    names, values, width, height = 4.6, 2.95, 12.4, 1.85 + 0.45 * len(rows)
    made = figure(width, height)
    axes = made.add_axes((names / width, 0.95 / height, (width - names - values) / width, (height - 1.75) / height))
    for y, (_, ours, peer) in enumerate(rows):
        axes.barh(y, _percent(ours), height=0.62, color=ARITHMETIC if ours.flops else MOVING)
        if peer is not None:
            axes.plot([_percent(peer)], [y], marker="D", color=PEER, markeredgecolor="white", markersize=7.5)
        text = f"{_percent(ours):.0f} %  {ours.contender}, of {ours.ceiling}"
        axes.text(1.015, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=SMALL)
    axes.set_yticks(range(len(rows)), [_two_lines(row[0]) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(105.0, *(1.05 * _percent(record) for row in rows for record in row[1:] if record is not None)))
    axes.axvline(100, color="#333333", linewidth=1)
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("% of the rate of the device's own matrix product, copy or sum", fontsize=10.5)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    _legend(made, axes, [(ARITHMETIC, "arithmetic"), (MOVING, "moving bytes")], "best of the others")
    if left_out:
        made.text(
            0.2 / width, 0.12 / height, f"{left_out} more groups: see the tables", fontsize=SMALL, color="#444444"
        )
    return made


def _two_lines(title: str) -> str:
    """What it is, and its sizes below; what follows a semicolon is a remark."""
    what, _, sizes = title.partition(";")[0].partition(", ")
    sizes = sizes.partition(": ")[2] or sizes
    return "\n".join(textwrap.shorten(line, 62, placeholder=" ...") for line in (what, sizes) if line)


def _legend(made: Any, axes: Any, colours: Sequence[tuple[str, str]], mark: str = "") -> None:
    """Below the axes."""
    handles = [axes.barh([0], [0], color=colour, label=label) for colour, label in colours]
    if mark:
        handles += axes.plot([], [], marker="D", color=PEER, linestyle="", markeredgecolor="white", label=mark)
    made.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=SMALL, frameon=False)


def _percent(record: Record) -> float:
    return 100 * (record.of_ceiling or 0.0)


def _best(group: Records, role: str) -> Record | None:
    shares = [record for record in group if record.role == role and record.of_ceiling is not None]
    return max(shares, key=_percent, default=None)


def draw_block(records: Records) -> Any | None:
    """A panel a group (a repeat rate), a bar a contender, a colour a part."""
    panels = []
    for title, group in grouped(records).items():
        whole = [r for r in group if r.median is not None and r.role in ("published", "native", "ours")]
        if title.split(",")[0] == BLOCK and whole:
            parts = [r for r in group if r.role == "part" and r.median is not None]
            panels.append((title.partition(",")[2].strip() or title, whole, parts))
    if not panels:
        return None
    bars = sum(len(whole) for _, whole, _ in panels)
    names, width, height = 2.95, 11.5, 1.75 + 0.36 * bars + 0.55 * len(panels)
    made = figure(width, height)
    longest = max(record.median or 0.0 for _, whole, _ in panels for record in whole)
    top, axes, used = height - 1.15, None, dict[str, str]()
    for number, (title, whole, parts) in enumerate(panels):
        tall = 0.36 * len(whole)
        axes = made.add_axes((names / width, (top - tall) / height, (width - names - 0.3) / width, tall / height))
        for y, record in enumerate(whole):
            used |= _bar(axes, y, record, [part for part in parts if part.extra.get("of") == record.contender])
            native = next((r for r in whole if r.role == "native"), None)
            over = time_over(record, native) if native is not None else None
            beside = "" if over is None or record is native else f" ({over:.2f} x native)"
            axes.text(record.median, y, f" {quantity(record.median, 's')}{beside}", va="center", fontsize=SMALL)
        axes.set_yticks(range(len(whole)), [record.contender for record in whole])
        axes.set_ylim(len(whole) - 0.45, -0.55)
        axes.set_xlim(0, 1.25 * longest)
        axes.xaxis.set_major_formatter(lambda value, _: quantity(value, "s") if value > 0 else "0")
        axes.tick_params(labelsize=SMALL, labelbottom=number == len(panels) - 1)
        axes.set_title(textwrap.shorten(title, 110, placeholder=" ..."), fontsize=SMALL, loc="left", pad=4)
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
        top -= tall + 0.55
    _legend(made, axes, [(colour, name) for name, colour in {**PARTS, "not split": UNSPLIT}.items() if name in used])
    return made


def _bar(axes: Any, y: int, record: Record, parts: Records) -> dict[str, str]:
    """Draws the parts one behind the other, and what they leave; returns the colours used.

    Parts are of blocks with a clock in them, which take longer: they are drawn as shares of such a block.
    """
    total, begin, used = record.median or 0.0, 0.0, {}
    seconds = {
        part.extra.get("part", ""): (part.median or 0.0) * total / (part.extra.get("profiled_block") or total)
        for part in parts
    }
    known = sum(value for name, value in seconds.items() if name in PARTS)
    for name, colour in {**PARTS, "not split": UNSPLIT}.items():
        value = max(0.0, total - known) if name == "not split" else seconds.get(name, 0.0)
        if value > 0.002 * total:
            axes.barh(y, value, left=begin, height=0.72, color=colour)
            begin, used[name] = begin + value, colour
    return used
