"""Defects of the window over a bank, found by random runs, that must not come back."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from window_pair import one_thread, rejected

from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig

__all__ = ["one_thread"]
CONFIG = WindowConfig(window=5, sink=1, top_k=2, recent_exclude=0, frames_per_block=2)
SIZES = {"layers": 1, "batch": 2, "tokens_per_frame": 2, "kv_heads": 1, "head_dim": 16}


def attend(window: MemoryWindow, start: int, seed: int) -> torch.Tensor:
    q, k, v = torch.randn(3, 2, 4, 1, 16, generator=torch.Generator().manual_seed(seed)).unbind(0)
    return window.attend(0, q, k, v, start, (1, 2))


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
