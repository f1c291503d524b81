"""Which frames may be retrieved and which are, against the rules of the window and a real window."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from evaluation_cases import CONFIG

from longlive_rag_ops import MemoryWindow
from longlive_rag_ops.config import WindowConfig
from longlive_rag_ops.evaluation.choice import (
    Block,
    blocks,
    choosing_blocks,
    most_similar,
    newest,
    shortest_choosing,
)

CONFIGS = [
    WindowConfig(window=w, sink=s, top_k=k, recent_exclude=r)
    for w, s, k, r in product((7, 9, 12), (0, 1, 2), (1, 2), (0, 1, 5))
]


def test_eligible_frames_are_those_of_the_design() -> None:
    for config in CONFIGS:
        found = blocks(41, config)
        assert [block.start for block in found] == list(range(0, 39, 3))  # 39 and 40 are no whole block
        for block in found:
            evicted = max(0, block.start - config.window)
            first, last = config.sink, config.sink + evicted - config.recent_exclude - 1
            assert list(block.eligible) == [frame for frame in range(41) if first <= frame <= last]


def test_a_block_has_a_choice_when_more_is_eligible_than_is_retrieved() -> None:
    for config in CONFIGS:
        shortest = shortest_choosing(config)
        (only,) = choosing_blocks(shortest, config)
        assert only.start == shortest - 3 and len(only.eligible) > config.top_k
        assert not choosing_blocks(shortest - 1, config)
    assert shortest_choosing(WindowConfig()) == 27


def real_choices(embeddings: torch.Tensor, config: WindowConfig) -> dict[int, tuple[int, ...]]:
    """What a window retrieves for each block when its frames are finished with these embeddings."""
    window = MemoryWindow(config, layers=1, batch=1, tokens_per_frame=1, kv_heads=1, head_dim=8, dtype=torch.float32)
    found = {}
    for start in range(0, len(embeddings) - 2, 3):
        q, k, v = torch.randn(3, 1, 3, 1, 8).unbind(0)
        window.attend(0, q, k, v, start, (1, 1))
        found[start] = tuple(window.selected[0])
        window.finish(start, embeddings[None, start : start + 3])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIG, WindowConfig(window=9, sink=2, top_k=4, recent_exclude=0)])
def test_choices_equal_a_real_windows(config: WindowConfig, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(3)
    # Few distinct vectors: many frames are exactly as similar as others.
    kinds = torch.randn(5, 12, generator=source)
    for embeddings in (torch.randn(45, 12, generator=source), kinds[torch.randint(5, (45,), generator=source)]):
        real = real_choices(embeddings.to(dtype), config)
        able = [block for block in blocks(45, config) if block.eligible]
        assert len(able) >= 9
        assert most_similar(embeddings.to(dtype), able, config) == [real[block.start] for block in able]


def test_equals_are_chosen_oldest_first() -> None:
    found = most_similar(torch.ones(30, 4), choosing_blocks(30, CONFIG), CONFIG)
    assert found and set(found) == {(1, 2, 3)}


def test_fewer_are_chosen_where_fewer_are_eligible() -> None:
    block = Block(9, range(1, 2))
    assert most_similar(torch.eye(12), [block], CONFIG) == [(1,)]
    assert newest(block, 3) == (1,)


def test_newest_are_the_newest_first() -> None:
    assert newest(Block(21, range(1, 14)), 3) == (13, 12, 11)
    assert newest(Block(3, range(1, 1)), 3) == ()
