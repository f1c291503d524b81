"""Formulas of bytes, against the bytes of tensors of these sizes; and the rule that follows from them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig
from longlive_rag_ops.bank.page_format import PageFormat
from longlive_rag_ops.distributed.traffic import (
    FORWARDS,
    choose_transfer,
    frame_bytes,
    frames_kept,
    memory_held,
    merge_received,
    pages_received,
    part_row_bytes,
    part_rows_received,
    search_received,
    window_transfer,
)

WAN = {"tokens_per_frame": 1560, "head_dim": 128, "dtype": torch.bfloat16}
SMALL = PageFormat("plain", layers=30, samples=1, kv_heads=12, **WAN)  # type: ignore[arg-type]
LARGE = PageFormat("plain", layers=40, samples=1, kv_heads=40, **WAN)  # type: ignore[arg-type]
CONFIG = WindowConfig()


def form(storage: str = "plain", dtype: torch.dtype = torch.float32, **sizes: Any) -> PageFormat:
    return PageFormat(
        storage, dtype=dtype, **{"layers": 3, "samples": 2, "tokens_per_frame": 5, "kv_heads": 2, "head_dim": 8} | sizes
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pages_are_the_bytes_of_their_slots(dtype: torch.dtype) -> None:
    for storage in ("plain", "int8", "fp8"):
        pages = form(storage, dtype)
        slots = pages.slots(4, "cpu")  # which arrivals come into
        assert pages_received(pages, 4) == slots.nbytes == 4 * frame_bytes(pages)
        assert pages_received(pages, 4, own=1) == 3 * slots.nbytes // 4 and pages_received(pages, 4, own=4) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads"), [(6, 2), (7, 4)])
def test_parts_are_the_bytes_of_outputs_and_log_sum_exps(dtype: torch.dtype, tokens: int, heads: int) -> None:
    q = torch.zeros(2, tokens, heads, 8, dtype=dtype)
    out, lse = torch.ops.longlive.window_attend(q, torch.zeros(2, 2, 1, 5, 2, 8, dtype=dtype), run=1, return_lse=True)
    row = part_row_bytes(form(dtype=dtype), heads)
    assert tokens * row == out.nbytes + lse.nbytes
    assert part_rows_received(tokens, 1) == 0 and part_rows_received(tokens, 2) == tokens
    for ranks in range(3, 9):
        mine = torch.zeros(-(-tokens // ranks), row, dtype=torch.uint8)
        others = [mine] * (ranks - 1)
        assert part_rows_received(tokens, ranks) * row == 2 * sum(part.nbytes for part in others)
        assert part_rows_received(tokens, ranks) < 2 * (tokens + ranks)
    if tokens == 6:
        wanted = 4 * 3 * part_rows_received(3 * 5, 4) * row  # forwards, layers
        assert merge_received(form(dtype=dtype), 3, 4, 4, heads) == wanted


def test_a_search_gathers_numbers_and_scores() -> None:
    ids, scores = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6)
    assert search_received(form(), 6, 4) == 3 * (ids.nbytes + scores.nbytes)
    assert search_received(form(), 6, 4, 8) == 3 * (ids.nbytes + scores.double().nbytes)
    assert search_received(form(), 6, 1) == 0
    offer = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 16)
    assert search_received(form(), 6, 4, embedding_dim=16) == 3 * 6 * sum(part.nbytes for part in offer)


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
@pytest.mark.parametrize(("frames", "forwards"), [(1, 1), (3, 5), (3, 2)])
def test_the_rule_does_not_depend_on_the_number_of_ranks(ranks: int, frames: int, forwards: int) -> None:
    """And is what its docstring says."""
    for model, groups in itertools.product((SMALL, LARGE), (1, 2)):
        heads = groups * model.kv_heads
        even = frames * forwards * groups * (1 + 4 / 256)

        def chosen(arrivals: int, *, kind: PageFormat = model, q_heads: int = heads) -> str:
            given = {"frames": frames, "forwards": forwards, "ranks": ranks, "q_heads": q_heads}
            return choose_transfer(kind, arrivals=arrivals, **given)

        padded = 1.02 if ranks == 64 else 1.001  # tokens that 64 does not divide
        assert chosen(int(even)) == "pages" and chosen(int(even * padded) + 1) == "merge"
    assert choose_transfer(SMALL, arrivals=1000, frames=3, ranks=1) == "pages"  # nothing is moved by either


def test_worked_numbers() -> None:
    """Those of ``docs/scaling.md``."""
    assert SMALL.page_bytes == 9_584_640 and LARGE.page_bytes == 31_948_800
    assert frame_bytes(SMALL) == 287_539_200 and frame_bytes(LARGE) == 1_277_952_000
    assert [part_row_bytes(model) for model in (SMALL, LARGE)] == [3_120, 10_400]
    assert merge_received(SMALL, 3, FORWARDS, 2) == 150 * 4680 * 3120 == 2_190_240_000
    assert merge_received(SMALL, 3, FORWARDS, 4) == 3_285_360_000
    assert merge_received(LARGE, 3, FORWARDS, 2) == 9_734_400_000
    assert window_transfer(SMALL, CONFIG, 4) == window_transfer(LARGE, CONFIG, 2) == "pages"
    wide = WindowConfig(window=64, top_k=48)
    assert window_transfer(SMALL, wide, 4) == window_transfer(LARGE, wide, 2) == "merge"
    eight = PageFormat("int8", layers=30, samples=1, kv_heads=12, **WAN)  # type: ignore[arg-type]
    assert frame_bytes(eight) == 146_104_320 and window_transfer(eight, WindowConfig(window=40, top_k=28), 4) == "pages"


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_one_rank_holds_what_a_window_says(storage: str) -> None:
    config, pages = WindowConfig(6, 1, 2, 0, 2), form(storage)
    window = MemoryWindow(
        config,
        layers=3,
        batch=2,
        tokens_per_frame=5,
        kv_heads=2,
        head_dim=8,
        bank=BankConfig(host_bytes="4MiB", storage=storage),
    )
    for start in range(0, 12, 2):
        for layer in range(3):
            window.attend(layer, *torch.zeros(3, 2, 10, 2, 8), start, (1, 5))
        window.finish(start, torch.randn(2, 2, 16))
    held, expected = window.stats()["bytes"], memory_held(pages, config, history=12, embedding_dim=16)
    assert {name: held[name] for name in ("window", "staging")} == {n: expected[n] for n in ("window", "staging")}
    assert held["history_reserved"] == expected["slots"]
    bank = window.bank
    assert bank is not None and bank.index is not None
    stored = bank.stats()["host"]["bytes"]
    assert expected["history"] == 12 * pages.record_bytes == stored
    rows = bank.index.embeddings[:, :12].nbytes + bank.index.ids[:, :12].nbytes
    assert expected["index"] == rows and expected["arrivals"] == expected["parts"] == 0
    bank.close()


def test_many_ranks_hold_a_share() -> None:
    one = memory_held(SMALL, CONFIG, history=1001, embedding_dim=1024)
    four = memory_held(SMALL, CONFIG, history=1001, embedding_dim=1024, frame_ranks=2, head_ranks=2)
    assert frames_kept(1001, 2) == 501 and frames_kept(0, 2) == 0
    assert four["history"] * 2 == 501 * SMALL.record_bytes and one["history"] == 1001 * SMALL.record_bytes
    assert four["window"] * 2 == one["window"] and four["staging"] * 2 == one["staging"]
    assert four["arrivals"] == 6 * frame_bytes(SMALL) and four["slots"] == 3 * frame_bytes(SMALL)
    assert one["slots"] == 12 * frame_bytes(SMALL) and one["arrivals"] == 0
    assert four["arrivals"] == 6 * frame_bytes(SMALL) and four["parts"] == 0
    assert four["index"] == 501 * (1024 * 4 + 8)  # of all heads' ranks the same
    merge = memory_held(SMALL, CONFIG, history=1001, embedding_dim=1024, frame_ranks=4, transfer="merge")
    assert merge["arrivals"] == 0 and merge["parts"] == 5 * 4680 * 3120
    with pytest.raises(ValueError, match="head_ranks must divide kv_heads 12 and q_heads 12, got 5"):
        memory_held(SMALL, CONFIG, history=0, embedding_dim=1, head_ranks=5)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="own must be between 0 and 2, got 3"):
        pages_received(SMALL, 2, own=3)
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        part_rows_received(4, 0)
    with pytest.raises(TypeError, match="forwards must be an int, got float"):
        merge_received(SMALL, 3, 2.0, 2)  # type: ignore[arg-type]
