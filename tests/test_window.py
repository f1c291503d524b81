"""The attention window in hand-written cases, held against the simulator and against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from window_pair import Pair, one_thread, rejected  # noqa: F401 (a fixture)

from longlive_rag_ops import WindowConfig
from longlive_rag_ops.assignment import FRAME, POSITION, advance_window, empty_window_state
from longlive_rag_ops.config import local_frames, memory_position, temporal_position
from longlive_rag_ops.rotary import rotary_table


def constant(pair: Pair, value: list[float], n: int | None = None) -> torch.Tensor:
    """The same embedding for every frame of a block of every sample."""
    n = pair.config.frames_per_block if n is None else n
    return torch.tensor(value).expand(pair.batch, n, len(value)).contiguous()


# Rules, with numbers by hand.


def test_the_published_window_by_hand() -> None:
    # Frame f has the embedding (cos a, sin a) with a = f / 20: the nearer in time, the more similar.
    pair = Pair(window=12, sink=1, top_k=6, recent_exclude=5, frames_per_block=3, width=2)
    chosen, frames = {}, {}
    for start in range(0, 30, 3):
        angles = [(start + i) / 20 for i in range(3)]
        pair.forward()
        chosen[start], frames[start] = list(pair.window.selected[0]), sorted(pair.window.window_frames[0])
        pair.finish(torch.tensor([[[math.cos(a), math.sin(a)] for a in angles]]))
    # Evicted before the block at t: t - 12; the newest 5 of them are left out; the first candidate is frame 1.
    assert chosen[12] == chosen[15] == []
    assert chosen[18] == [1]
    assert chosen[21] == [4, 3, 2, 1]
    assert chosen[24] == [7, 6, 5, 4, 3, 2]
    assert chosen[27] == [10, 9, 8, 7, 6, 5]
    # The local part is 5 frames long from the beginning, memory or not.
    assert frames[0] == [0, 1, 2]
    assert frames[3] == [0, 1, 2, 3, 4, 5]
    assert frames[6] == [0, 4, 5, 6, 7, 8]
    assert frames[18] == [0, 1, 16, 17, 18, 19, 20]
    assert frames[27] == [0, 5, 6, 7, 8, 9, 10, 25, 26, 27, 28, 29]


def test_attention_to_one_token_returns_its_value() -> None:
    pair = Pair(window=1, sink=0, top_k=0, recent_exclude=0, frames_per_block=1, grid=(1, 1))
    for _ in range(4):
        q, k, v = pair.qkv()
        assert torch.equal(pair.layer(0, q, k, v), v)
        pair.finish()


def test_without_sink_and_memory_the_window_is_the_newest_frames() -> None:
    pair = Pair(window=7, sink=0, top_k=0, recent_exclude=3, frames_per_block=2)
    for start in range(0, 20, 2):
        pair.forward()
        assert sorted(pair.window.window_frames[0]) == list(range(max(0, start + 2 - 7), start + 2))
        assert pair.window.selected == [[]]
        pair.finish()


def test_without_memory_embeddings_may_be_missing() -> None:
    pair = Pair(window=6, sink=2, top_k=0, recent_exclude=0, frames_per_block=2)
    for _ in range(6):
        pair.forward()
        pair.window.finish(pair.start, None)
        pair.sim.finish(2, None)


def test_equal_scores_choose_the_older_frame_wherever_the_duplicates_lie() -> None:
    pair = Pair(window=5, sink=1, top_k=3, recent_exclude=0, frames_per_block=1, batch=2)
    for start in range(40):
        pair.forward()
        if start > 5 + 3:
            assert pair.window.selected == [[1, 2, 3], [1, 2, 3]]
        pair.finish(constant(pair, [0.1, 0.2, 0.3, 0.7]))


@pytest.mark.parametrize("width", [1, 3, 8, 33, 256, 1024])
def test_duplicates_tie_exactly_at_any_width(width: int) -> None:
    # A score that depended on the row's place in a blocked product would break ties among copies of one vector.
    # The guard of 30 frames keeps the second vector a query only: every candidate is a copy of the first.
    pair = Pair(window=3, sink=0, top_k=2, recent_exclude=30, frames_per_block=1, grid=(1, 1), width=width)
    first, second = torch.randn(2, width, generator=torch.Generator().manual_seed(width))
    for start in range(70):
        pair.forward(check=start % 7 == 0)
        if start >= 35:
            assert pair.window.selected == [[0, 1]]
        pair.finish((first if start < 40 else second)[None, None])


def test_a_zero_embedding_scores_zero() -> None:
    pair = Pair(window=2, sink=0, top_k=1, recent_exclude=0, frames_per_block=1, width=2)
    vectors = [[-1.0, 0.0], [0.0, 0.0], [-1.0, 0.1], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    chosen = []
    for vector in vectors:
        pair.forward()
        chosen.append(pair.window.selected[0][:])
        pair.finish(torch.tensor([[vector]]))
    # Block 4's query (1, 0) prefers the zero frame 1 (score 0) to frame 0 (-1).
    # Block 5's query is zero: every score is 0 and the oldest wins.
    assert chosen == [[], [], [], [0], [1], [0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_frame_without_a_finite_embedding_is_never_chosen(bad: float) -> None:
    pair = Pair(window=4, sink=1, top_k=2, recent_exclude=0, frames_per_block=1, batch=2, seed=3)
    for start in range(16):
        pair.forward()
        assert 2 not in pair.window.selected[0] and 5 not in pair.window.selected[1]
        if start == 11:
            assert pair.window.selected[0] == [] and len(pair.window.selected[1]) == 2
        embeddings = pair.embeddings()
        for sample, frame in ((0, 2), (1, 5), (0, 10)):
            if start == frame:
                embeddings[sample, 0, 1] = bad
        pair.finish(embeddings)
    assert pair.window.stats()["non_finite_embeddings"] == 3


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_choices_do_not_depend_on_the_magnitude_of_embeddings(scale: float) -> None:
    pair = Pair(window=4, sink=0, top_k=2, recent_exclude=1, frames_per_block=1, width=8)
    for start in range(20):
        pair.forward()
        pair.finish(pair.embeddings() * (scale if start % 3 else 1 / scale))
    assert len(pair.window.selected[0]) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_embeddings_of_other_floating_types(dtype: torch.dtype) -> None:
    pair = Pair(window=4, sink=0, top_k=2, recent_exclude=1, frames_per_block=1, width=8)
    for _ in range(12):
        pair.forward()
        pair.finish(pair.embeddings().to(dtype))


def test_embeddings_may_change_their_type() -> None:
    for dtypes in ((torch.float32, torch.float64, torch.bfloat16), (torch.float64, torch.float16, torch.float32)):
        pair = Pair(window=4, sink=0, top_k=2, recent_exclude=1, frames_per_block=1, width=8)
        for start in range(18):
            pair.forward()
            pair.finish(pair.embeddings().to(dtypes[start % 3]))


def test_copies_scaled_by_powers_of_two_tie() -> None:
    # Scaling by a power of two changes no bit of a mantissa, so these cosines are equal, not only nearly so.
    pair = Pair(window=3, sink=0, top_k=2, recent_exclude=0, frames_per_block=1, width=7, seed=2)
    vector = pair.embeddings()
    for start in range(24):
        pair.forward()
        assert pair.window.selected == [[0, 1]] or start < 5
        pair.finish(vector * 2.0 ** ((start * 37) % 61 - 30))


def test_samples_choose_for_themselves() -> None:
    pair = Pair(window=5, sink=1, top_k=2, recent_exclude=0, frames_per_block=2, batch=3, layers=2, seed=1)
    different = 0
    for _ in range(10):
        pair.block()
        different += len({tuple(sorted(s)) for s in pair.window.selected}) > 1
    assert different > 2


def test_one_sample_without_a_finite_query_leaves_the_others_alone() -> None:
    pair = Pair(window=5, sink=1, top_k=3, recent_exclude=0, frames_per_block=1, batch=3)
    lengths = []
    for start in range(14):
        pair.forward()
        lengths.append([len(s) for s in pair.window.selected])
        embeddings = pair.embeddings()
        if start in (9, 11):
            embeddings[1] = float("nan")
        pair.finish(embeddings)
    assert lengths[9:13] == [[3, 3, 3], [3, 0, 3], [3, 3, 3], [3, 0, 3]]


# Blocks.


@pytest.mark.parametrize(
    ("window", "sink", "top_k", "recent_exclude", "n"),
    [
        (12, 1, 6, 5, 3),
        (12, 3, 4, 2, 3),
        (1, 0, 0, 0, 1),
        (2, 1, 0, 0, 1),
        (3, 1, 1, 0, 1),
        (7, 0, 2, 0, 3),
        (8, 5, 0, 0, 3),  # S > n
        (9, 4, 3, 1, 2),  # S > n, the local part exactly a block
        (11, 5, 2, 0, 2),
        (10, 0, 7, 0, 3),  # W no multiple of n
        (13, 2, 4, 9, 4),  # R > K
        (9, 0, 3, 0, 1),
    ],
)
@pytest.mark.parametrize("forwards", [1, 3])
def test_shapes_of_windows(window: int, sink: int, top_k: int, recent_exclude: int, n: int, forwards: int) -> None:
    pair = Pair(window, sink, top_k, recent_exclude, n, seed=window)
    while pair.start < 2 * window + recent_exclude + 6:
        pair.block(forwards=forwards)
        pair.compare_history()


@pytest.mark.parametrize("first", [1, 2])
def test_a_short_first_block(first: int) -> None:
    pair = Pair(window=9, sink=2, top_k=3, recent_exclude=1, frames_per_block=3)
    pair.block(n=first, forwards=2)
    for _ in range(8):
        pair.block(forwards=2)


def test_short_blocks_anywhere() -> None:
    pair = Pair(window=9, sink=2, top_k=3, recent_exclude=1, frames_per_block=3)
    for n in (3, 1, 2, 3, 3, 1, 1, 3, 2, 3, 1, 3, 3, 2):
        pair.block(n=n, forwards=2)
        pair.compare_history()


def test_two_layers_and_many_forwards_share_one_choice() -> None:
    pair = Pair(layers=3, batch=2, grid=(2, 3), heads=2, kv_heads=2)
    for _ in range(9):
        pair.forward()
        before = [list(s) for s in pair.window.selected], [list(f) for f in pair.window.window_frames]
        for _ in range(2):
            pair.forward()
            assert before == ([list(s) for s in pair.window.selected], [list(f) for f in pair.window.window_frames])
        pair.finish()


def test_layers_may_run_in_any_order_and_unevenly() -> None:
    pair = Pair(window=6, sink=1, top_k=2, recent_exclude=0, frames_per_block=2, layers=3)
    for block in range(7):
        for layer in ([2, 0, 1, 1], [0, 1, 2], [1, 2, 2, 0, 2])[block % 3]:
            pair.layer(layer, *pair.qkv())
        pair.finish()


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_grouped_heads_and_head_dims(heads: tuple[int, int], head_dim: int) -> None:
    pair = Pair(5, 1, 2, 0, 2, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, grid=(3, 2), layers=2)
    for _ in range(6):
        pair.block()
    pair.compare_history()


@pytest.mark.parametrize("head_dim", [2, 4, 6, 8, 10, 22, 24, 48, 80, 96])
def test_unusual_head_dims(head_dim: int) -> None:
    pair = Pair(5, 1, 2, 0, 2, head_dim=head_dim, grid=(3, 2))
    for _ in range(6):
        pair.block()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    pair = Pair(6, 1, 2, 0, 2, dtype=dtype, layers=2, batch=2, grid=(2, 3), heads=2, kv_heads=1, head_dim=32)
    for _ in range(8):
        pair.block(forwards=2)
    pair.compare_history()


def test_large_logits_do_not_overflow() -> None:
    pair = Pair(5, 1, 2, 0, 2, grid=(2, 2))
    for _ in range(6):
        q, k, v = pair.qkv()
        pair.layer(0, q * 30, k * 30, v * 1e3, check=False)
        out = pair.layer(0, q * 2, k * 2, v * 1e3)
        assert torch.isfinite(out).all()
        assert torch.isfinite(pair.window.attend(0, q * 1e4, k * 1e4, v, pair.start, pair.grid)).all()
        pair.layer(0, q, k, v)
        pair.finish()


def test_absolute_positions() -> None:
    pair = Pair(6, 1, 2, 0, 2, position_rule="absolute", grid=(2, 2), layers=2)
    for _ in range(12):
        pair.block(forwards=2)


@pytest.mark.parametrize(("sink", "top_k"), [(0, 3), (2, 0), (2, 3)])
def test_positions_before_the_window(sink: int, top_k: int) -> None:
    # The simulator moves sink and memory up to the local part's global numbers instead.
    pair = Pair(sink + top_k + 5, sink, top_k, 1, 2, position_rule="before_window", layers=2, grid=(1, 1), width=8)
    for block in range(150):
        pair.block(forwards=2, check=block < 15 or block % 20 == 19)
    pair.forward()
    assert len(pair.window.selected[0]) == top_k
    assert pair.sim.memory_slots(0) or not top_k


@pytest.mark.parametrize(("sink", "top_k", "rows"), [(0, 3, 5), (2, 0, 6), (2, 3, 6)])
def test_positions_before_the_window_and_the_rotary_table(sink: int, top_k: int, rows: int) -> None:
    # Four local frames follow the sink, or memory at 0; `W` rows are never too few.
    sizes = (sink + top_k + 4, sink, top_k, 0, 2)
    assert rows <= sizes[0]
    pair = Pair(*sizes, position_rule="before_window", grid=(1, 1), rope=rotary_table(16, rows))
    for _ in range(30):
        pair.block()
    pair = Pair(*sizes, position_rule="before_window", grid=(1, 1), rope=rotary_table(16, rows - 1))
    with rejected("rope", str(rows - 1)):
        for _ in range(4):
            pair.block()


def positions(config: WindowConfig, start: int, n: int) -> dict[int, int]:
    """Of the sink and the local part, by frame."""
    frames = [*range(min(config.sink, start + n)), *local_frames(start, n, config.sink, config.local)]
    sizes = (config.window, config.sink, config.top_k, config.position_rule)
    return {frame: temporal_position(frame, start, n, *sizes) for frame in frames}


def test_positions_before_the_window_by_hand() -> None:
    config = WindowConfig(12, 1, 6, 5, 3, "before_window")
    assert positions(config, 0, 3) == {0: 0, 1: 1, 2: 2}
    assert positions(config, 6, 3) == {0: 0, 4: 1, 5: 2, 6: 3, 7: 4, 8: 5}
    assert positions(config, 90, 3) == {0: 0, 88: 1, 89: 2, 90: 3, 91: 4, 92: 5}
    assert positions(replace(config, position_rule="slot"), 90, 3) == {0: 0, 88: 7, 89: 8, 90: 9, 91: 10, 92: 11}
    assert memory_position(40, "before_window") == memory_position(40, "slot") == 0
    # Without a sink memory has position 0 to itself; without memory the local part has it.
    assert positions(replace(config, window=10, sink=0, top_k=6), 90, 2) == {88: 1, 89: 2, 90: 3, 91: 4}
    assert positions(replace(config, window=4, sink=0, top_k=0), 90, 2) == {88: 0, 89: 1, 90: 2, 91: 3}
    # A sink longer than the video so far.
    assert positions(replace(config, sink=4, top_k=5), 0, 3) == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize("sink", [0, 1, 4])
@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("n", [1, 3])
def test_where_the_rules_put_the_window(sink: int, top_k: int, n: int) -> None:
    config = WindowConfig(sink + top_k + n + 1, sink, top_k, 0, n, "before_window")
    plans = {rule: empty_window_state(1, config.window) for rule in ("slot", "before_window")}
    for start in range(0, 8 * n + 3 * config.window, n):
        retrieved = [*range(sink, max(sink, start - config.window))][:top_k]
        chosen = torch.tensor([retrieved + [-1] * (top_k - len(retrieved))], dtype=torch.int64).reshape(1, top_k)
        sizes = {"sink": sink, "top_k": top_k, "staging_rows": config.staging_rows}
        for rule, plan in plans.items():
            plans[rule] = advance_window(plan, chosen, lambda f: f + 99, start, n, position_rule=rule, **sizes)
        state = plans["before_window"][0]
        taken, held = state[POSITION], state[FRAME] >= 0
        fixed = taken[: config.window - top_k][held[: config.window - top_k]].tolist()
        memory = taken[config.window - top_k :][held[config.window - top_k :]].tolist()
        assert memory == [0] * len(retrieved)
        # Sink and local part are one run without a gap, in which memory takes no local frame's place.
        first = 0 if sink or not top_k else 1
        assert sorted(fixed) == list(range(first, first + len(fixed)))
        assert max(fixed) < config.window
        if top_k == 0:
            assert torch.equal(plans["slot"], plans["before_window"])


def test_a_tall_and_a_wide_grid() -> None:
    for grid in ((7, 1), (1, 7), (5, 3)):
        pair = Pair(5, 1, 2, 0, 1, grid=grid)
        for _ in range(7):
            pair.block()


def test_a_long_history() -> None:
    pair = Pair(6, 1, 3, 2, 2, grid=(1, 1), width=8)
    for block in range(120):
        pair.block(check=block % 10 == 9 or block > 115)
    pair.compare_history()
