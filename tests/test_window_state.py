"""The attention window's state: where pages lie, what is shared with the caller, and the same numbers again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulator import rotate
from window_pair import Pair, error_of, one_thread  # noqa: F401 (a fixture)

from longlive_rag_ops import MemoryWindow, WindowConfig

# Where memory lies.


def test_noisy_forwards_leave_no_trace() -> None:
    """Every forward overwrites the block's pages, so only the last one matters to later blocks."""

    def run(noisy: int) -> list[torch.Tensor]:
        pair = Pair(6, 2, 2, 0, 2, layers=2, batch=2, grid=(1, 2))
        noise = torch.Generator().manual_seed(99)
        outs = []
        for _ in range(9):
            for _ in range(noisy):
                for layer in range(2):
                    bad = [torch.randn(2, 4, 1, 16, generator=noise) * 100 for _ in range(3)]
                    pair.window.attend(layer, *bad, pair.start, pair.grid)
            outs += pair.forward()
            pair.finish()
        return outs

    clean = run(0)
    assert all(torch.equal(a, b) for a, b in zip(clean, run(3), strict=True))


def test_infinite_values_in_a_noisy_forward_leave_no_trace() -> None:
    pair = Pair(6, 2, 2, 0, 2, layers=2)
    for _ in range(8):
        for layer in range(2):
            pair.window.attend(layer, *(torch.full_like(x, float("nan")) for x in pair.qkv()), pair.start, pair.grid)
        pair.block()


def test_a_retrieved_frame_keeps_its_slot() -> None:
    pair = Pair(window=7, sink=1, top_k=4, recent_exclude=0, frames_per_block=1, width=3, seed=5)
    before: dict[int, int] = {}
    moved = kept = 0
    for _ in range(40):
        pair.forward()
        frames, chosen = pair.window.window_frames[0], pair.window.selected[0]
        now = {f: frames.index(f) for f in chosen}
        kept += sum(f in before for f in now)
        moved += sum(before.get(f, now[f]) != now[f] for f in now)
        before = now
        pair.finish()
    assert kept > 20 and moved == 0


def test_counts_of_repeated_choices() -> None:
    pair = Pair(window=5, sink=0, top_k=3, recent_exclude=0, frames_per_block=1, batch=2)
    selected = repeated = 0
    before: list[set[int]] = [set(), set()]
    for block in range(25):
        pair.forward()
        for sample in range(2):
            now = set(pair.sim.selected(sample))
            selected += len(now)
            repeated += len(now & before[sample])
            before[sample] = now
        stats = pair.window.stats()
        assert (stats["selected_frames"], stats["repeated_frames"]) == (selected, repeated)
        pair.finish()
        stats = pair.window.stats()
        assert (stats["blocks"], stats["frames"]) == (block + 1, block + 1)
    assert repeated > 5


# Nothing is shared with the caller.


def test_inputs_may_be_reused_and_results_are_fresh() -> None:
    pair = Pair(6, 1, 2, 0, 2, layers=2)
    buffers = pair.qkv()
    embeddings = pair.embeddings()
    kept = []
    for _ in range(8):
        for layer in range(2):
            for buffer, fresh in zip(buffers, pair.qkv(), strict=True):
                buffer.copy_(fresh)
            out = pair.layer(layer, *buffers)
            kept.append((out, out.clone()))
            for buffer in buffers:
                buffer.fill_(float("nan"))
        embeddings.copy_(pair.embeddings())
        pair.finish(embeddings)
        embeddings.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in kept)
    pool = pair.window.pool.untyped_storage()
    start, end = pool.data_ptr(), pool.data_ptr() + pool.nbytes()
    assert not any(start <= out.data_ptr() < end for out, _ in kept)


def test_results_may_be_overwritten() -> None:
    pair = Pair(6, 1, 2, 0, 2)
    for _ in range(8):
        for out in pair.forward():
            out.fill_(float("nan"))
        for frames in (*pair.window.selected, *pair.window.window_frames):
            frames.clear()
        pair.forward()
        pair.finish()


def test_strided_inputs() -> None:
    pair = Pair(6, 1, 2, 0, 2, batch=2, grid=(2, 2), heads=2, kv_heads=2)
    for _ in range(8):
        fused = pair.random(2, 8, 3, 2, 16)
        pair.layer(0, *fused.unbind(2))  # one projection
        heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pair.qkv()]
        pair.layer(0, *heads_first)
        wide = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in pair.qkv()]
        pair.layer(0, *wide)
        same = pair.random(1, 8, 2, 16).expand(2, 8, 2, 16)
        pair.layer(0, same, same, same)
        pair.finish(torch.randn(4, 2, 2, generator=pair.generator).permute(1, 2, 0))


def test_inference_mode_now_and_then() -> None:
    # Tensors made in inference mode cannot be written outside it: no state may be born there by growth.
    pair = Pair(5, 1, 2, 0, 1, grid=(1, 1))
    for block in range(40):
        with torch.inference_mode(block % 3 != 1):
            pair.block()


def test_a_window_made_in_inference_mode() -> None:
    with torch.inference_mode():
        pair = Pair(5, 1, 2, 0, 1, grid=(1, 1))
        pair.block()
    for _ in range(20):
        pair.block()


def test_no_grad_allows_parameters() -> None:
    pair = Pair(5, 1, 2, 0, 1)
    with torch.no_grad():
        for _ in range(6):
            q, k, v = (x.requires_grad_() for x in pair.qkv())
            out = pair.layer(0, q, k, v)
            assert not out.requires_grad
            pair.finish()


# The same numbers again.


def stream(pair: Pair, blocks: int = 10, forwards: int = 2) -> tuple[list[torch.Tensor], list[Any]]:
    outs, state = [], []
    for _ in range(blocks):
        for _ in range(forwards):
            outs += pair.forward(check=False)
        state.append(([list(s) for s in pair.window.selected], [list(f) for f in pair.window.window_frames]))
        pair.finish()
    return outs, state


SMALL: dict[str, Any] = {
    "window": 6,
    "sink": 1,
    "top_k": 3,
    "recent_exclude": 1,
    "frames_per_block": 2,
    "layers": 2,
    "batch": 2,
}


def assert_same(a: tuple[list[torch.Tensor], list[Any]], b: tuple[list[torch.Tensor], list[Any]]) -> None:
    assert a[1] == b[1]
    assert len(a[0]) == len(b[0]) and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def test_two_runs_agree_bit_for_bit() -> None:
    assert_same(stream(Pair(**SMALL)), stream(Pair(**SMALL)))


@pytest.mark.parametrize("slots", [20, 21, 64, 200])
def test_results_do_not_depend_on_the_memory_given(slots: int) -> None:
    assert_same(stream(Pair(**SMALL)), stream(Pair(**SMALL, history_slots=slots)))


def test_reset_is_a_new_window() -> None:
    fresh = stream(Pair(**SMALL))
    for blocks_before in (0, 1, 7):
        pair = Pair(**SMALL)
        stream(pair, blocks=blocks_before)
        pair.forward(check=False)  # in the middle of a block
        pair.window.reset()
        assert pair.window.selected == [[], []]
        again = Pair(**SMALL)
        again.window = pair.window
        assert_same(fresh, stream(again))
        assert again.window.stats()["frames"] == 20 and again.window.stats()["blocks"] == 10


def test_reset_forgets_non_finite_embeddings_and_history() -> None:
    pair = Pair(**SMALL)
    for _ in range(6):
        pair.block(torch.full((2, 2, 4), float("nan")))
    pair.window.reset()
    assert pair.window.stats()["non_finite_embeddings"] == 0
    assert pair.window.stats()["frames"] == 0
    assert all(pair.window.history_slot(f) == -1 for f in range(12))
    assert [list(f) for f in pair.window.window_frames] == [[], []]


def test_a_sample_alone_is_the_same_as_in_a_batch() -> None:
    pair = Pair(**SMALL)
    singles = [Pair(**{**SMALL, "batch": 1}) for _ in range(2)]
    for _ in range(10):
        for layer in range(2):
            q, k, v = pair.qkv()
            out = pair.window.attend(layer, q, k, v, pair.start, pair.grid)
            for s, single in enumerate(singles):
                part = slice(s, s + 1)
                alone = single.window.attend(layer, q[part], k[part], v[part], pair.start, pair.grid)
                assert error_of(alone, out[part]) < 2e-6
        embeddings = pair.embeddings()
        for s, single in enumerate(singles):
            assert list(single.window.selected[0]) == list(pair.window.selected[s])
            assert list(single.window.window_frames[0]) == list(pair.window.window_frames[s])
            single.window.finish(pair.start, embeddings[s : s + 1])
        pair.finish(embeddings)


def test_windows_do_not_share_state() -> None:
    fresh = stream(Pair(**SMALL))
    one, other = Pair(**SMALL), Pair(**{**SMALL, "seed": 9})
    outs, state = [], []
    for _ in range(10):
        for _ in range(2):
            outs += one.forward(check=False)
            other.forward(check=False)
        state.append(([list(s) for s in one.window.selected], [list(f) for f in one.window.window_frames]))
        other.finish()
        one.finish()
    assert_same(fresh, (outs, state))


def test_the_pool_is_laid_out_as_documented() -> None:
    config = WindowConfig(6, 1, 2, 0, 2)
    window = MemoryWindow(config, layers=3, batch=2, tokens_per_frame=4, kv_heads=2, head_dim=16, history_slots=12)
    pool = window.pool
    assert pool.shape[:3] == (3, 2, 2) and pool.shape[3] >= 6 and pool.shape[4:] == (4, 2, 16)
    assert pool.dtype == torch.float32 and pool.is_contiguous()


def test_history_pages_are_unrotated_in_time() -> None:
    pair = Pair(5, 1, 2, 0, 2, grid=(2, 2), dtype=torch.float64)
    for _ in range(6):
        pair.block()
    frame = 4
    k, v = pair.sim.pages[0, 0, frame]
    page = pair.window.pool[0, :, 0, pair.window.history_slot(frame)]
    assert error_of(page[0], rotate(k, 0, (2, 2))) < 1e-10 and torch.equal(page[1], v)
    assert pair.window.history_slot(pair.start) == -1


def test_a_full_history_forgets_what_was_retrieved_least_recently() -> None:
    x, y, z = torch.eye(3)
    pair = Pair(window=2, sink=0, top_k=1, recent_exclude=0, frames_per_block=1, history_slots=6, on_full="forget")

    def held() -> set[int]:
        return {f for f in range(pair.start) if pair.window.history_slot(f) >= 0}

    # Frames 0 (x) and 1 (y) are retrieved in turn, being the oldest of their kind; frame 2 (z) never is.
    for frame in range(14):
        pair.forward()
        pair.finish((x, y, z)[frame if frame < 3 else frame % 2][None, None])
        pair.sim.forgotten = set(range(pair.start)) - held()
        assert held() == ({0, 1} | set(range(pair.start - 4, pair.start)) if frame > 5 else set(range(pair.start)))
    assert pair.window.stats()["forgotten_frames"] == 8
    # From now on only x is asked for: frame 1 is given up when it has been idle longest, frame 0 stays.
    for _ in range(6):
        pair.forward()
        assert pair.window.selected == [[0]] or pair.start == 14
        pair.finish(x[None, None])
        pair.sim.forgotten = set(range(pair.start)) - held()
    assert held() == {0} | set(range(pair.start - 5, pair.start))


def test_the_grid_stays_for_a_whole_video() -> None:
    """Earlier pages keep the spatial rotation they were written with: another grid would be silently wrong."""
    window = MemoryWindow(WindowConfig(3, 1, 1, 0, 1), layers=1, batch=1, tokens_per_frame=6, kv_heads=1, head_dim=16)
    x = torch.ones(1, 6, 1, 16)
    window.attend(0, x, x, x, 0, (2, 3))
    window.finish(0, torch.ones(1, 1, 4))
    with pytest.raises(ValueError, match=r"grid must stay \[2, 3\].*got \[3, 2\]"):
        window.attend(0, x, x, x, 1, (3, 2))
    window.reset()
    window.attend(0, x, x, x, 0, (3, 2))
