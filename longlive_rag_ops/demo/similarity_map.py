"""The similarity map: every block's query against every frame of its history, what was chosen marked."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import need
from .embedding import cosine
from .footage import Footage
from .palette import figure, newest_not_searched, save, scene_colour
from .settings import FRAMES_PER_BLOCK
from .stream import Streamed

__all__ = ["draw_similarity_map"]

GUARDED = "#c9c9c9"


def _explanation(run: Streamed) -> str:
    footage = run.footage
    text = (
        "One row a block (time runs down), one column a latent frame of its history. Colour: cosine similarity between "
        "the embedding of the block's query (the last frame finished before it) and the frame's. Only coloured frames "
        "may be retrieved; grey ones are finished but not searched (sink frames at the left, and the newest "
        f"{newest_not_searched(run)}), white ones do not exist yet. Red dots: the frames retrieved, by similarity "
        "alone. "
    )
    pair = footage.returning()
    if pair:
        earlier, later = pair
        text += (
            f"{later.name} is another stretch of the shot of {earlier.name}: the bright rectangle at the lower left is "
            f"{earlier.name} being recognised, and the dots move there one block after the cut."
        )
    elif footage.scenes:
        text += (
            f"Nothing returns: the rows of {footage.scenes[-1].name} have no bright rectangle at the lower left, and "
            f"until frames of {footage.scenes[-1].name} itself are old enough the dots mark the nearest of the unlike."
        )
    return text


def draw_similarity_map(run: Streamed, path: Path) -> None:
    """Writes the map of a run as PNG."""
    footage, records = run.footage, run.records
    similarity = cosine(run.embeddings).numpy()
    blocks, frames = len(records), footage.frames
    shown = np.full((blocks, frames), np.nan)
    guarded = np.zeros((blocks, frames), bool)
    for row, record in enumerate(records):
        start, eligible = record.choice.start, record.choice.eligible
        guarded[row, :start] = True
        guarded[row, eligible.start : eligible.stop] = False
        if start:
            shown[row, eligible.start : eligible.stop] = similarity[start - 1, eligible.start : eligible.stop]

    width = 13.0
    lines = textwrap.wrap(_explanation(run), 158)
    body = min(9.0, max(3.2, 0.2 * blocks))
    head, foot = 0.95 + 0.2 * len(lines), 0.75
    height = head + body + foot
    drawn = figure(width, height)
    title = f"Similarity of each block's query with its history \u2013 {footage.title}"
    drawn.text(0.3 / width, 1 - 0.18 / height, title, va="top", fontsize=15, fontweight="bold")  # fmt: skip
    drawn.text(0.3 / width, 1 - 0.53 / height, "\n".join(lines), va="top", fontsize=10, linespacing=1.35)
    axes = drawn.add_axes((1.25 / width, foot / height, (width - 2.6) / width, body / height))
    bar = drawn.add_axes(((width - 1.1) / width, foot / height, 0.22 / width, body / height))

    extent = (-0.5, frames - 0.5, blocks - 0.5, -0.5)
    colours = need("matplotlib.colors", "drawing the pictures")
    axes.imshow(np.where(guarded, 1.0, np.nan), extent=extent, aspect="auto", interpolation="nearest",
                cmap=colours.ListedColormap([GUARDED]))  # fmt: skip
    low = min(0.0, float(np.nanmin(shown))) if np.isfinite(shown).any() else 0.0
    image = axes.imshow(shown, extent=extent, aspect="auto", interpolation="nearest", vmin=low, vmax=1.0)
    points = [(frame, row) for row, record in enumerate(records) for frame in record.choice.retrieved]
    dot = 0.5 * 72 * min((width - 2.6) / frames, body / blocks)
    axes.scatter([x for x, _ in points], [y for _, y in points], s=max(4.0, dot * dot), c="#e8112d",
                 edgecolors="white", linewidths=0.6, zorder=3)  # fmt: skip
    _boundaries(axes, footage, blocks)
    axes.set_xlabel("history: latent frame" + ("  (coloured names: scenes)" if footage.scenes else ""), fontsize=11)
    axes.set_ylabel("block" + ("  (its scene in colour)" if footage.scenes else ""), fontsize=11,
                    labelpad=34 if footage.scenes else 6)  # fmt: skip
    axes.set_xlim(-0.5, frames - 0.5)
    axes.set_ylim(blocks - 0.5, -0.5)
    axes.yaxis.get_major_locator().set_params(integer=True)
    colour_bar = drawn.colorbar(image, cax=bar)
    colour_bar.set_label("cosine similarity", fontsize=11)
    save(drawn, path)


def _boundaries(axes: Any, footage: Footage, blocks: int) -> None:
    """Scene cuts as lines, scene names above the columns and beside the rows."""
    for scene in footage.scenes:
        colour = scene_colour(footage, scene)
        first, last = scene.start / FRAMES_PER_BLOCK, scene.stop / FRAMES_PER_BLOCK
        if scene.start:
            axes.axvline(scene.start - 0.5, color="black", linewidth=1.2)
            axes.axhline(first - 0.5, color="black", linewidth=1.2)
        style = {"color": "white", "fontsize": 10.5, "fontweight": "bold", "ha": "center", "va": "center"}
        box = {"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0.25"}
        across, down = axes.get_xaxis_transform(), axes.get_yaxis_transform()
        axes.text((scene.start + scene.stop - 1) / 2, 1.035, scene.name, transform=across, bbox=box, **style)
        axes.text(-0.046, (first + last - 1) / 2, scene.name, transform=down, bbox=box, **style)
