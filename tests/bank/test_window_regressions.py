"""Defects of the window over a bank, found by random runs, that must not come back."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_memory_bank import commit, make, on_disk_alone, spoil
from window_pair import one_thread, rejected

from longlive_rag_ops import BankConfig, MemoryBank, MemoryWindow, WindowConfig
from longlive_rag_ops.bank.contents import Lost

__all__ = ["one_thread"]
CONFIG = WindowConfig(window=5, sink=1, top_k=2, recent_exclude=0, frames_per_block=2)
SIZES = {"layers": 1, "batch": 2, "tokens_per_frame": 2, "kv_heads": 1, "head_dim": 16}


def attend(window: MemoryWindow, start: int, seed: int, grid: tuple[int, int] = (1, 2)) -> torch.Tensor:
    q, k, v = torch.randn(3, 2, 4, 1, 16, generator=torch.Generator().manual_seed(seed)).unbind(0)
    return window.attend(0, q, k, v, start, grid)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
def test_embeddings_may_change_their_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The index keeps the first one's; a bank compares with the newest frame as the index will have it."""
    windows = [MemoryWindow(CONFIG, **SIZES, bank=bank) for bank in (None, BankConfig(host_bytes="1MiB"))]
    generator = torch.Generator().manual_seed(1)
    for block in range(10):
        start = 2 * block
        assert torch.equal(*(attend(window, start, block) for window in windows))
        embeddings = torch.randn(2, 2, 6, generator=generator, dtype=torch.float64).to(dtypes[block % 2])
        for window in windows:
            window.finish(start, embeddings)
        assert windows[0].selected == windows[1].selected
        assert windows[0].selected_scores == windows[1].selected_scores
    assert all(len(row) == 2 for row in windows[0].selected)


FORKS = """
import os, signal, sys, torch
from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig

torch.set_num_threads(1)  # torch's own threads do not survive a fork, either

def run(window, blocks):
    for start in range(2 * blocks.start, 2 * blocks.stop, 2):
        q, k, v = torch.randn(3, 1, 4, 1, 16).unbind(0)
        window.attend(0, q, k, v, start, (1, 2))
        window.finish(start, torch.randn(1, 2, 6))

def make():
    config = WindowConfig(window=5, sink=1, top_k=2, recent_exclude=0, frames_per_block=2)
    bank = BankConfig(host_bytes=6 * 4096, disk_bytes=30 * 4096, spill=sys.argv[2])
    return MemoryWindow(config, layers=1, batch=1, tokens_per_frame=2, kv_heads=1, head_dim=16, bank=bank)

window = make()
run(window, range(8))
child = os.fork()
if child == 0:
    signal.alarm(30)
    assert window.bank.closed
    for use in (window.bank.frames, window.bank.flush, lambda: run(window, range(8, 9))):
        try:
            use()
            os._exit(3)
        except RuntimeError as error:
            assert "fork" in str(error), error
    if sys.argv[1] == "close":
        window.bank.close()
    if sys.argv[1] == "drop":
        del window
    run(make(), range(8))  # a child may have banks of its own
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
run(window, range(8, 14))
assert window.bank.stats()["hits_disk"] > 0
print("well")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("ending", ["exit", "close", "drop"])
def test_a_forked_child_leaves_the_bank_alone(ending: str, tmp_path: Path) -> None:
    """It has none of the bank's threads: ending the bank there would crash or wait for ever."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, ending, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_bank_is_not_copied(duplicate: Callable[[object], object]) -> None:
    window = MemoryWindow(CONFIG, **SIZES, bank=BankConfig(host_bytes="1MiB"))
    with rejected("MemoryBank", "copied", "pickled", "save"):
        duplicate(window.bank)
    if duplicate is not copy.copy:  # which copies nothing of the window's
        with rejected("MemoryBank", "copied", "pickled", "save"):
            duplicate(window)
    attend(window, 0, 0)


def damaged_fetch(folder: Path) -> tuple[MemoryBank, int]:
    """A bank, and a frame that is being fetched although its pages are damaged."""
    bank = make(6, 12, folder, device_slots=3)
    for start in range(0, 12, 3):
        commit(bank, range(start, start + 3))
    bank.flush()
    frame = on_disk_alone(bank)[0]
    spoil(folder, bank.format.page_bytes)
    bank.prefetch([frame])
    return bank, frame


def test_a_damaged_frame_is_reported_once(tmp_path: Path) -> None:
    """Also when a fetch and a read have both met it."""
    bank, frame = damaged_fetch(tmp_path)
    while frame in bank:
        time.sleep(0.001)
    with pytest.warns(RuntimeWarning) as caught:
        bank._lose(Lost(frame, "damaged: layer 0, sample 0: met"))  # as `record` does, when it is not too late
        assert [lost for lost, _ in bank.settle()] == [frame]
    assert [f"frame {frame} is lost" in str(warning.message) for warning in caught] == [True]
    assert bank.stats()["forgotten"]["damaged"] == 1


def test_a_save_leaves_out_what_a_fetch_has_found_damaged(tmp_path: Path) -> None:
    """The index still has the frame until the fetch is settled; what was saved could not be opened."""
    bank, frame = damaged_fetch(tmp_path)
    while frame in bank:
        time.sleep(0.001)
    spoil(tmp_path, bank.format.page_bytes)  # makes the other frames right again
    assert bank.index is not None and frame in bank.index
    assert bank.save(tmp_path / "saved") == []
    with MemoryBank.open(tmp_path / "saved", BankConfig(host_bytes="1MiB")) as saved:
        assert saved.index is not None and saved.frames() == saved.index.frames()
        assert saved.frames() == [other for other in range(12) if other != frame]


@pytest.mark.parametrize("policy", ["oldest", "least_retrieved", "most_redundant"])
def test_the_least_bank_with_a_policy_never_fails(policy: str) -> None:
    """It spares the frames of the finished block's fetch beside those of the next, in many small blocks."""
    config = WindowConfig(window=7, sink=1, top_k=3, recent_exclude=0, frames_per_block=1)
    sizes = {**SIZES, "tokens_per_frame": 4}
    least = 1 + 6 + 2 * 6  # sink, what is too new, the choice of two samples and the one before
    with rejected("host_bytes", str(least), str(least - 1)):
        MemoryWindow(config, **sizes, bank=BankConfig(host_bytes=(least - 1) * 8192, policy=policy))
    window = MemoryWindow(config, **sizes, bank=BankConfig(host_bytes=least * 8192, policy=policy))
    generator = torch.Generator().manual_seed(3)
    for start in range(150):
        attend(window, start, start, (2, 2))
        window.finish(start, torch.randn(2, 1, 6, generator=generator))
        assert all(len(row) == 3 for row in window.selected) or start < 10
    assert window.stats()["forgotten_frames"] == 150 - least
