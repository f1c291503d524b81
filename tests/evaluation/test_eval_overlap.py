"""Overlap of choices with masses: by hand, and the expectation of chance by enumeration."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import numpy as np
import pytest

from longlive_rag_ops.evaluation.choice import Block
from longlive_rag_ops.evaluation.overlap import best, overlap, random_overlap

BLOCK = Block(12, range(1, 7))
MASSES = np.array([0.3, 0.01, 0.05, 0.04, 0.05, 0.02, 0.03, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_best_frames_are_eligible_and_the_older_of_equals_comes_first() -> None:
    assert best(MASSES, BLOCK, 3) == (2, 4, 3)
    many = np.random.default_rng(0).integers(1, 4, 99).astype(float)
    oldest_first = sorted(range(1, 86), key=lambda frame: (-many[frame], frame))
    assert best(many, Block(96, range(1, 86)), 60) == tuple(oldest_first[:60])


def test_overlap_by_hand() -> None:
    one = overlap([(BLOCK, MASSES, (4, 1, 2))])
    assert one is not None and one == pytest.approx((2 / 3, 0.11 / 0.14))
    perfect = overlap([(BLOCK, MASSES, (3, 2, 4))])
    assert perfect == pytest.approx((1, 1))
    both = overlap([(BLOCK, MASSES, (4, 1, 2)), (BLOCK, MASSES, (3, 2, 4))])
    assert both == pytest.approx((5 / 6, (0.11 / 0.14 + 1) / 2))
    assert overlap([]) is None and random_overlap([], 3) is None


@pytest.mark.parametrize("count", [1, 3, 6, 9])
def test_chance_is_the_mean_over_all_draws(count: int) -> None:
    draws = list(combinations(BLOCK.eligible, min(count, 6)))
    found = [overlap([(BLOCK, MASSES, draw)]) for draw in draws]
    expected = [fmean(each[part] for each in found if each is not None) for part in range(2)]
    chance = random_overlap([(BLOCK, MASSES)], count)
    assert chance is not None and chance == pytest.approx(tuple(expected))
