"""Cosines of neighbours and of all pairs, against loops over plain numbers."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean, pstdev

import pytest
import torch

from longlive_rag_ops.evaluation.similarity import OFFSETS, cosines, neighbour_similarity, pairs, spread


def cosine(a: list[float], b: list[float]) -> float:
    length = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


@pytest.fixture
def embeddings() -> torch.Tensor:
    return torch.randn(11, 5, generator=torch.Generator().manual_seed(1)) + 0.7


def test_neighbours_against_a_loop(embeddings: torch.Tensor) -> None:
    rows = embeddings.tolist()
    expected = [fmean(cosine(rows[i], rows[i + offset]) for i in range(11 - offset)) for offset in OFFSETS]
    assert OFFSETS == (1, 2, 3, 4, 5, 6, 7, 8)
    assert neighbour_similarity(cosines(embeddings)) == pytest.approx(expected, abs=1e-12)


def test_spread_against_a_loop(embeddings: torch.Tensor) -> None:
    rows = embeddings.tolist()
    values = sorted(cosine(a, b) for a, b in combinations(rows, 2))
    assert sorted(pairs(cosines(embeddings))) == pytest.approx(values, abs=1e-12)

    def percentile(share: float) -> float:
        place = share * (len(values) - 1)
        low = int(place)
        return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])

    expected = (pstdev(values), percentile(0.05), percentile(0.5), percentile(0.95))
    found = spread(cosines(embeddings))
    assert found is not None and tuple(found) == pytest.approx(expected, abs=1e-12)


def test_length_means_nothing_and_zero_is_like_nothing(embeddings: torch.Tensor) -> None:
    scaled = embeddings * torch.logspace(-3, 3, 11)[:, None]
    assert cosines(scaled) == pytest.approx(cosines(embeddings), abs=1e-6)
    scaled[4] = 0
    assert (cosines(scaled)[4] == 0).all() and (cosines(scaled)[:, 4] == 0).all()


def test_short_clips_have_no_number() -> None:
    three = neighbour_similarity(cosines(torch.eye(3)))
    assert three == [0.0, 0.0] + [None] * 6
    assert spread(cosines(torch.ones(1, 2))) is None
    assert neighbour_similarity(cosines(torch.ones(1, 2))) == [None] * 8
    assert tuple(spread(cosines(torch.ones(2, 2))) or ()) == pytest.approx((0, 1, 1, 1))
