"""Assignment of retrieved frames to memory slots, held against the simulator's, holes included.

Through the window the number of retrieved frames only grows or drops to zero, so a hole is met here alone.
"""

from __future__ import annotations

import random

import pytest
import torch
from simulator import place_memory

from longlive_rag_ops.assignment import FRAME, POSITION, SOURCE, STAGED, advance_window, occupied_slots

SINK, TOP_K, LOCAL = 2, 5, 3
WINDOW = SINK + TOP_K + LOCAL
START = 100  # everything before the local part may have been retrieved


def state_of(memories: list[list[int]]) -> torch.Tensor:
    """State after the block of one frame that ended at `START`, with these memory parts."""
    state = torch.full((len(memories), 4, WINDOW), -1, dtype=torch.int64)
    for row, memory in zip(state, memories, strict=True):
        for frame in range(SINK):
            row[FRAME, frame] = row[POSITION, frame] = frame
        for frame in range(START - LOCAL, START):
            slot = SINK + (frame - SINK) % LOCAL
            row[FRAME, slot], row[POSITION, slot] = frame, WINDOW - (START - frame)
        for i, frame in enumerate(memory):
            row[FRAME, SINK + LOCAL + i], row[POSITION, SINK + LOCAL + i] = frame, 0
    return state


@pytest.mark.parametrize("seed", range(50))
def test_memory_slots_follow_the_rule(seed: int) -> None:
    draw = random.Random(seed)
    memories = [draw.sample(range(SINK, 14), draw.randint(0, TOP_K)) for _ in range(3)]
    choices = [draw.sample(range(SINK, 14), draw.randint(0, TOP_K)) for _ in range(3)]
    chosen = torch.tensor([c + [-1] * (TOP_K - len(c)) for c in choices])
    frame_slot = (torch.arange(START) + 1000).expand(3, -1)
    before = state_of(memories)
    state = advance_window(before, chosen, frame_slot, START, 1, sink=SINK, top_k=TOP_K, staging_rows=LOCAL + 1)
    assert torch.equal(before, state_of(memories)), "the previous state was changed"
    for row, memory, choice in zip(state, memories, choices, strict=True):
        expected = place_memory(memory, choice)
        frames = [f for f in row[FRAME, SINK + LOCAL :].tolist() if f >= 0]
        assert frames == expected == row[FRAME, SINK + LOCAL :][: len(expected)].tolist()
        assert sorted(frames) == sorted(choice)
        for i, frame in enumerate(expected):
            slot = SINK + LOCAL + i
            stays = i < len(memory) and memory[i] == frame
            # A page is fetched exactly when another frame, or none, was in its slot.
            assert row[SOURCE, slot] == (-1 if stays else 1000 + frame)
            assert (row[POSITION, slot], row[STAGED, slot]) == (0, -1)
        assert (row[SOURCE, : SINK + LOCAL] == -1).all()
        # The newest local frames moved one position back and are placed anew; sink frames stay.
        assert row[FRAME, :SINK].tolist() == list(range(SINK))
        assert sorted(row[FRAME, SINK : SINK + LOCAL].tolist()) == list(range(START + 1 - LOCAL, START + 1))
        staged = {int(f): int(s) for f, s in zip(row[FRAME], row[STAGED], strict=True) if s >= 0}
        assert staged == {f: f % (LOCAL + 1) for f in range(START + 1 - LOCAL, START)}
    # The occupied slots are one run from slot 0.
    for row, choice in zip(occupied_slots(state).tolist(), choices, strict=True):
        count = SINK + LOCAL + len(choice)
        assert row == [*range(count), *[-1] * (WINDOW - count)]


def test_a_chosen_frame_without_a_page_is_refused() -> None:
    chosen = torch.tensor([[5, -1, -1, -1, -1]])
    for frame_slot in (torch.full((1, START), -1), torch.zeros(1, 3, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"frame_slot.*\b5\b"):
            advance_window(state_of([[]]), chosen, frame_slot, START, 1, sink=SINK, top_k=TOP_K, staging_rows=4)


def test_a_skipped_block_is_refused() -> None:
    with pytest.raises(RuntimeError, match="window_state"):
        advance_window(
            state_of([[]]),
            torch.full((1, TOP_K), -1),
            torch.zeros(1, START, dtype=torch.int64),
            START + 2,
            1,
            sink=SINK,
            top_k=TOP_K,
            staging_rows=4,
        )
