"""Edits in which a scene returns, and recall of it."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest
import torch
from evaluation_cases import CONFIG, clip

from longlive_rag_ops.config import WindowConfig
from longlive_rag_ops.embedder import average_pool
from longlive_rag_ops.evaluation.choice import Block, most_similar, newest
from longlive_rag_ops.evaluation.returning_scene import (
    Edit,
    least_between,
    least_outer,
    make_edit,
    random_recall,
    recall,
    searching_blocks,
)

DEFAULT = WindowConfig()


def made(outer: int, inner: int, config: WindowConfig = DEFAULT) -> Edit:
    edit = make_edit(clip(0, outer), clip(1, inner), config)
    assert isinstance(edit, Edit), edit
    return edit


def test_sizes_of_an_edit() -> None:
    assert made(60, 59) == Edit("c0", "c1", 24, 36, 24, 36)  # 40 %, at most 36, 40 %; 20 % left out
    assert made(62, 20) == Edit("c0", "c1", 24, 18, 24, 36)
    assert made(15, 18) == Edit("c0", "c1", 6, 18, 6, 9)
    assert (least_outer(DEFAULT), least_between(DEFAULT)) == (15, 18)


@pytest.mark.parametrize("config", [DEFAULT, CONFIG, WindowConfig(window=20, sink=7, top_k=4, recent_exclude=0)])
def test_what_holds_of_every_edit(config: WindowConfig) -> None:
    for outer in range(least_outer(config), 70, 4):
        for inner in range(least_between(config), 60, 5):
            edit = made(outer, inner, config)
            assert all(part % 3 == 0 for part in (edit.first, edit.between, edit.last, edit.resume))
            assert edit.first < edit.resume <= outer - edit.last and edit.between <= inner
            assert edit.first == edit.last and config.sink < edit.first <= max(6, 0.4 * outer, config.sink + 3)
            searching = searching_blocks(edit, config)
            assert searching
            for block in searching:
                # The query shows A, all of A1 but the sink can be found, and nothing of A2.
                assert block.start - 1 >= edit.returned
                assert set(range(config.sink, edit.first)) <= set(block.eligible)
                assert max(block.eligible) < edit.returned


def test_clips_that_are_too_short() -> None:
    assert make_edit(clip(0, 14), clip(1, 30), DEFAULT) == "c0 has 14 latent frames, the outer scene needs 15"
    assert make_edit(clip(0, 15), clip(1, 17), DEFAULT) == "c1 has 17 latent frames, the inner scene needs 18"


def test_join_takes_the_frames_named() -> None:
    edit = made(20, 18)
    rows = edit.join(torch.arange(20), 100 + torch.arange(18)).tolist()
    assert rows == [*range(6), *range(100, 118), *range(12, 18)]
    assert len(rows) == edit.frames and rows[edit.returned] == edit.resume


def test_orthogonal_scenes_are_found() -> None:
    edit = made(30, 24)
    rows = edit.join(average_pool(clip(0, 30).latents), average_pool(clip(1, 24).latents))
    searching = searching_blocks(edit, DEFAULT)
    found = list(zip(searching, most_similar(rows, searching, DEFAULT), strict=True))
    assert [recall(edit, found, k) for k in (1, 3, 6)] == [1, 1, 1]
    latest = [(block, newest(block, 6)) for block in searching]
    assert [recall(edit, latest, k) for k in (1, 3, 6)] == [0, 0, 0]


def test_recall_by_hand() -> None:
    edit = Edit("a", "b", 3, 9, 6, 6)
    block = Block(15, range(1, 8))  # frames 1 and 2 of A1 can be found
    assert recall(edit, [(block, (2, 5, 1))], 1) == 1
    assert recall(edit, [(block, (2, 5, 1))], 2) == 0.5
    assert recall(edit, [(block, (2, 5, 1))], 3) == 1  # both of the two that there are
    assert recall(edit, [(block, (2, 5, 1)), (block, (4, 5, 6))], 3) == 0.5
    assert recall(edit, [], 3) is None and random_recall(edit, [], 3) is None


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_chance_is_the_mean_over_all_draws(count: int) -> None:
    edit, block = Edit("a", "b", 4, 9, 6, 6), Block(15, range(1, 8))
    draws = combinations(block.eligible, min(count, 7))
    expected = fmean(value for draw in draws if (value := recall(edit, [(block, draw)], count)) is not None)
    assert random_recall(edit, [block], count) == pytest.approx(expected)
