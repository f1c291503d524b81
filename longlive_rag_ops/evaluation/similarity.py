"""How alike the embeddings of a clip's frames are, near ones and all."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..reference import unit_rows

OFFSETS = tuple(range(1, 9))


class Spread(NamedTuple):
    """Of the cosines of all pairs of two frames: standard deviation, and 5, 50 and 95 % percentiles."""

    deviation: float
    low: float
    median: float
    high: float


def cosines(embeddings: torch.Tensor) -> NDArray[np.float64]:
    """Cosine of every pair of rows ``(frames, E)``: ``(frames, frames)``; a zero row has cosine 0 with all."""
    unit = unit_rows(embeddings.double())
    return (unit @ unit.T).numpy()


def neighbour_similarity(similarity: NDArray[np.float64]) -> list[float | None]:
    """Mean cosine of frames 1 to 8 apart; None where the clip is too short for an offset.

    This redundancy is what the Window Temporal Delta Loss is to suppress (LongLive-RAG, arXiv 2606.02553).
    """
    frames = len(similarity)
    return [float(np.diagonal(similarity, offset).mean()) if offset < frames else None for offset in OFFSETS]


def pairs(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines of all pairs of two different frames, each once: ``(frames * (frames - 1) / 2,)``."""
    return similarity[np.triu_indices(len(similarity), 1)]


def spread(similarity: NDArray[np.float64]) -> Spread | None:
    """How wide the cosines of all pairs are spread; None where there is no pair."""
    values = pairs(similarity)
    if not values.size:
        return None
    low, median, high = np.percentile(values, (5, 50, 95))
    return Spread(float(values.std()), float(low), float(median), float(high))
