"""Shares and coverage against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from longlive_rag_ops.demo.measures import (
    Choice,
    WindowRule,
    coverage,
    eligible_frames,
    middle,
    return_shares,
    scene_shares,
    summarise,
)


@pytest.mark.parametrize(
    "start, expected",
    [(0, range(1, 1)), (15, range(1, 1)), (17, range(1, 1)), (18, range(1, 2)), (24, range(1, 8)), (60, range(1, 44))],
)
def test_eligible_frames_of_the_published_window(start: int, expected: range) -> None:
    assert eligible_frames(start, window=12, sink=1, recent_exclude=5) == expected


def test_return_shares_by_hand() -> None:
    choices = [
        Choice(0, range(1, 1), ()),  # nothing retrieved: counts nowhere
        Choice(9, range(1, 5), (1, 4)),  # one of two in 0..2; two of four eligible are; newest two, 3 and 4, are not
        Choice(12, range(1, 9), (1, 2, 3, 8)),  # two of four; two of eight eligible
    ]
    shares = return_shares(choices, range(3))
    assert shares["retrieved_frames"] == 6
    assert shares["similarity"] == pytest.approx(3 / 6)
    assert shares["random"] == pytest.approx((2 * 2 / 4 + 4 * 2 / 8) / 6)
    assert shares["newest_eligible"] == 0


def test_newest_eligible_can_be_right() -> None:
    assert return_shares([Choice(9, range(1, 5), (1, 2))], range(3, 5))["newest_eligible"] == 1


def test_nothing_retrieved_has_no_share() -> None:
    shares = return_shares([Choice(0, range(1, 1), ())], range(3))
    assert shares == {"retrieved_frames": 0, "similarity": None, "random": None, "newest_eligible": None}


def test_scene_shares_by_hand() -> None:
    scenes = {"A": range(6), "B": range(6, 12)}
    choices = [Choice(3, range(1, 1), ()), Choice(6, range(1, 4), (1, 2)), Choice(9, range(1, 8), (3, 7))]
    assert scene_shares(choices, scenes) == {
        "A": {"retrieved_frames": 0},
        "B": {"retrieved_frames": 4, "A": 0.75, "B": 0.25},
    }


def test_coverage_by_hand() -> None:
    mass = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) / 55
    # window 6 = 1 sink + 2 memory + 3 local; local is 7, 8, 9; a sliding window holds 0 and 5..9.
    row = coverage(mass, Choice(7, range(1, 5), (2, 4)), WindowRule(6, 1, 2))
    expected = {
        "fixed": 1 + 8 + 9 + 10,
        "retrieved": 28 + 3 + 5,
        "sliding": 1 + 6 + 7 + 8 + 9 + 10,
        "random": 28 + 2 * (2 + 3 + 4 + 5) / 4,
        "newest_eligible": 28 + 4 + 5,
        "best": 28 + 4 + 5,
    }
    assert row == pytest.approx({key: value / 55 for key, value in expected.items()})


def test_coverage_before_anything_is_retrieved() -> None:
    row = coverage(np.array([0.5, 0.2, 0.3]), Choice(0, range(1, 1), ()), WindowRule(12, 1, 6))
    assert set(row.values()) == {1.0}


def test_means_and_medians() -> None:
    assert summarise([{"a": 1.0}, {"a": 2.0}]) == {"a": 1.5} and summarise([]) == {}
    assert middle([3, 1, 2]) == 2 and middle([]) is None
