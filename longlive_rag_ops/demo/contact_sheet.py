"""The contact sheet: for some blocks, the frame that searched beside the frames it found."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .footage import Footage
from .palette import figure, newest_not_searched, save, scene_colour
from .settings import FRAMES_PER_BLOCK
from .stream import BlockRecord, Streamed

__all__ = ["draw_contact_sheet", "pick_blocks"]

ROWS = 8


def _spread(items: Sequence[BlockRecord], count: int) -> list[BlockRecord]:
    """At most ``count`` of ``items``, first and last among them, evenly spaced."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def pick_blocks(footage: Footage, records: Sequence[BlockRecord]) -> list[BlockRecord]:
    """Up to eight blocks that retrieved something; the first two of the last scene are always among them."""
    found = [record for record in records if record.choice.retrieved]
    if len(footage.scenes) < 2:
        return _spread(found, ROWS)
    last = footage.scenes[-1]
    closing = [record for record in found if record.choice.start in last]
    picked = closing[:2] + _spread(closing[2:], 2)
    for scene, count in zip(reversed(footage.scenes[:-1]), (3, 1), strict=False):
        picked += _spread([record for record in found if record.choice.start in scene], count)
    return sorted(picked, key=lambda record: record.choice.start)


def _tile(drawn: Any, box: tuple[float, float, float, float], footage: Footage, frame: int, below: str) -> None:
    """A thumbnail with its scene's colour as frame, the scene's name in the corner, and a line below."""
    scene = footage.scene_of(frame)
    colour = scene_colour(footage, scene)
    axes = drawn.add_axes(box)
    axes.imshow(footage.thumbnails[frame], interpolation="lanczos", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=3)
    if scene:
        axes.text(
            0.03, 0.95, scene.name, transform=axes.transAxes, va="top", ha="left", fontsize=10, fontweight="bold",
            color="white", bbox={"facecolor": colour, "edgecolor": "none", "pad": 2.5},
        )  # fmt: skip
    axes.set_xlabel(below, fontsize=8.5, labelpad=3)


def _explanation(run: Streamed) -> str:
    footage = run.footage
    text = (
        "A video is streamed in blocks of three latent frames through attention that sees only a short window of them. "
        "Each row is one block about to be computed. Its query is the last finished frame (left); the old frames whose "
        "embeddings are most similar to the query's (cosine; 1 is identical) are put back into the window (right, most "
        f"similar first). The newest {newest_not_searched(run)} frames are not searched. "
    )
    pair = footage.returning()
    if pair:
        earlier, later = pair
        text += (
            f"{earlier.name} and {later.name} are two different stretches of one shot, with another scene between: in "
            f"{later.name}, frames of {earlier.name} are what should be found. The first row of {later.name} still "
            "searches with the last frame before the cut, so it finds the scene before it."
        )
    elif footage.scenes:
        last = footage.scenes[-1]
        text += (
            f"No scene returns here. Until the first frames of {last.name} itself are old enough, nothing searched "
            f"shows {last.name}, and retrieval takes the nearest there is: the cosines are low, but frames are put "
            "back all the same."
        )
    else:
        text += "The scenes of this video are not known, so nothing is said about which frames would be right."
    return text


def draw_contact_sheet(run: Streamed, path: Path) -> None:
    """Writes the contact sheet of a run as PNG; RuntimeError where nothing was retrieved or matplotlib is missing."""
    footage = run.footage
    picked = pick_blocks(footage, run.records)
    if not picked:
        raise RuntimeError("footage: no block retrieved anything, there is nothing to draw")
    columns = max(len(record.choice.retrieved) for record in picked)
    aspect = footage.thumbnails.shape[1] / footage.thumbnails.shape[2]
    tile, gap, label, query_gap, margin = 1.72, 0.14, 1.5, 0.5, 0.3
    row_height = tile * aspect + 0.5
    width = 2 * margin + label + tile + query_gap + columns * (tile + gap)
    lines = textwrap.wrap(_explanation(run), int(width * 13.2))
    head = 1.12 + 0.2 * len(lines)
    height = head + len(picked) * row_height + 0.28
    drawn = figure(width, height)

    def text(x: float, y: float, content: str, **style: Any) -> None:
        drawn.text(x / width, 1 - y / height, content, va="top", **style)

    text(margin, 0.2, f"What the memory window retrieved \u2013 {footage.title}", fontsize=16, fontweight="bold")
    text(margin, 0.56, "\n".join(lines), fontsize=10, linespacing=1.35)
    first = margin + label + tile + query_gap
    text(margin, head - 0.28, "block", fontsize=10.5, fontweight="bold")
    text(margin + label, head - 0.28, "query", fontsize=10.5, fontweight="bold")
    text(first, head - 0.28, "retrieved, most similar first", fontsize=10.5, fontweight="bold")
    for row, record in enumerate(picked):
        top = head + row * row_height
        bottom = 1 - (top + tile * aspect) / height
        start, query = record.choice.start, record.choice.start - 1
        scene = footage.scene_of(start)
        middle = top + tile * aspect / 2
        about = f"frames {start}-{start + FRAMES_PER_BLOCK - 1}" + (f"\nof scene {scene.name}" if scene else "")
        if scene and query not in scene:
            about += "\n(just after a cut)"
        text(margin, middle - 0.36, f"Block {start // FRAMES_PER_BLOCK}", fontsize=10.5, fontweight="bold",
             color=scene_colour(footage, scene))  # fmt: skip
        text(margin, middle - 0.13, about, fontsize=9)
        size = (tile / width, tile * aspect / height)
        _tile(drawn, ((margin + label) / width, bottom, *size), footage, query, f"frame {query}")
        text(first - query_gap / 2 - 0.02, middle - 0.14, "\u2192", fontsize=16, ha="center", color="#777777")
        for place, (frame, cosine) in enumerate(zip(record.choice.retrieved, record.cosines, strict=True)):
            left = (first + place * (tile + gap)) / width
            _tile(drawn, (left, bottom, *size), footage, frame, f"frame {frame}   cosine {cosine:.3f}")
    text(margin, height - 0.27, _footer(footage), fontsize=8.5, color="#444444")
    save(drawn, path)


def _footer(footage: Footage) -> str:
    if not footage.scenes:
        return "Frames are latent frames (four video frames each), shown by the second of the four."
    names = "; ".join(
        f"{s.name}: {footage.sources[s.start][0]}, video frames {footage.sources[s.start][1] - 1}"
        f"-{footage.sources[s.stop - 1][1] + 2}"
        for s in footage.scenes
    )
    return f"Frames are latent frames (four video frames each), shown by the second of the four. {names}."
