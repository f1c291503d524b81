"""The Triton kernel that advances the window, held against `assignment`, faults included."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from window_pair import one_thread  # noqa: F401 (a fixture)

pytest.importorskip("triton")

from longlive_rag_ops.assignment import FRAME, POSITION, SOURCE, STAGED, advance_window, check_state, empty_window_state
from longlive_rag_ops.config import POSITION_RULES, WindowConfig, window_slot
from longlive_rag_ops.triton_kernels.assign_window import Plan, assign_window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FRAMES = 40  # of a video
ROPE = 64


def on_device(x: torch.Tensor) -> torch.Tensor:
    """With gaps, so that every stride counts."""
    wide = torch.full((*x.shape, 2), 77, dtype=x.dtype, device=DEVICE)
    wide[..., 0] = x
    return wide[..., 0]


class Video:
    """A stream of blocks: states by `assignment`, and the kernel's plans of the same."""

    def __init__(self, config: WindowConfig, samples: int, seed: int) -> None:
        self.config, self.samples, self.draw = config, samples, random.Random(seed)
        self.start = 0
        self.state = empty_window_state(samples, config.window)
        pages = [self.draw.sample(range(config.window, config.window + FRAMES), FRAMES) for _ in range(samples)]
        self.frame_slot = torch.tensor(pages).reshape(samples, FRAMES)
        self.limits = {"staging_rows": config.staging_rows, "positions": ROPE}

    def choice(self) -> torch.Tensor:
        """Of the frames that have left the window, any number in any order."""
        left = range(self.config.sink, self.config.sink + max(0, self.start - self.config.window))
        rows = []
        for _ in range(self.samples):
            chosen = self.draw.sample(left, self.draw.randint(0, min(self.config.top_k, len(left))))
            rows.append(chosen + [-1] * (self.config.top_k - len(chosen)))
        return torch.tensor(rows, dtype=torch.int64).reshape(self.samples, self.config.top_k)

    def advanced(self, chosen: torch.Tensor, frames: int, state: torch.Tensor | None = None) -> torch.Tensor:
        config = self.config
        return advance_window(
            self.state if state is None else state,
            chosen,
            self.frame_slot,
            self.start,
            frames,
            sink=config.sink,
            top_k=config.top_k,
            staging_rows=config.staging_rows,
            position_rule=config.position_rule,
        )

    def plan(self, state: torch.Tensor, chosen: torch.Tensor | None, frames: int, **options: Any) -> Plan:
        """The kernel's; it must leave the state as it is."""
        given = on_device(state)
        plan = assign_window(
            given,
            None if chosen is None else on_device(chosen),
            on_device(self.frame_slot),
            torch.tensor([self.start], device=DEVICE),
            frames,
            sink=self.config.sink,
            top_k=self.config.top_k,
            position_rule=self.config.position_rule,
            **{"pool_slots": self.config.window + FRAMES, **self.limits, **options},
        )
        assert torch.equal(given.cpu(), state), "the given state was changed"
        return Plan(*(x.cpu() for x in plan))

    def skip(self, blocks: int) -> None:
        """Goes on without the kernel."""
        for _ in range(blocks):
            self.state = self.advanced(self.choice(), self.config.frames_per_block)
            self.start += self.config.frames_per_block


def assert_plan(plan: Plan, state: torch.Tensor, video: Video, frames: int) -> None:
    assert plan.ok.item() == 1
    assert torch.equal(plan.state, state)
    block = range(video.start, video.start + frames)
    slots = [window_slot(frame, video.config.sink, video.config.local) for frame in block]
    assert plan.slots.tolist() == slots
    assert plan.staging_rows.tolist() == [frame % video.config.staging_rows for frame in block]
    assert torch.equal(plan.positions, state[0, POSITION, slots])
    assert torch.equal(plan.counts, (state[:, FRAME] >= 0).sum(1))


@settings(max_examples=16, deadline=None)
@given(
    sink=st.integers(0, 3),
    top_k=st.integers(0, 8),
    frames=st.integers(1, 3),
    more=st.integers(0, 4),
    recent=st.integers(1, 2),
    rule=st.sampled_from(POSITION_RULES),
    samples=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
@example(sink=0, top_k=3, frames=2, more=1, recent=1, rule="before_window", samples=2, seed=1)
@example(sink=2, top_k=3, frames=2, more=1, recent=1, rule="before_window", samples=2, seed=2)
def test_states_are_those_of_advance_window(
    sink: int, top_k: int, frames: int, more: int, recent: int, rule: str, samples: int, seed: int
) -> None:
    window = sink + top_k + frames + more
    video = Video(WindowConfig(window, sink, top_k, 0, frames, rule), samples, seed)
    full = window // frames + 1  # blocks
    checked = set(video.draw.sample(range(full), min(3, full))) | set(range(full, full + 7))
    for block in range(full + 7):
        n, chosen = video.draw.randint(1, frames), video.choice()
        state = video.advanced(chosen, n)
        if block in checked:
            plan = video.plan(video.state, chosen, n)
            assert_plan(plan, state, video, n)
            state = plan.state
        if block == full + recent:
            assert_plan(video.plan(state, None, n), state, video, n)
            assert_plan(video.plan(state, torch.full_like(chosen, -1), n), state, video, n)  # nothing is chosen anew
        video.state, video.start = state, video.start + n


def test_samples_that_hold_the_block_keep_their_state() -> None:
    video = Video(WindowConfig(11, 1, 5, 0, 3), 3, seed=1)
    video.skip(7)
    chosen = video.choice()
    after = video.advanced(chosen, 3)
    after[0, POSITION] += 7  # whoever made the state places the block; its first sample says where
    mixed = video.state.clone()
    mixed[0] = after[0]
    plan = video.plan(mixed, torch.where(torch.arange(3)[:, None] == 0, -1, chosen), 3)
    assert_plan(plan, after, video, 3)


def test_the_widest_window() -> None:
    config = WindowConfig(250, 3, 63, 0, 5)
    video = Video(config, 2, seed=2)
    video.frame_slot = torch.arange(1000).flip(0).expand(2, -1) + config.window
    video.limits["positions"] = 400
    video.skip(80)
    for _ in range(3):
        chosen = video.choice()
        state = video.advanced(chosen, 5)
        assert_plan(video.plan(video.state, chosen, 5, pool_slots=1250), state, video, 5)
        video.state, video.start = state, video.start + 5


@pytest.mark.parametrize("samples", [0, 1])
def test_no_samples_and_no_frame_table(samples: int) -> None:
    video = Video(WindowConfig(5, 1, 2, 0, 2), samples, seed=0)
    video.frame_slot = torch.empty(samples, 0, dtype=torch.int64)
    plan = video.plan(video.state, video.choice(), 2)
    assert plan.ok.item() == 1
    assert [x.tolist() for x in plan[1:4]] == [[0, 1]] * 3
    assert plan.counts.tolist() == [2] * samples


SINK, TOP_K, N = 2, 3, 2
CONFIG = WindowConfig(9, SINK, TOP_K, 0, N)
START = 16
SAMPLES = 2

Change = Callable[[Video, torch.Tensor, torch.Tensor], "dict[str, Any] | None"]


def before(seed: int = 3) -> tuple[Video, torch.Tensor, torch.Tensor]:
    """A video before the block at `START`, what the block retrieves, and its state."""
    video = Video(CONFIG, SAMPLES, seed)
    video.skip(START // N)
    chosen = torch.tensor([[2, 4, 6], [5, 3, 8]])
    return video, chosen, video.advanced(chosen, N)


def put(row: int, slot: int, number: int) -> Change:
    def change(_: Video, state: torch.Tensor, __: torch.Tensor) -> None:
        state[1, row, slot] = number

    return change


def page(frame: int, slot: int) -> Change:
    def change(video: Video, _: torch.Tensor, chosen: torch.Tensor) -> None:
        chosen[1, 0] = frame
        video.frame_slot[1, min(frame, FRAMES - 1)] = slot

    return change


def option(**options: Any) -> Change:
    return lambda *_: options


def start(frame: int) -> Change:
    return lambda video, *_: setattr(video, "start", frame)


def twice(video: Video, state: torch.Tensor, chosen: torch.Tensor) -> None:
    chosen[1], state[1, FRAME, -TOP_K:] = torch.tensor([7, 7, 9]), torch.tensor([9, 3, 9])


def early(video: Video, state: torch.Tensor, chosen: torch.Tensor) -> None:
    video.start = 2
    state.fill_(-1)[:, : POSITION + 1, :2] = torch.arange(2)


FAULTS: dict[str, tuple[bool, Change]] = {
    "a block was skipped": (True, start(START + 1)),
    "start_frame is negative": (True, start(-1)),
    "a sink frame is missing": (True, put(FRAME, 0, 7)),
    "a local frame is missing": (True, put(FRAME, window_slot(START - 1, SINK, CONFIG.local), 1)),
    "a retrieved frame has no page": (True, page(7, -1)),
    "a retrieved frame is beyond frame_slot": (True, page(FRAMES, 20)),
    "a page is a window slot": (True, page(7, 8)),
    "a page is beyond the pool": (True, page(7, CONFIG.window + FRAMES)),
    "more memory than slots": (True, twice),
    "memory follows a local part that is not full": (True, early),
    "rope is too short to advance": (True, option(positions=CONFIG.window - 1)),
    "count of the advanced state": (True, option(count=8)),
    "rope is too short": (False, option(positions=CONFIG.window - 1)),
    "a position is negative": (False, put(POSITION, 3, -1)),
    "a source is a window slot": (False, put(SOURCE, 3, 0)),
    "a source is negative": (False, put(SOURCE, 3, -2)),
    "a source is beyond the pool": (False, put(SOURCE, 3, CONFIG.window + FRAMES)),
    "a staging row is beyond the buffer": (False, put(STAGED, 3, CONFIG.staging_rows)),
    "a staging row is negative": (False, put(STAGED, 3, -2)),
    "the block is not held": (False, put(FRAME, window_slot(START, SINK, CONFIG.local), START - 4)),
    "the state is of another block": (False, start(START + 1)),
    "count is wrong": (False, option(count=8)),
    "the slots in use are not the first": (False, put(FRAME, CONFIG.window - 2, -1)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str) -> None:
    select, change = FAULTS[name]
    video, chosen, after = before()
    state = video.state if select else after
    assert video.plan(state, chosen if select else None, N, count=9).ok.item() == 1
    options = change(video, state, chosen) or {}
    assert video.plan(state, chosen if select else None, N, **options).ok.item() == 0


def test_a_retrieved_frame_beyond_rope_is_refused() -> None:
    video = Video(replace(CONFIG, position_rule="absolute"), 1, seed=3)
    video.skip(START // N)
    chosen = torch.tensor([[20, -1, -1]])
    assert [video.plan(video.state, chosen, N, positions=rows).ok.item() for rows in (20, 21)] == [0, 1]


def refused(video: Video, state: torch.Tensor, chosen: torch.Tensor | None, count: int | None) -> bool:
    """Whether `assignment` refuses one of the samples, or the block is not in its state at the end."""
    slots = [window_slot(frame, SINK, CONFIG.local) for frame in range(video.start, video.start + N)]
    block, everything = list(range(video.start, video.start + N)), video.frame_slot
    try:
        for sample in range(SAMPLES):
            one = state[sample : sample + 1]
            if chosen is not None and one[0, FRAME, slots].tolist() != block:
                video.frame_slot = everything[sample : sample + 1]
                one = video.advanced(chosen[sample : sample + 1], N, one)
            if one[0, FRAME, slots].tolist() != block:
                return True
            used = int((one[0, FRAME] >= 0).sum())
            check_state(one, slots=CONFIG.window + FRAMES, **video.limits, count=used if count is None else count)
    except (RuntimeError, ValueError):
        return True
    finally:
        video.frame_slot = everything
    return False


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 5),
    select=st.booleans(),
    held=st.booleans(),
    count=st.sampled_from([None, 9]),
    sample=st.integers(0, SAMPLES - 1),
    row=st.sampled_from([FRAME, POSITION, SOURCE, STAGED]),
    slot=st.integers(0, CONFIG.window - 1),
    number=st.sampled_from([-2, -1, 0, 3, 5, 6, 9, START - 1, START, 48, 49, ROPE]),
)
def test_a_changed_number_is_refused_exactly_where_assignment_refuses_it(
    seed: int, select: bool, held: bool, count: int | None, sample: int, row: int, slot: int, number: int
) -> None:
    video, chosen, after = before(seed)
    state = (after if held else video.state).clone()
    state[sample, row, slot] = number
    wanted = chosen if select else None
    ok = video.plan(state, wanted, N, count=count).ok.item()
    assert ok == int(not refused(video, state, wanted, count))
