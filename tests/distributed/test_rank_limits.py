"""What one rank alone cannot hold, or cannot make, is found when the window is made, on all ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import device_type, run_ranks
from shard_cases import GRID, HEADS, LAYERS, Blocks, make_mesh, make_window

from longlive_rag_ops import MemoryWindow
from longlive_rag_ops.bank import MemoryBank
from longlive_rag_ops.distributed import MemoryMesh

RECORD = LAYERS * 4096
RECENT = 6


def of_one_rank(stream: Blocks, block: int, ranks: int) -> torch.Tensor:
    """Embeddings by which all that is chosen is one rank's: frames that ``deal`` in turn gives it look alike."""
    found = torch.zeros(1, stream.frames, 6)
    for at in range(stream.frames):
        frame = stream.frames * block + at
        own = (frame - 1) % ranks == 0
        found[0, at, :2] = torch.tensor([1.0, 0.0] if own else [0.9, 0.1 * (frame % 5 + 1)])
    return found.to(device_type())


def made(mesh: MemoryMesh, records: int, transfer: str, **bank: Any) -> MemoryWindow:
    options = {"host_bytes": records * RECORD, "slab_bytes": RECORD, "policy": "oldest"} | bank
    return make_window(mesh, bank_options=options, recent_exclude=RECENT, transfer=transfer)


def least_limits(rank: int, transfer: str) -> None:
    """The least limits that are accepted hold a video whose choices are all one rank's; less is refused at once."""
    mesh = make_mesh([2], ["frames"])
    for records in range(7, 20):
        try:
            window = made(mesh, records, transfer)
        except (RuntimeError, ValueError) as error:
            assert "must hold at least" in str(error) or "host_bytes must be at least" in str(error)
            continue
        break
    stream = Blocks()
    for block in range(40):
        for layer in range(LAYERS):
            window.attend(layer, *stream.qkv(), block * stream.frames, GRID)
        window.finish(block * stream.frames, of_one_rank(stream, block, 2))
    chosen = [frame for row in window.selected for frame in row]
    assert len({mesh.owner(frame, 1) for frame in chosen}) == 1 and window.stats()["forgotten_frames"] > 20
    window.bank.close()


@pytest.mark.parametrize("transfer", ["pages", "merge"])
def test_all_that_is_chosen_is_one_ranks(device: str, transfer: str) -> None:
    run_ranks(2, least_limits, transfer, device=device)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_window_that_is_refused_leaves_no_bank_open(ranks: int) -> None:
    run_ranks(ranks, refused, ranks)


def refused(rank: int, ranks: int) -> None:
    banks: list[MemoryBank] = []
    original = MemoryBank.__init__

    def noted(bank: MemoryBank, *args: Any, **options: Any) -> None:
        original(bank, *args, **options)
        banks.append(bank)

    MemoryBank.__init__ = noted  # type: ignore[method-assign]
    options = {"host_bytes": 11 * RECORD, "slab_bytes": RECORD, "policy": "oldest"}
    with pytest.raises((RuntimeError, ValueError), match="must hold at least"):
        make_window(make_mesh([ranks], ["frames"]) if ranks > 1 else None, bank_options=options, recent_exclude=RECENT)
    assert [bank.closed for bank in banks] == [True]


def one_rank_fails(rank: int, folder: Path) -> None:
    mesh = make_mesh([2], ["frames"], timeout=30.0)
    spill = folder / f"spill{rank}"
    if rank == 0:
        spill.mkdir()
    began = time.monotonic()
    disk = {"disk_bytes": 2**20, "shard_bytes": 2**16, "spill": spill}
    expected, about = (ValueError, "spill") if rank else (RuntimeError, "window could not be made on rank 1: .*spill")
    with pytest.raises(expected, match=about):
        made(mesh, 32, "pages", **disk)
    assert time.monotonic() - began < 20  # not the time-out
    spill.mkdir(exist_ok=True)
    window = made(mesh, 32, "pages", **disk)  # and again, corrected
    q, k, v = Blocks().qkv(HEADS)
    assert window.attend(0, q, k, v, 0, GRID).isfinite().all()
    window.bank.close()


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path, device: str) -> None:
    run_ranks(2, one_rank_fails, tmp_path, device=device)


def slots_of_pages(rank: int) -> None:
    mesh = make_mesh([2], ["frames"])
    window = make_window(mesh, transfer="pages")
    stream = Blocks()
    for block in range(8):
        for layer in range(LAYERS):
            window.attend(layer, *stream.qkv(), block * stream.frames, GRID)
        window.finish(block * stream.frames, stream.embeddings())
    arrived = [frame for frame in range(16) if window.history_slot(frame) >= 0]
    assert arrived
    began = time.monotonic()
    window.forget(20_000_000)  # costs what there is, not what is named
    assert time.monotonic() - began < 0.5 + 5 * (device_type() == "cuda")
    assert not any(window.history_slot(frame) >= 0 for frame in range(16)) and window.selected == [[]]
    window.reset()
    assert not any(window.history_slot(frame) >= 0 for frame in range(16))
    window.bank.close()


def test_frames_that_are_gone_have_no_slot(device: str) -> None:
    run_ranks(2, slots_of_pages, device=device)
