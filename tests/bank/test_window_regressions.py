"""Defects of the window over a bank, found by random runs, that must not come back."""

from __future__ import annotations

import pytest
import torch
from window_pair import one_thread

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
