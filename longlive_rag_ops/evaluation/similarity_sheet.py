"""The similarity matrices of an edit, one for each embedder, with its scenes marked."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from .drawing import Sheet
from .evaluate import Evaluation, edit_similarity
from .returning_scene import Edit

OUTER, INNER = "#1f6fb4", "#d9730d"
SIDE = 3.2  # inches of a matrix
BAR = 0.85  # inches for the colour bar


def draw_similarity_sheet(found: Evaluation, edit: Edit, path: Path) -> None:
    """Writes the picture of one edit."""
    matrices = [edit_similarity(found, embedder.name, edit) for embedder in found.plan.embedders]
    low = min(0.0, *(float(matrix.min()) for matrix in matrices))
    about = (
        f"Cosine of every pair of frames. A1 and A2 are two stretches of {edit.outer} that share no frame, B is "
        f"{edit.inner}. Frames of A2 should resemble those of A1 (corners at the upper right and lower left) more "
        "than those of B. One scale for all embedders."
    )
    title, around = f"A scene returns: {edit.outer} + {edit.inner}", (1.0, 0.55, 0.1, 0.75)
    sheet = Sheet(title, about, len(matrices), 4, (SIDE, SIDE), around, below=BAR)
    for axes, embedder, matrix in zip(sheet.panels, found.plan.embedders, matrices, strict=True):
        image = axes.imshow(matrix, interpolation="nearest", vmin=low, vmax=1.0)
        axes.set_title(embedder.name, fontsize=11, fontweight="bold", pad=24)
        axes.set_xlabel("latent frame", fontsize=10)
        axes.set_ylabel("latent frame", fontsize=10, labelpad=28)
        axes.tick_params(labelsize=9)
        _mark(axes, edit)
    bar = sheet.drawn.add_axes((0.25, 0.6 / sheet.height, 0.5, 0.16 / sheet.height))
    colour_bar = sheet.drawn.colorbar(image, cax=bar, orientation="horizontal")
    colour_bar.set_label("cosine similarity", fontsize=10)
    colour_bar.ax.tick_params(labelsize=9)
    sheet.write(path)


def _mark(axes: Any, edit: Edit) -> None:
    """Cuts as lines; names of scenes above the columns and beside the rows."""
    style = {"color": "white", "fontsize": 9.5, "fontweight": "bold", "ha": "center", "va": "center"}
    scenes = pairwise((0, edit.first, edit.returned, edit.frames))
    for name, shade, (start, stop) in zip(("A1", "B", "A2"), (OUTER, INNER, OUTER), scenes, strict=True):
        if start:
            axes.axvline(start - 0.5, color="white", linewidth=1.2)
            axes.axhline(start - 0.5, color="white", linewidth=1.2)
        box = {"facecolor": shade, "edgecolor": "none", "boxstyle": "round,pad=0.22"}
        middle = (start + stop - 1) / 2
        axes.text(middle, 1.055, name, transform=axes.get_xaxis_transform(), bbox=box, **style)
        axes.text(-0.165, middle, name, transform=axes.get_yaxis_transform(), bbox=box, **style)
