"""Frames encoded once more, and frames given up, in a window over a memory bank: no tier has the old pages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from simulator import rotate
from test_window_recache import RecachePair, Story, play, story
from test_window_tiers import record_bytes, refusing
from window_pair import error_of, one_thread

from longlive_rag_ops import BankConfig, MemoryBank, WindowConfig
from longlive_rag_ops.history import least_history

__all__ = ["one_thread"]
TENSORS = {"layers": 2, "batch": 2, "grid": (1, 2), "kv_heads": 1, "heads": 2, "head_dim": 16}


def tiers(
    sizes: dict[str, Any], tensors: dict[str, Any], frames: int, folder: Path
) -> Iterator[tuple[Any, int | None]]:
    """Banks from ample to the least that is allowed, with the device slots beside them."""
    config, batch = WindowConfig(**sizes), tensors["batch"]
    record, fetched = record_bytes({"head_dim": 16, **tensors}), batch * config.top_k
    room = max(frames, config.sink + least_history(config, batch)) * record
    yield BankConfig(host_bytes=2 * room, slab_bytes=3 * record), frames
    yield BankConfig(host_bytes=room, slab_bytes=3 * record), fetched
    fewest = (config.frames_per_block + fetched) * record
    spill: dict[str, Any] = {"disk_bytes": room, "spill": folder, "shard_bytes": 2 * record, "slab_bytes": record}
    yield BankConfig(host_bytes=fewest, **spill), None
    yield BankConfig(host_bytes=fewest, **spill), fetched


def retrieving(told: Story) -> Story:
    few = max(1, told.sizes["top_k"])
    more = few - told.sizes["top_k"]
    return Story(
        told.sizes | {"top_k": few, "window": told.sizes["window"] + more}, told.tensors, told.events, told.seed
    )


@pytest.mark.parametrize("seed", range(200, 216))
def test_results_do_not_depend_on_the_tiers(seed: int, tmp_path: Path) -> None:
    told = retrieving(story(random.Random(seed).randint))
    resident, expected = play(told)
    for bank, slots in tiers(told.sizes, told.tensors, resident.start, tmp_path):
        pair, outs = play(told, bank=bank, history_slots=slots)
        assert all(torch.equal(a, b) for a, b in zip(expected, outs, strict=True))
        for frame in range(pair.config.sink, pair.start):
            if frame not in pair.sim.forgotten:
                assert torch.equal(pair.window.history_page(frame), resident.window.history_page(frame))
        assert pair.window.bank is not None
        stats = pair.window.bank.stats()
        assert stats["damaged_pages"] == 0 and stats["forgotten_frames"] == len(pair.sim.forgotten)
        pair.window.bank.close()


def filled(blocks: int, folder: Path, which: int = 3, **sizes: Any) -> tuple[RecachePair, MemoryBank]:
    sizes = {"window": 8, "sink": 3, "top_k": 2, "recent_exclude": 0, "frames_per_block": 2} | sizes
    bank, slots = list(tiers(sizes, TENSORS, 60, folder))[which]
    pair = RecachePair(**sizes, **TENSORS, bank=bank, history_slots=slots)
    for _ in range(blocks):
        pair.block()
    assert pair.window.bank is not None
    return pair, pair.window.bank


@pytest.mark.parametrize("which", range(4))
def test_fetches_of_old_pages_are_dropped(which: int, tmp_path: Path) -> None:
    pair, bank = filled(8, tmp_path, which)
    dropped = 0
    for _ in range(12):
        pair.block()
        fetched = set(pair.window._history._fetched)  # type: ignore[attr-defined]
        chosen = sorted({f for row in pair.window.selected for f in row})
        for frame in chosen:
            pair.recache(frame, 1)
        pair.newest(8)
        dropped += len(fetched & set(chosen))
        # Once more, and the fetches that the first re-cache has dropped are not begun again before.
        pair.newest(4)
    assert dropped > 12
    pair.block()
    pair.compare_kept()
    assert bank.stats()["forgotten_frames"] == 0


@pytest.mark.parametrize("which", [None, 0, 3])
def test_memory_that_is_in_the_window_is_placed_anew(which: int | None, tmp_path: Path) -> None:
    """A page that the window already holds is of the old generation: it must be fetched, though it was not before."""
    pair = RecachePair(8, 3, 2, 0, 2, **TENSORS) if which is None else filled(0, tmp_path, which)[0]
    same = torch.ones(2, 2, 4)
    for _ in range(8):
        pair.block(same)
    held = pair.window.selected
    assert held == [[3, 4], [3, 4]] and not getattr(pair.window._history, "_fetched", None)
    pair.recache(4, 1)
    pair.newest(3)
    for _ in range(2):
        pair.block(same)
    pair.recache(3, 1)
    pair.newest(8)
    pair.block(same)
    assert pair.window.selected == held


def test_a_generation(tmp_path: Path) -> None:
    pair, bank = filled(12, tmp_path)
    index = bank.index
    assert index is not None
    before = [index.embeddings.clone(), index.ids.clone(), index.length.clone()]
    counts = {f: (bank.pins(f), bank.retrievals(f)) for f in bank.frames()}
    old = {f: pair.window.history_page(f) for f in range(3, pair.start)}
    selected = pair.window.selected
    pair.newest(6)
    assert bank.index is index and all(
        torch.equal(a, b) for a, b in zip(before, [index.embeddings, index.ids, index.length], strict=True)
    )
    assert counts == {f: (bank.pins(f), bank.retrievals(f)) for f in bank.frames()}
    assert pair.window.selected == selected
    for frame in range(pair.start):
        again = frame >= pair.start - 6
        assert bank.generation(frame) == int(again)
        if frame >= 3:
            assert torch.equal(pair.window.history_page(frame), old[frame]) != again
            if bank.slot(frame) >= 0:  # a device slot has what memory or disk has, or nothing
                assert torch.equal(pair.window.pool[:, :, :, bank.slot(frame)], pair.window.history_page(frame))
    pair.newest(2)
    pair.compare_kept()
    assert [bank.generation(pair.start - i) for i in range(1, 8)] == [2, 2, 1, 1, 1, 1, 0]
    pair.recache(0, 5)  # sink frames too
    pair.newest(8)
    assert [bank.generation(f) for f in range(7)] == [1, 1, 1, 1, 1, 0, 0]
    k, v = pair.sim.pages[1, 1, 2]
    page = pair.window.history_page(2)[1, :, 1]
    assert torch.equal(page[1].double(), v) and error_of(page[0], rotate(k, 0, pair.grid)) < 1e-5
    pair.block()


def test_a_generation_that_could_not_be_stored_can_be(tmp_path: Path) -> None:
    pair, bank = filled(12, tmp_path)
    qkv = [pair.qkv(6) for _ in range(2)]
    for layer in range(2):
        pair.window.recache(layer, *qkv[layer], pair.start - 6, pair.grid)
        pair.sim.recache(layer, *qkv[layer], pair.start - 6, pair.grid, False)
    with refusing(bank, "commit"):
        pair.window.finish_recache(pair.start - 6)
    pair.window.finish_recache(pair.start - 6)
    pair.sim.recached(pair.start - 6, 6, False)
    for _ in range(7):
        pair.block()
    pair.compare_kept()


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_quantised_pages_are_replaced(storage: str, tmp_path: Path) -> None:
    runs = []
    for folder in (None, tmp_path):
        record = record_bytes(TENSORS, storage)
        few = {"host_bytes": 8 * record, "disk_bytes": 60 * record, "spill": folder, "slab_bytes": record}
        bank = BankConfig(**({"host_bytes": 60 * record} if folder is None else few), storage=storage)
        pair = RecachePair(8, 3, 2, 0, 2, **TENSORS, bank=bank, history_slots=4)
        outs = []
        for block in range(20):
            outs += pair.forward(check=False)
            pair.finish()
            if block in (9, 13):
                q, k, v = pair.qkv(8)
                for layer in range(2):
                    outs.append(pair.window.recache(layer, q, k, v, pair.start - 8, pair.grid))
                pair.window.finish_recache(pair.start - 8)
                page = pair.window.history_page(pair.start - 5)[0, 1]
                assert error_of(page, v[:, 6:8]) < 0.2
        runs.append(outs)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


KINDS: dict[str, tuple[int | None, str]] = {
    "all kept": (None, "error"),
    "bounded": (60, "error"),
    "forgetful": (15, "forget"),
}


@pytest.mark.parametrize("kind", [*KINDS, 0, 1, 2, 3])
def test_what_is_forgotten_is_gone(kind: str | int, tmp_path: Path) -> None:
    sizes = {"window": 6, "sink": 1, "top_k": 2, "recent_exclude": 4, "frames_per_block": 2}
    if isinstance(kind, int):
        pair, _ = filled(0, tmp_path, kind, **sizes)
    else:
        slots, on_full = KINDS[kind]
        pair = RecachePair(**sizes, **TENSORS, history_slots=slots, on_full=on_full)
    bank = pair.window.bank

    def held() -> set[int]:
        return {f for f in range(1, pair.start) if (pair.window.history_slot(f) >= 0 if bank is None else f in bank)}

    for block in range(28):
        pair.block()
        pair.sim.forgotten = set(range(1, pair.start)) - held()
        if block == 15:
            there = held()
            assert pair.forget(1) == []
            assert pair.forget(22) == sorted(f for f in there if f < 22)
            assert pair.forget(22) == []
            pair.newest(5)  # of which the history has not lost any
        if block > 15:
            assert all(f >= 22 for row in pair.window.selected for f in row)
        if block == 18:
            assert any(pair.window.selected)
            pair.forget(pair.start)
            assert pair.window.selected == [[], []] and pair.window.stats()["history_frames"] == 0
            pair.newest(5)  # frames that only the window has
        if bank is not None:
            assert bank.frames() == [0, *sorted(held())]
            assert bank.index is not None and bank.index.frames() == bank.frames()
            assert not [f for f in range(1, 22) if block > 15 and (bank.pins(f) or bank.slot(f) >= 0)]
    assert pair.window.selected[0]
    pair.compare_kept()
