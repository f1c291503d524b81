"""What the evaluation's pictures share: embedders' colours, a sheet of panels under a heading, a legend below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..demo.palette import figure, save
from ..safetensors_file import replacing

COLOURS = (
    *("#1f6fb4", "#d9730d", "#2e8b57", "#8e44ad", "#b03a2e", "#7f6a00"),  # as in the demo's pictures
    *("#17a2b8", "#e377c2", "#6b8e23", "#3b3b98"),
)
MARGIN = 0.2  # inches around everything
# Inches that a character takes at most, on average: of the title, the explanation, labels.
TITLE, TEXT, LABEL = 0.145, 0.0735, 0.085
Keys = list[tuple[Any, str]]  # what a legend explains, and its words


def colour(number: int) -> str:
    """Of the embedder of this number, in every picture."""
    return COLOURS[number % len(COLOURS)]


class Sheet:
    """Panels in rows, each of one size, and room for text.

    Args:
        title: heads the picture.
        about: explains it, in sentences.
        panels: how many.
        columns: of panels, at most.
        size: width and height of a panel in inches, without what is around it.
        around: inches to the left of, below, to the right of and above a panel.
        words: of the legend, which room is left for.
        below: inches below the panels, the legend apart.

    Attributes:
        drawn: the figure.
        panels: its axes.
        height: of the figure in inches.
    """

    def __init__(
        self,
        title: str,
        about: str,
        panels: int,
        columns: int,
        size: tuple[float, float],
        around: tuple[float, float, float, float],
        words: Sequence[str] = (),
        below: float = 0.0,
    ) -> None:
        left, under, right, above = around
        columns = min(columns, panels)
        rows = -(-panels // columns)
        width = max(8.0, 0.6 + TITLE * len(title), 2 * MARGIN + columns * (left + size[0] + right))
        lines = textwrap.wrap(about, int((width - 0.6) / TEXT))
        self._legend_columns = max(1, int(width / (0.7 + LABEL * max(map(len, words), default=1))))
        legend = 0.25 + 0.22 * -(-len(words) // self._legend_columns) if words else 0.0
        head = 0.62 + 0.2 * len(lines)
        self.height = height = head + rows * (above + size[1] + under) + legend + below
        self.drawn = figure(width, height)
        self.drawn.text(0.3 / width, 1 - 0.18 / height, title, va="top", fontsize=15, fontweight="bold")
        text = "\n".join(lines)
        self.drawn.text(0.3 / width, 1 - 0.53 / height, text, va="top", fontsize=10, linespacing=1.35)
        self.panels = []
        for number in range(panels):
            row, column = divmod(number, columns)
            x = MARGIN + column * (left + size[0] + right) + left
            y = height - head - row * (above + size[1] + under) - above - size[1]
            self.panels.append(self.drawn.add_axes((x / width, y / height, size[0] / width, size[1] / height)))

    def legend(self, keys: Keys) -> None:
        """Explains lines and colours at the bottom."""
        self.drawn.legend(
            [key for key, _ in keys],
            [words for _, words in keys],
            loc="lower center",
            ncols=min(len(keys), self._legend_columns),
            fontsize=9.5,
            frameon=False,
        )

    def write(self, path: Path) -> None:
        """Writes a PNG, whole or not at all."""
        with replacing(path) as file:
            save(self.drawn, file)
