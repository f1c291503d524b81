"""How well chosen frames agree with those that full-history attention weighs most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .choice import Block, Chosen

Masses = NDArray[np.float64]


class Overlap(NamedTuple):
    """Means over blocks, 0..1.

    Attributes:
        frames: share of the chosen frames that are among as many eligible frames of the largest mass.
        mass: attention mass of the chosen frames, relative to the mass of those.
    """

    frames: float
    mass: float


def best(masses: Masses, block: Block, count: int) -> Chosen:
    """The ``count`` eligible frames of the largest mass, largest first, the older of equals first."""
    order = np.argsort(-masses[block.eligible.start : block.eligible.stop], kind="stable")
    return tuple(int(row) + block.eligible.start for row in order[:count])


def overlap(found: Sequence[tuple[Block, Masses, Chosen]]) -> Overlap | None:
    """Of blocks, the masses of their frames and what was chosen (at least one frame each); None without blocks."""
    rows = []
    for block, masses, chosen in found:
        wanted = best(masses, block, len(chosen))
        mass = float(masses[list(chosen)].sum() / masses[list(wanted)].sum())
        rows.append((len({*chosen} & {*wanted}) / len(chosen), mass))
    return _mean(rows)


def random_overlap(found: Sequence[tuple[Block, Masses]], count: int) -> Overlap | None:
    """The expectation of `overlap` when ``count`` eligible frames, or all there are, are drawn without replacement."""
    rows = []
    for block, masses in found:
        eligible = masses[block.eligible.start : block.eligible.stop]
        drawn = min(count, len(eligible))
        wanted = best(masses, block, drawn)
        rows.append((drawn / len(eligible), float(drawn * eligible.mean() / masses[list(wanted)].sum())))
    return _mean(rows)


def _mean(rows: list[tuple[float, float]]) -> Overlap | None:
    return Overlap(*np.mean(rows, axis=0).tolist()) if rows else None
