"""Pictures of choices: overlap with full-history attention, and recall. Groups of bars, the rules as lines across."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import need
from .drawing import LABEL, Keys, Sheet, colour
from .evaluate import Evaluation
from .named_embedder import RULES

MOST = 20  # clips, or edits, that have bars of their own; beyond, their mean alone has
RULE_STYLES = {"random": (0, (4, 2)), "newest": (0, (1, 1.2))}
RULE_WORDS = {"random": "random eligible (expected)", "newest": "newest eligible"}
RULE_COLOUR = "#333333"
Values = list[float | None]
Group = tuple[str, tuple[str, ...]]  # label, and the clips or edits that it is the mean of


def draw_overlap(found: Evaluation, path: Path) -> None:
    """Overlap on clips and edits: same frames, and attention mass."""
    plan = found.plan
    groups = _groups([clip.name for clip in plan.clips], "mean\nof clips")
    groups += _groups([edit.name for edit in plan.edits], "mean\nof edits")
    k = plan.config.top_k
    about = (
        f"Each block chooses {k} old frames. If it could attend to all of them, some {k} would get the most attention. "
        "Above: how many of the chosen ones are among those. Below: the attention that the chosen ones get, relative "
        "to what the best choice gets. The attention is a toy's: the first layer of the demo's untrained transformer, "
        "in which tokens attend to tokens like them."
    )
    parts = (
        ("frames", "same frames, %", f"chosen frames that are among the {k} weighed most"),
        ("mass", "attention mass, %", "attention mass of the chosen frames, relative to the best choice"),
    )
    sheet = _sheet(found, "Do the chosen frames get the attention?", about, groups, len(parts))
    for axes, (part, unit, title) in zip(sheet.panels, parts, strict=True):
        bars: dict[str, Values] = {}
        for row, by_name in found.overlap.items():
            values = {name: None if each is None else float(getattr(each, part)) for name, each in by_name.items()}
            bars[row] = [_mean([values[name] for name in names]) for _, names in groups]
        _draw(axes, bars, groups, unit, title)
    sheet.legend(_keys(found))
    sheet.write(path)


def draw_recall(found: Evaluation, path: Path) -> None:
    """Recall on edits, a panel for each number of frames."""
    groups = _groups([edit.name for edit in found.plan.edits], "mean")
    counts = found.plan.recall_at
    about = (
        "A + B: the beginning of clip A, then B, then the end of A, whose blocks should find the beginning. Recall at "
        "k: the share of the k most similar frames that come from there. The first block after the cut still searches "
        "with a frame of B and is left out; so are blocks that can find frames of the second stretch itself."
    )
    sheet = _sheet(found, "Is a scene that returns found?", about, groups, len(counts))
    for axes, k in zip(sheet.panels, counts, strict=True):
        bars = {
            row: [_mean([by_edit[name][k] for name in names]) for _, names in groups]
            for row, by_edit in found.recall.items()
        }
        _draw(axes, bars, groups, "recall, %", f"recall at {k}")
    sheet.legend(_keys(found))
    sheet.write(path)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _groups(names: Sequence[str], mean: str) -> list[Group]:
    groups: list[Group] = [(name.replace("+", "\n+ "), (name,)) for name in names] if len(names) <= MOST else []
    return groups + ([(mean, tuple(names))] if len(names) > 1 else [])


def _sheet(found: Evaluation, title: str, about: str, groups: Sequence[Group], panels: int) -> Sheet:
    longest = max(len(line) for label, _ in groups for line in label.splitlines())
    wide = max(7.4, len(groups) * max(1.1, 0.15 + LABEL * longest))
    words = [*(embedder.name for embedder in found.plan.embedders), *RULE_WORDS.values()]
    return Sheet(title, about, panels, 1, (wide, 1.8), (0.75, 0.6, 0.2, 0.4), words)


def _draw(axes: Any, bars: dict[str, Values], groups: Sequence[Group], unit: str, title: str) -> None:
    embedders = [row for row in bars if row not in RULES]
    places, width = np.arange(len(groups)), 0.8 / len(embedders)
    for number, row in enumerate(embedders):
        heights = [np.nan if value is None else 100 * value for value in bars[row]]
        axes.bar(places - 0.4 + (number + 0.5) * width, heights, 0.92 * width, color=colour(number), zorder=2)
    for rule, style in RULE_STYLES.items():
        for place, value in zip(places, bars[rule], strict=True):
            if value is not None:
                span = (place - 0.46, place + 0.46)
                axes.plot(span, [100 * value] * 2, color=RULE_COLOUR, linestyle=style, linewidth=1.8, zorder=3)
    axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left")
    axes.set_xticks(places, [label for label, _ in groups], fontsize=9)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(-3, 104)  # a line at 0 is to be seen
    axes.set_ylabel(unit, fontsize=10)
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(axis="y", alpha=0.3, zorder=0)


def _keys(found: Evaluation) -> Keys:
    patches, lines = (need(f"matplotlib.{name}", "drawing the pictures") for name in ("patches", "lines"))
    keys: Keys = [(patches.Patch(color=colour(i)), e.name) for i, e in enumerate(found.plan.embedders)]
    for rule, style in RULE_STYLES.items():
        line = lines.Line2D([], [], color=RULE_COLOUR, linestyle=style, linewidth=1.8)
        keys.append((line, RULE_WORDS[rule]))
    return keys
