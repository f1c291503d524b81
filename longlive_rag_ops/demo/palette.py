"""What the pictures share: colours, a drawing surface, a number in their captions."""

from typing import Any

from ..extras import need
from .footage import Footage, Scene
from .stream import Streamed

__all__ = ["figure", "newest_not_searched", "save", "scene_colour"]

_SHOTS = ("#1f6fb4", "#d9730d", "#2e8b57", "#8e44ad", "#b03a2e", "#7f6a00")
UNKNOWN = "#555555"
DPI = 110


def scene_colour(footage: Footage, scene: Scene | None) -> str:
    """One colour a shot: a returning scene has the colour of the first time it was seen."""
    if scene is None:
        return UNKNOWN
    shots = list(dict.fromkeys(s.shot for s in footage.scenes))
    return _SHOTS[shots.index(scene.shot) % len(_SHOTS)]


def newest_not_searched(run: Streamed) -> int:
    """How many of the newest finished frames a block does not search: ``W - S + R``."""
    choice = run.records[-1].choice
    return choice.start - choice.eligible.stop


def figure(width: float, height: float) -> Any:
    """An empty white figure, inches; no display is needed."""
    module = need("matplotlib.figure", "drawing the pictures")
    return module.Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def save(drawn: Any, path: Any) -> None:
    """Writes a PNG."""
    need("matplotlib.backends.backend_agg", "drawing the pictures").FigureCanvasAgg(drawn)
    drawn.savefig(path, format="png", dpi=DPI)
