"""The coverage chart: how much of full-history attention each kind of window holds, block by block."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from .measures import WindowRule, coverage
from .palette import figure, save, scene_colour
from .settings import FRAMES_PER_BLOCK
from .stream import Streamed

__all__ = ["draw_coverage_chart"]

_LINES = (
    ("best", "best possible choice of old frames", "#2e8b57", (0, (4, 1, 1, 1))),
    ("retrieved", "sink + retrieved + local (this package)", "#e8112d", "-"),
    ("sliding", "sink + newest (plain sliding window)", "#1f3b73", "--"),
    ("random", "sink + random old frames + local (expected)", "#7a5195", "-."),
    ("fixed", "sink + local alone (smaller window)", "#555555", (0, (1, 3))),
)
_TEXT = (
    "If a block could attend to every frame so far, how much of its attention would fall on the frames that a window "
    "really holds? All windows but the smallest hold the same number of frames. Left: toy weights whose attention "
    "looks for similar content. Right: purely random weights, for which no choice of frames matters. Coloured "
    "bands: scenes. Old frames are weighed at the position where a retrieved frame sits."
)


def draw_coverage_chart(runs: Sequence[Streamed], rule: WindowRule, path: Path) -> None:
    """Writes one panel per run, all of one footage, as PNG."""
    footage = runs[0].footage
    width, height = 13.0, 5.6
    drawn = figure(width, height)
    drawn.text(0.3 / width, 1 - 0.18 / height, f"Attention mass that the window holds \u2013 {footage.title}", va="top",
               fontsize=15, fontweight="bold")  # fmt: skip
    pair = footage.returning()
    text = _TEXT + (f" Compare red and blue just after {pair[1].name} begins." if pair else "")
    drawn.text(0.3 / width, 1 - 0.53 / height, "\n".join(textwrap.wrap(text, 158)), va="top", fontsize=10,
               linespacing=1.35)  # fmt: skip
    panel = (width - 0.75) / len(runs)
    for i, run in enumerate(runs):
        axes = drawn.add_axes(((0.85 + i * panel) / width, 1.15 / height, (panel - 0.5) / width, 2.95 / height))
        blocks = [record.choice.start // FRAMES_PER_BLOCK for record in run.records]
        rows = [coverage(record.masses.placed, record.choice, rule) for record in run.records]
        for key, label, colour, style in _LINES:
            values = [100 * row[key] for row in rows]
            axes.plot(blocks, values, color=colour, linestyle=style, linewidth=1.9, label=label)
        for scene in footage.scenes:
            band = (scene.start / FRAMES_PER_BLOCK - 0.5, scene.stop / FRAMES_PER_BLOCK - 0.5)
            axes.axvspan(*band, color=scene_colour(footage, scene), alpha=0.1, linewidth=0)
            axes.text(sum(band) / 2, 103, scene.name, ha="center", va="bottom", fontsize=10.5, fontweight="bold",
                      color=scene_colour(footage, scene))  # fmt: skip
        axes.set_xlim(-0.5, len(blocks) - 0.5)
        axes.set_ylim(0, 102)
        axes.set_xlabel(f"block ({run.weights} weights)", fontsize=11)
        if i == 0:
            axes.set_ylabel("share of full-history attention, %", fontsize=11)
            drawn.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=9.5, frameon=False)
        axes.grid(alpha=0.3)
    save(drawn, path)
