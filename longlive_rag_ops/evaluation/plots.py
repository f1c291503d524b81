"""All pictures of an evaluation."""

from __future__ import annotations

import re
from pathlib import Path

from .bars import draw_overlap, draw_recall
from .curves import draw_neighbours, draw_spread
from .evaluate import Evaluation
from .similarity_sheet import draw_similarity_sheet


def draw_plots(found: Evaluation, folder: Path) -> list[str]:
    """Draws all that there is something to draw of; returns the names of the files."""
    names = ["neighbours.png", "spread.png"]
    draw_neighbours(found, folder / names[0])
    draw_spread(found, folder / names[1])
    if any(value is not None for value in found.overlap["random"].values()):
        names.append("overlap.png")
        draw_overlap(found, folder / names[-1])
    if found.plan.edits:
        names.append("recall.png")
        draw_recall(found, folder / names[-1])
    for number, edit in enumerate(found.plan.edits, 1):
        names.append(re.sub(r"[^A-Za-z0-9._-]", "_", f"similarity_{number}_{edit.name}") + ".png")
        draw_similarity_sheet(found, edit, folder / names[-1])
    return names
