"""Pictures of redundancy: cosines of neighbours, and of all pairs. A panel for each clip, a line for each embedder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .drawing import Keys, Sheet, colour
from .evaluate import Evaluation
from .similarity import OFFSETS, pairs


def draw_neighbours(found: Evaluation, path: Path) -> None:
    """Mean cosine against the distance of two frames."""
    sheet = _panels(
        found,
        "How alike neighbouring frames are",
        "Mean cosine of the embeddings of two frames of a clip, against how far apart they are. Near 1 at every "
        "distance: the embedder hardly tells the frames of a shot apart.",
    )
    keys: Keys = []
    for panel, (axes, clip) in enumerate(zip(sheet.panels, found.plan.clips, strict=True)):
        for number, (name, by_clip) in enumerate(found.neighbours.items()):
            values = [np.nan if value is None else value for value in by_clip[clip.name]]
            (line,) = axes.plot(OFFSETS, values, marker="o", markersize=3.5, linewidth=1.7, color=colour(number))
            keys += [(line, name)] if panel == 0 else []
        axes.set_xticks(OFFSETS)
        axes.set_xlim(0.5, OFFSETS[-1] + 0.5)
        axes.set_xlabel("distance, latent frames", fontsize=10)
    measured = [value for by in found.neighbours.values() for row in by.values() for value in row if value is not None]
    for axes in sheet.panels:
        axes.set_ylim(*_scale(measured))
    _label_left(sheet.panels, "mean cosine")
    sheet.legend(keys)
    sheet.write(path)


def draw_spread(found: Evaluation, path: Path) -> None:
    """Cumulative distribution of the cosines of all pairs."""
    sheet = _panels(
        found,
        "How widely cosines are spread",
        "Share of all pairs of a clip's frames whose cosine is at most so large. A steep line at the right: all frames "
        "look alike to the embedder. A slanting one: there is something to choose by.",
    )
    keys: Keys = []
    lowest = [values.min() for by in found.similarity.values() for m in by.values() if (values := pairs(m)).size]
    for panel, (axes, clip) in enumerate(zip(sheet.panels, found.plan.clips, strict=True)):
        for number, (name, by_clip) in enumerate(found.similarity.items()):
            values = np.sort(pairs(by_clip[clip.name]))
            shares = 100 * np.arange(1, len(values) + 1) / max(1, len(values))
            (line,) = axes.plot(values, shares, drawstyle="steps-post", linewidth=1.7, color=colour(number))
            keys += [(line, name)] if panel == 0 else []
        axes.set_xlim(*_scale(lowest))
        axes.set_ylim(0, 101)
        axes.xaxis.get_major_locator().set_params(nbins=5)
        axes.set_xlabel("cosine of a pair of frames", fontsize=10)
    _label_left(sheet.panels, "pairs with at most this cosine, %")
    sheet.legend(keys)
    sheet.write(path)


def _panels(found: Evaluation, title: str, about: str) -> Sheet:
    names = [embedder.name for embedder in found.plan.embedders]
    sheet = Sheet(title, about, len(found.plan.clips), 4, (2.9, 2.5), (0.75, 0.6, 0.15, 0.55), names)
    for axes, clip in zip(sheet.panels, found.plan.clips, strict=True):
        axes.set_title(f"{clip.name}\n{clip.frames} latent frames", fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=9)
    return sheet


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """From a little below the least of them to a little above 1: one scale for all clips, so that they compare."""
    low = float(min(values, default=0.0))
    room = max(0.05 * (1 - low), 1e-3)
    return low - room, 1 + room / 2


def _label_left(panels: Sequence[Any], words: str) -> None:
    left = min(axes.get_position().x0 for axes in panels)
    for axes in panels:
        if axes.get_position().x0 == left:
            axes.set_ylabel(words, fontsize=10)
