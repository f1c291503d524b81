"""A window whose history is spread over ranks: choices, window and outputs are those of one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import device_type, run_ranks
from shard_cases import (
    CONFIG,
    DEALS,
    GRID,
    HEAD_DIM,
    HEADS,
    LAYERS,
    TOKENS,
    Blocks,
    compare,
    make_mesh,
    make_window,
    own_heads,
    tolerance,
)
from torch.distributed.device_mesh import init_device_mesh

from longlive_rag_ops import BankConfig, MemoryWindow
from longlive_rag_ops.bank.contents import Lost
from longlive_rag_ops.distributed import MemoryMesh
from longlive_rag_ops.distributed.lost_frames import LostFrames
from longlive_rag_ops.distributed.side_stream import SideStream
from longlive_rag_ops.distributed.traffic import memory_held

KINDS: list[dict[str, Any]] = [
    {"kind": "random"},
    {"kind": "repeated", "batch": 2},
    {"kind": "nan", "batch": 2},
    {"min_score": 0.2},
    {"diversity": 0.5, "batch": 2},
    {"diversity": 0.3, "kind": "repeated"},
    {"diversity": 0.3, "kind": "nan", "min_score": -0.1},
]


def by_frame(rank: int, deals: list[str], cases: list[dict[str, Any]]) -> None:
    for deal in deals:
        mesh = make_mesh([2], ["frames"], deal)
        for case in cases:
            window = compare(mesh, transfer="pages", exact=True, **case)
            assert window.transfer == "pages"
            window.bank.close()


def test_by_frame(device: str) -> None:
    run_ranks(2, by_frame, ["in turn"], KINDS, device=device)


def held(rank: int) -> None:
    for transfer in ("pages", "merge"):
        window = make_window(make_mesh([2], ["frames"]), transfer=transfer)
        form = window.bank.format
        want = memory_held(form, window.config, history=0, embedding_dim=6, frame_ranks=2, transfer=transfer)
        got = window.stats()["bytes"]
        assert (got["history_reserved"], got["arrivals"]) == (want["slots"], want["arrivals"])
        window.bank.close()


def test_what_a_rank_holds(device: str) -> None:
    run_ranks(2, held, device=device)


def ahead_of_the_device(rank: int, folder: Path) -> None:
    """The order of calls on a GPU, whose host is ahead of it: pages are on their way when ``finish`` returns, also with
    a disk, and no rank's loss is asked about twice."""
    SideStream.on_host = property(lambda stream: False)  # type: ignore[assignment]
    asked: list[int] = []
    agree = LostFrames.agree

    def noted(lost: LostFrames, start: int, named: Any) -> Any:
        asked.append(start)
        return agree(lost, start, named)

    LostFrames.agree = noted  # type: ignore[method-assign]
    record = 2 * LAYERS * TOKENS * HEADS * HEAD_DIM * 4
    spill = folder / str(rank)
    spill.mkdir()
    disk = {"host_bytes": 16 * 4096 + record, "disk_bytes": 2**20, "shard_bytes": 2**16, "spill": spill}
    for names in (["frames"], ["heads"]):
        mesh = make_mesh([2], names)
        for transfer in ("pages", "merge") if names == ["frames"] else ("auto",):
            exact = transfer == "pages"
            for early in (False, True):
                asked.clear()
                window = compare(mesh, transfer=transfer, early=early, bank_options=disk, exact=exact)
                assert window._history._sent and len(asked) == len(set(asked)) == 12
                window.bank.close()
                window = compare(mesh, transfer=transfer, early=early, exact=exact)
                assert names == ["heads"] or window._history._sent
                window.bank.close()


def test_the_order_of_calls_ahead_of_a_device(tmp_path: Path) -> None:
    run_ranks(2, ahead_of_the_device, tmp_path)


def other_ways(rank: int) -> None:
    mesh = make_mesh([2], ["frames"])
    for transfer in ("pages", "merge"):
        exact = transfer == "pages"
        compare(mesh, transfer=transfer, exact=exact, jitter=0.01)  # ranks come in any order
        compare(mesh, transfer=transfer, exact=exact, early=True, forwards=2, jitter=0.01)
        compare(mesh, transfer=transfer, exact=exact, dtype=torch.float64, agreement=False, blocks=8)
        with torch.inference_mode():
            compare(mesh, transfer=transfer, exact=exact, blocks=8)
    compare(mesh, transfer="pages", exact=True, dtype=torch.bfloat16, batch=2)


def test_ranks_that_come_late_and_other_dtypes(device: str) -> None:
    run_ranks(2, other_ways, device=device)


def test_by_frame_uneven_empty_and_single_frame_shards(device: str) -> None:
    run_ranks(2, by_frame, list(DEALS), KINDS[1:5:3], device=device)


def by_head(rank: int) -> None:
    mesh = make_mesh([2], ["heads"])
    for case in ({"batch": 2}, {"bank": None, "batch": 2}, {"bank_options": {"storage": "int8"}}, {"diversity": 0.5}):
        window = compare(mesh, **case)
        assert window.transfer is None
        assert window.pool.shape[5] == 1
    with pytest.raises(ValueError, match="q_weight and k_weight"):
        window.attend(0, *Blocks().qkv(1), 24, GRID, q_weight=torch.ones(HEAD_DIM, device=device_type()))
    with pytest.raises(ValueError, match=r"multiple of the mesh's ranks along its heads \(2\), got 3"):
        make_window(mesh, kv_heads=3)


def test_by_head(device: str) -> None:
    run_ranks(2, by_head, device=device)


def by_both(rank: int) -> None:
    mesh = make_mesh([2, 2], ["frames", "heads"])
    assert (mesh.frame_rank, mesh.head_rank) == (rank // 2, rank % 2)
    compare(mesh, transfer="pages", batch=2, kind="repeated")
    compare(mesh, transfer="merge", batch=2)
    compare(make_mesh([2, 2], ["heads", "frames"]), transfer="pages", diversity=0.5)
    # Two slices of a larger mesh are two memories.
    whole = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("replicas", "frames"))
    part = MemoryMesh(whole["frames"])
    assert part.ranks == [rank // 2 * 2, rank // 2 * 2 + 1]
    compare(part, seed=rank // 2, blocks=8)
    with pytest.raises(ValueError, match=r"of a larger mesh, pass a slice: mesh\['frames', 'heads'\]"):
        MemoryMesh(whole)


def test_by_frame_and_head(device: str) -> None:
    run_ranks(4, by_both, device=device)


def by_frame_of_four(rank: int) -> None:
    mesh = make_mesh([4], ["frames"])
    compare(mesh, transfer="pages", batch=2, kind="nan")
    compare(mesh, transfer="merge", batch=2, kind="repeated")


def test_by_frame_of_four(device: str) -> None:
    run_ranks(4, by_frame_of_four, device=device)


def storage(rank: int, folder: str) -> None:
    mesh = make_mesh([2], ["frames"])
    record = 2 * 4096 * 2  # of two layers and samples
    disk = {"host_bytes": 12 * record, "disk_bytes": 2**22, "spill": folder, "shard_bytes": 2**16}
    for transfer in ("pages", "merge"):
        for kind in ("int8", "fp8"):
            compare(mesh, transfer=transfer, batch=2, bank_options={"storage": kind})
        compare(mesh, transfer=transfer, batch=2, bank_options=disk)
        compare(mesh, transfer=transfer, early=True, forwards=2)
        compare(mesh, transfer=transfer, position_rule="absolute", batch=2)
    compare(mesh, transfer="pages", early=True, bank_options=disk, diversity=0.5)


def test_storage_tiers_and_early_search(tmp_path: Path, device: str) -> None:
    run_ranks(2, storage, str(tmp_path), device=device)


def merged(rank: int, deals: list[str], cases: list[dict[str, Any]]) -> None:
    for deal in deals:
        mesh = make_mesh([2], ["frames"], deal)
        for case in cases:
            assert compare(mesh, transfer="merge", **case).transfer == "merge"


def test_merged(device: str) -> None:
    run_ranks(2, merged, list(DEALS), KINDS[:5:2], device=device)


def bookkeeping(rank: int) -> None:
    mesh = make_mesh([2], ["frames"])
    window = compare(mesh, transfer="pages", forwards=2)
    stats = window.stats()
    total = 24 - CONFIG["sink"]
    assert stats["blocks"] == 12 and abs(stats["history_frames"] - total / 2) <= 0.5
    page = window.bank.format.record_bytes
    held = window.bank.stats()["host"]["bytes"]
    assert abs(held - 24 / 2 * page) <= page
    assert window.history_page(1 + rank).shape == (LAYERS, 2, 1, TOKENS, HEADS, HEAD_DIM)
    with pytest.raises(KeyError, match="kept by frame rank"):
        window.history_page(2 - rank)
    # A new video gives the same results.
    window.reset()
    fresh = make_window(mesh, transfer="pages")
    stream, again = Blocks(seed=3), Blocks(seed=3)
    for block in range(10):
        for layer in range(LAYERS):
            out = window.attend(layer, *stream.qkv(), 2 * block, GRID)
            assert torch.equal(out, fresh.attend(layer, *again.qkv(), 2 * block, GRID))
        window.finish(2 * block, stream.embeddings())
        fresh.finish(2 * block, again.embeddings())
    assert window.selected == fresh.selected
    mine = window.forget(6)
    assert all(1 <= frame < 6 for frame in mine) and not {f for row in window.selected for f in row} & set(range(6))
    with pytest.raises(ValueError, match="bank must be given where 2 ranks share the frames"):
        make_window(mesh, bank=None)
    with pytest.raises(ValueError, match="transfer must be one of"):
        make_window(mesh, transfer="all")
    with pytest.raises(ValueError, match="of 2 ranks must hold at least"):
        make_window(mesh, window=31, top_k=2, bank=BankConfig(host_bytes=10 * 8192))


def test_bookkeeping(device: str) -> None:
    run_ranks(2, bookkeeping, device=device)


def one_rank(rank: int) -> None:
    for names in (["frames"], ["heads"]):
        compare(make_mesh([1], names), batch=2, exact=True)
        compare(make_mesh([1], names), bank=None, exact=True)
    compare(make_mesh([1, 1], ["frames", "heads"]), kind="nan", exact=True)
    mesh = init_device_mesh(device_type(), (1,), mesh_dim_names=("frames",))
    window = make_window(mesh, bank=None)
    assert window.mesh is make_window(mesh).mesh
    compare(make_mesh([1], ["frames"]), top_k=0, bank=None)
    for sizes, name, message in (((1,), ("dp",), "names 'frames' and 'heads'"), ((1,), None, "no names")):
        with pytest.raises(ValueError, match=message):
            MemoryMesh(init_device_mesh(device_type(), sizes, mesh_dim_names=name))
    with pytest.raises(TypeError, match="DeviceMesh or a MemoryMesh, got int"):
        make_window(2)
    with pytest.raises(ValueError, match="timeout"):
        make_mesh([1], ["frames"], timeout=0)


def test_one_rank_is_no_mesh(device: str) -> None:
    run_ranks(1, one_rank, device=device)


def test_it_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, longlive_rag_ops; assert not any('.distributed.' in m for m in sys.modules if 'longlive' in m)"
    subprocess.run([sys.executable, "-c", code + "; longlive_rag_ops.distributed.MemoryMesh"], check=True)


def no_retrieval(rank: int) -> None:
    mesh = make_mesh([2], ["frames"])
    assert compare(mesh, top_k=0, bank=None).transfer is None


def test_no_retrieval(device: str) -> None:
    run_ranks(2, no_retrieval, device=device)


def encoded_again(rank: int, folder: str) -> None:
    mesh = make_mesh([2], ["frames"])
    record = 2 * 4096
    disk = {"host_bytes": 12 * record, "disk_bytes": 2**22, "spill": folder, "shard_bytes": 2**16}
    for transfer, bank_options in (("pages", {}), ("pages", disk), ("merge", {}), ("merge", disk)):
        windows = (
            make_window(mesh, transfer=transfer, bank_options=bank_options),
            make_window(None, bank_options=bank_options),
        )
        run_encoding_again(windows)
        for window in windows:
            window.bank.close()


def run_encoding_again(windows: tuple[MemoryWindow, MemoryWindow]) -> None:
    """Two windows with everything that may happen beside attention and finishing; they must stay the same."""
    shared, alone = windows
    stream = Blocks()

    def same(call: Callable[..., torch.Tensor], *args: Any) -> None:
        out, want = call(shared, *args), call(alone, *args)
        assert float((out - want).abs().max()) <= tolerance()

    for block in range(16):
        start = 2 * block
        rewritten = stream.qkv()[1:]
        for layer in range(LAYERS):
            same(lambda window, *args: window.attend(*args), layer, *stream.qkv(), start, GRID)
            if block == 9:  # the block before, in the local part still
                for window in windows:
                    window.rewrite(layer, *rewritten, start - 2, GRID)
        if block % 3 == 0:  # a search that is made again with other embeddings, in the middle of the clean forward
            for embeddings in (stream.embeddings(), stream.embeddings()):
                for window in windows:
                    window.retrieve(start, embeddings)
                same(lambda window, *args: window.attend(*args), 0, *stream.qkv(), start, GRID)
            for window in windows:
                window.finish(start)
        else:
            embeddings = stream.embeddings()
            for window in windows:
                window.finish(start, embeddings)
        assert shared.selected == alone.selected and shared.selected_scores == alone.selected_scores
        if block in (8, 13):
            # All the window holds; among them are frames that were chosen, and their pages were under way.
            last, frames = start + 2, 9 if block == 8 else 4
            q, k, v = (torch.cat(parts, 1) for parts in zip(*(stream.qkv() for _ in range(5)), strict=True))
            qkv = [part[:, : frames * TOKENS] for part in (q, k, v)]
            for layer in range(LAYERS):
                same(lambda window, *args: window.recache(*args), layer, *qkv, last - frames, GRID)
            for window in windows:
                window.finish_recache(last - frames)
        if block == 11:
            mine, all_of_them = shared.forget(7), alone.forget(7)
            assert set(mine) == {frame for frame in all_of_them if shared._history.keeps(frame)}
            assert shared.selected == alone.selected


def test_frames_that_are_encoded_again(tmp_path: Path, device: str) -> None:
    run_ranks(2, encoded_again, str(tmp_path), device=device)


def lost_pages(rank: int, folder: str) -> None:
    """A page that cannot be read on one rank is left out on all."""
    record = 4096 * LAYERS
    least = {"host_bytes": 6 * record, "disk_bytes": 2**22, "spill": folder, "shard_bytes": 2**16}
    for sizes, names, transfer in (
        ([2, 1], ["frames", "heads"], "pages"),
        ([2], ["frames"], "merge"),
        ([2], ["heads"], "auto"),
        ([1, 2], ["frames", "heads"], "auto"),
    ):
        mesh = make_mesh(sizes, names)
        window, stream = make_window(mesh, transfer=transfer, bank_options=least), Blocks()
        settle = window.bank.settle
        lost: list[int] = []

        def losing(settle: Any = settle, lost: list[int] = lost, window: MemoryWindow = window) -> Any:
            found = list(settle())
            fetched = sorted(window._history._fetched)
            if not lost and rank == 1 and len(window.bank.frames()) > 6 and fetched:
                lost.append(fetched[0])
                window.bank.release([fetched[0]])
                window.bank.unpin([fetched[0]])
                window.bank.forget([fetched[0]])
                found.append(Lost(fetched[0], "damaged: by this test"))
            return found

        window.bank.settle = losing
        seen: list[set[int]] = []
        for block in range(14):
            for layer in range(LAYERS):
                window.attend(layer, *own_heads(mesh, *stream.qkv()), 2 * block, GRID)
            seen.append(set(window.selected[0]))
            window.finish(2 * block, stream.embeddings())
        everybody: list[Any] = [None, None]
        dist.all_gather_object(everybody, (lost, seen))
        assert everybody[0][1] == everybody[1][1]
        (gone,) = everybody[1][0]
        assert gone not in seen[-1] and gone not in window.bank.frames()
        window.bank.close()


def test_pages_that_are_lost_on_one_rank(tmp_path: Path, device: str) -> None:
    run_ranks(2, lost_pages, str(tmp_path), device=device)
