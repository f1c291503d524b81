"""Arithmetic on what was recorded: shares, expectations, coverage. Plain functions of lists and arrays."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "WindowRule", "coverage", "eligible_frames", "return_shares", "scene_shares", "summarise"]


def eligible_frames(start: int, window: int, sink: int, recent_exclude: int) -> range:
    """Frames that a block starting at frame ``start`` may retrieve: ``S .. S + max(0, t - W) - R - 1``."""
    return range(sink, sink + max(0, max(0, start - window) - recent_exclude))


@dataclass(frozen=True)
class Choice:
    """What one block could retrieve and what it did."""

    start: int
    eligible: range
    retrieved: tuple[int, ...]


def return_shares(choices: Iterable[Choice], earlier: range) -> dict[str, float | int | None]:
    """Share of retrieved frames that lie in ``earlier``, and the same for two rules without similarity.

    Every retrieved frame counts once, so a block that retrieves 6 weighs twice one that retrieves 3. ``random`` is the
    exact expectation of drawing as many frames from those eligible, without replacement; ``newest`` takes the newest
    eligible ones. All are None where no block retrieves anything.
    """
    slots, hits, chance, newest = 0, 0, 0.0, 0
    for choice in choices:
        k = len(choice.retrieved)
        if k == 0:
            continue
        slots += k
        hits += sum(frame in earlier for frame in choice.retrieved)
        chance += k * sum(frame in earlier for frame in choice.eligible) / len(choice.eligible)
        newest += sum(frame in earlier for frame in choice.eligible[-k:])
    if slots == 0:
        return {"retrieved_frames": 0, "similarity": None, "random": None, "newest_eligible": None}
    return {
        "retrieved_frames": slots,
        "similarity": hits / slots,
        "random": chance / slots,
        "newest_eligible": newest / slots,
    }


def scene_shares(choices: Sequence[Choice], scenes: Mapping[str, range]) -> dict[str, dict[str, float | int]]:
    """For the blocks that start in each scene: frames retrieved, and the share that came from each scene."""
    table: dict[str, dict[str, float | int]] = {}
    for name, frames in scenes.items():
        taken = [frame for choice in choices if choice.start in frames for frame in choice.retrieved]
        row: dict[str, float | int] = {"retrieved_frames": len(taken)}
        for source, range_ in scenes.items():
            if taken:
                row[source] = sum(frame in range_ for frame in taken) / len(taken)
        table[name] = row
    return table


@dataclass(frozen=True)
class WindowRule:
    """Sizes that decide which frames a window of ``window`` frames holds."""

    window: int
    sink: int
    top_k: int


def coverage(mass: NDArray[np.float64], choice: Choice, rule: WindowRule) -> dict[str, float]:
    """Share of full-history attention mass that windows of equal size hold.

    Args:
        mass: (frames so far,) the share of attention that each frame receives when *all* are attended to; sums to 1.
        choice: the block's eligible and retrieved frames.
        rule: window sizes.

    Returns:
        ``fixed``: sink and local part alone (a smaller window). Then windows of the same number of frames:
        ``retrieved``: [sink | retrieved | local]; ``sliding``: [sink | newest], no retrieval; ``random``: [sink | as
        many eligible frames drawn at random | local], exact expectation; ``newest_eligible``: [sink | newest eligible
        | local]; ``best``: [sink | the eligible frames of largest mass | local], what no choice can beat.
    """
    frames, k = len(mass), len(choice.retrieved)
    local = rule.window - rule.sink - rule.top_k
    fixed = {*range(min(rule.sink, frames)), *range(max(rule.sink, frames - local), frames)}
    base = float(mass[sorted(fixed)].sum())
    newest = {*range(min(rule.sink, frames)), *range(max(rule.sink, frames - local - k), frames)}
    eligible = mass[choice.eligible.start : choice.eligible.stop]
    return {
        "fixed": base,
        "retrieved": base + float(mass[list(choice.retrieved)].sum()),
        "sliding": float(mass[sorted(newest)].sum()),
        "random": base + (k * float(eligible.mean()) if k else 0.0),
        "newest_eligible": base + (float(eligible[-k:].sum()) if k else 0.0),
        "best": base + (float(np.sort(eligible)[-k:].sum()) if k else 0.0),
    }


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every key over rows that all have the same keys; empty for no rows."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} if rows else {}


def middle(values: Sequence[float]) -> float | None:
    """Median, or None of nothing."""
    return float(median(values)) if values else None
