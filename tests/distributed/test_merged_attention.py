"""Attention over parts of a window that several ranks hold: joined, it is that of one window."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import device_type, run_all, run_ranks
from torch.distributed.device_mesh import init_device_mesh

from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig
from longlive_rag_ops.bank.page_format import PageFormat
from longlive_rag_ops.config import POSITION_RULES
from longlive_rag_ops.distributed import MemoryMesh, RankFailure, merged_attention
from longlive_rag_ops.distributed.merged_attention import (
    attend_merged,
    frames_of_others,
    merge_over_ranks,
    merged_arguments,
    pack_part,
    retrieve_attend_merged,
    unpack_parts,
)
from longlive_rag_ops.distributed.traffic import merge_received, part_row_bytes, part_rows_received

CONFIG = WindowConfig(9, 2, 4, 1, 2)
SMALL = WindowConfig(6, 1, 3, 0, 2)  # has memory from its fifth block on
SIZES: dict[str, Any] = {"layers": 2, "batch": 2, "tokens_per_frame": 3, "kv_heads": 2, "head_dim": 8}
GRID, HEADS = (1, 3), 4
SECONDS = 240  # for ranks that compile
DEALS: dict[str, Callable[[int, int], int]] = {
    "in turn": lambda frame, ranks: (frame - CONFIG.sink) % ranks,
    "all to the last": lambda frame, ranks: ranks - 1,
    "one to the first": lambda frame, ranks: 0 if frame == 4 else ranks - 1,
    "scattered": lambda frame, ranks: (frame * frame + frame // 3) % ranks,
}


def tolerance(dtype: torch.dtype = torch.float32) -> float:
    """A GPU sums parts of other sizes in other orders."""
    allowed = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    return 10 * allowed if device_type() == "cuda" and dtype != torch.bfloat16 else allowed


class Ranks:
    """One whole window, and one for each of some ranks, that keeps of a choice what is dealt to it."""

    def __init__(
        self, which: Sequence[int], ranks: int, deal: str, config: WindowConfig = CONFIG, *, seed: int = 0, **sizes: Any
    ) -> None:
        self.config, self.sizes = config, {"dtype": torch.float32, "device": device_type(), **SIZES, **sizes}
        self.which, self.ranks = which, ranks
        self.owner = lambda frame: DEALS[deal](frame, ranks)
        self.whole = MemoryWindow(config, **self.sizes)
        self.windows = [MemoryWindow(config, **self.sizes) for _ in which]
        self.generator = torch.Generator().manual_seed(seed)
        self.start = 0
        self.chosen = torch.full((self.sizes["batch"], config.top_k), -1)

    def random(self, *shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)  # the same on every device
        return drawn.to(self.sizes["device"], self.sizes["dtype"])

    def qkv(self, n: int) -> tuple[torch.Tensor, ...]:
        shape = self.sizes["batch"], n * self.sizes["tokens_per_frame"]
        own = self.sizes["kv_heads"], self.sizes["head_dim"]
        return self.random(*shape, HEADS, own[1]), self.random(*shape, *own), self.random(*shape, *own)

    def others(self, rank: int, n: int) -> list[int]:
        return frames_of_others(self.config, self.start, n, self.chosen.tolist(), self.owner, self.ranks, rank)

    def finish(self, n: int) -> None:
        """The block is over on all sides; every rank then leaves what it does not keep out of the choice."""
        embeddings = self.random(self.sizes["batch"], n, 4)
        for window in (self.whole, *self.windows):
            window.finish(self.start, embeddings)
        self.chosen = self.whole._history.chosen.clone()
        everything = {frame for row in self.chosen.tolist() for frame in row if frame >= 0}
        for rank, window in zip(self.which, self.windows, strict=True):
            window._history._leave_out({frame for frame in everything if self.owner(frame) != rank})
        self.start += n


def off_by(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max())


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_of_all_ranks_make_the_whole(dtype: torch.dtype, ranks: int, deal: str) -> None:
    side = Ranks(range(ranks), ranks, deal, dtype=dtype)
    empty = most = 0
    for block in range(14):
        n = 1 if block % 5 == 4 else 2
        for layer in range(2):
            q, k, v = side.qkv(n)
            want, want_lse = side.whole.attend(layer, q, k, v, side.start, GRID, return_lse=True)
            parts, attended = [], []
            for rank, window in enumerate(side.windows):
                left = side.others(rank, n)
                rotated = window.write(layer, q, k, v, side.start, GRID)
                parts.append(window.attend_written(layer, rotated, exclude=left, return_lse=True))
                held = window.window_frames
                attended.append([[f for f in row if f not in left] for row in held])
                empty += bool((parts[-1][1] == -torch.inf).any())
            for sample, row in enumerate(side.whole.window_frames):  # each frame by one rank
                assert sorted(itertools.chain.from_iterable(rank[sample] for rank in attended)) == sorted(row)
            most = max(most, *(sum(map(len, rank)) for rank in attended))
            packed = torch.stack([pack_part(*part) for part in parts])
            assert packed.shape == (ranks, n * 3, 2, HEADS, packed.shape[-1])
            outs, lses = unpack_parts(packed, dtype)
            assert torch.equal(outs, torch.stack([out for out, _ in parts]))
            assert torch.equal(lses, torch.stack([lse for _, lse in parts]))
            out, lse = torch.ops.longlive.merge_attention(outs, lses)
            assert off_by(out, want) <= tolerance(dtype) and off_by(lse, want_lse) <= tolerance(dtype)
        side.finish(n)
    assert bool(empty) == (ranks > 2)  # the first block has two frames
    if deal == "in turn" and ranks == 2:
        assert most <= 2 * 5 + 1


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("sizes", [(6, 0, 3, 0, 2), (12, 1, 6, 5, 3), (5, 2, 2, 1, 1)])
def test_other_windows(rule: str, sizes: tuple[int, ...]) -> None:
    config = WindowConfig(*sizes, position_rule=rule)
    side = Ranks(range(3), 3, "scattered", config)
    for _ in range(12):
        n = config.frames_per_block
        q, k, v = side.qkv(n)
        parts = []
        for layer in range(2):
            want = side.whole.attend(layer, q, k, v, side.start, GRID)
            parts = [
                window.attend_written(
                    layer,
                    window.write(layer, q, k, v, side.start, GRID),
                    exclude=side.others(rank, n),
                    return_lse=True,
                )
                for rank, window in enumerate(side.windows)
            ]
            out, _ = torch.ops.longlive.merge_attention(*(torch.stack(x) for x in zip(*parts, strict=True)))
            assert off_by(out, want) <= 1e-6
        side.finish(n)


def test_frames_are_dealt_to_whom_the_choice_gives_least() -> None:
    config = WindowConfig(12, 1, 6, 5, 3)

    def left(chosen: list[list[int]], ranks: int, owner: Callable[[int], int]) -> list[list[int]]:
        return [frames_of_others(config, 60, 3, chosen, owner, ranks, rank) for rank in range(ranks)]

    fixed = [0, *range(58, 63)]
    one = [[2, 3, 4, 5, 6, 7]]
    assert left(one, 2, lambda frame: 0) == [fixed, []]  # six chosen here, the six others there
    even = left(one, 2, lambda frame: frame % 2)
    assert [len(fixed) - len(frames) for frames in even] == [3, 3]
    assert left(one, 1, lambda frame: 0) == [[]]
    assert left([[-1] * 6], 2, lambda frame: 0) == [[58, 60, 62], [0, 59, 61]]
    skewed = left([[2, 3, 4, -1, -1, -1], [2, 3, 9, 8, -1, -1]], 3, lambda frame: 0 if frame < 9 else 2)
    assert [len(fixed) - len(frames) for frames in skewed] == [0, 3, 3]  # 6, 0 + 6 and 1 + 6 pages
    for frames in (skewed, even):
        assert sorted(f for rank in frames for f in fixed if f not in rank) == fixed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_packing_keeps_every_bit(dtype: torch.dtype) -> None:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    out = torch.randint(-(2**15), 2**15, (2, 5, 3, 8 * dtype.itemsize // 2), dtype=torch.int16).view(dtype)
    lse_type = torch.float64 if dtype == torch.float64 else torch.float32
    lse = torch.randint(-(2**15), 2**15, (2, 3, 5 * lse_type.itemsize // 2), dtype=torch.int16).view(lse_type)
    rows = pack_part(out, lse)
    assert rows.dtype == torch.int32 and rows.is_contiguous() and rows.shape[:3] == (5, 2, 3)
    form = PageFormat("plain", 1, 2, 1, 3, out.shape[3], dtype)
    assert rows[0].nbytes == part_row_bytes(form)
    outs, lses = unpack_parts(rows[None], dtype)
    assert torch.equal(outs[0].contiguous().view(words[dtype.itemsize]), out.view(words[dtype.itemsize]))
    bits = words[lse_type.itemsize]
    assert torch.equal(lses[0].contiguous().view(bits), lse.view(bits))


def everybodys(value: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value.contiguous())
    return found


def _rank_attends(rank: int, ranks: int) -> None:
    mesh = MemoryMesh(init_device_mesh(device_type(), (ranks,), mesh_dim_names=("frames",)), timeout=30)
    group = mesh.frame_group
    assert group is not None
    received = [0]

    def counted(name: str) -> Callable[..., torch.Tensor]:
        collective = getattr(merged_attention, name)

        def call(rows: torch.Tensor, *rest: Any) -> torch.Tensor:
            found = collective(rows, *rest)
            received[0] += found.nbytes - found.nbytes // ranks  # the rest is this rank's own
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_gather", "_swap"):
            patch.setattr(merged_attention, name, counted(name))
        for dtype, collectives, deal in (
            (torch.float32, mesh.collectives, "in turn"),
            (torch.float64, None, "all to the last"),
            (torch.bfloat16, mesh.collectives, "scattered"),
        ):
            side = Ranks([rank], ranks, deal, SMALL, dtype=dtype)
            (window,) = side.windows
            form = PageFormat("plain", 2, 2, 3, 2, 8, dtype)
            for block in range(8):
                n = 1 if block % 4 == 3 else 2
                received[0] = 0
                for forward, layer in itertools.product(range(2), range(2)):
                    q, k, v = side.qkv(n)
                    want, want_lse = side.whole.attend(layer, q, k, v, side.start, GRID, return_lse=True)
                    left = side.others(rank, n)
                    out, lse = attend_merged(
                        *(window, layer, q, k, v, side.start, GRID),
                        exclude=left,
                        group=group,
                        collectives=collectives,
                    )
                    assert out.is_contiguous() and lse.is_contiguous()
                    assert off_by(out, want) <= tolerance(dtype) and off_by(lse, want_lse) <= tolerance(dtype)
                    if forward:
                        for value in (out, lse):
                            assert all(torch.equal(value, other) for other in everybodys(value))
                assert received[0] == merge_received(form, n, 2, ranks, HEADS)
                side.finish(n)
    # One rank's part is the whole; and rounding goes with rank order, however the tokens are split.
    generator = torch.Generator().manual_seed(5)
    outs = torch.randn(ranks, 2, 7, HEADS, 8, generator=generator).to(device_type())
    lses = 3 * torch.randn(ranks, 2, HEADS, 7, generator=generator).to(device_type())
    lses[0, :, :, 2:] = -torch.inf
    lses[:, 1, :, 3] = -torch.inf
    want, want_lse = torch.ops.longlive.merge_attention(outs, lses)
    out, lse = merge_over_ranks(outs[rank], lses[rank], group)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert out[1, 3].eq(0).all() and lse[1, :, 3].eq(-torch.inf).all()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_attend_as_one(ranks: int, device: str) -> None:
    run_ranks(ranks, _rank_attends, ranks, device=device)


def _rank_compiles(rank: int, ranks: int, backend: str) -> None:
    import torch._inductor.config as inductor_config  # here: it takes a second

    mesh = MemoryMesh(init_device_mesh(device_type(), (ranks,), mesh_dim_names=("frames",)), timeout=60)
    group = mesh.frame_group
    generator = torch.Generator().manual_seed(1)
    grid, sizes = (1, 2), SIZES | {"tokens_per_frame": 2}  # a block's tokens are no multiple of three ranks
    inductor_config.compile_threads = 1  # no pool of processes in every rank, each of which imports torch
    bank = BankConfig(host_bytes="4MiB")
    whole, *windows = (
        MemoryWindow(SMALL, **sizes, bank=bank, device=device_type(), **on)
        for on in ({}, *2 * [{"mesh": mesh, "transfer": "merge"}])
    )
    eager, traced = windows

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: list[dict[str, Any]]) -> torch.Tensor:
        for layer in arguments:
            q = q + retrieve_attend_merged(q, k, v, group, **layer)[0]
        return q

    fast = torch.compile(step, backend=backend, fullgraph=True)
    for start in range(0, 14, 2):
        q, k, v = (torch.randn(2, 4, count, 8, generator=generator).to(device_type()) for count in (HEADS, 2, 2))
        got = fast(q, k, v, [merged_arguments(traced, layer, start, grid) for layer in range(2)])
        outs = []
        for window in (whole, eager):
            outs.append(q)
            for layer in range(2):
                outs[-1] = outs[-1] + window.attend(layer, outs[-1], k, v, start, grid)
        assert off_by(got, outs[0]) <= 2 * tolerance() and off_by(outs[1], outs[0]) <= 2 * tolerance()
        embeddings = torch.randn(2, 2, 4, generator=generator).to(device_type())
        for window in (whole, *windows):
            window.finish(start, embeddings)
        assert traced.selected == whole.selected and (start < 8 or traced.selected[0])
    torch.testing.assert_close(traced.pool, eager.pool, rtol=tolerance(), atol=tolerance())
    for window in (whole, *windows):
        assert window.bank is not None
        window.bank.close()


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [("aot_eager", 2), pytest.param("inductor", 3, marks=pytest.mark.slow)],  # they exchange, they join a slice each
)
def test_it_traces(backend: str, ranks: int, device: str) -> None:
    run_ranks(ranks, _rank_compiles, ranks, backend, limit=SECONDS, device=device)


def _rank_has_a_window(rank: int, ranks: int, heads: int) -> None:
    """What the window makes of it: a bank a rank, of the frames that are dealt to it."""
    shape = (ranks // heads, heads)
    device_mesh = init_device_mesh(device_type(), shape, mesh_dim_names=("frames", "heads"))
    config = WindowConfig(9, 1, 5, 0, 2)
    generator = torch.Generator().manual_seed(3)
    for deal, storage, transfer in (("scattered", "plain", "merge"), ("all to the last", "int8", "auto")):
        if transfer == "auto":
            config = WindowConfig(30, 1, 26, 0, 2)  # of which more is chosen than a block's parts weigh
        mesh = MemoryMesh(device_mesh, timeout=30, deal=lambda frame, deal=deal: DEALS[deal](frame, shape[0]))
        bank = BankConfig(host_bytes="4MiB", storage=storage)
        whole = MemoryWindow(config, **SIZES, bank=bank, device=device_type())
        window = MemoryWindow(config, **SIZES, bank=bank, device=device_type(), mesh=mesh, transfer=transfer)
        assert window.transfer == "merge"
        # What would give this rank's part alone is refused, and leaves the window as it was.
        with pytest.raises(RuntimeError, match=r"distributed\.merged_attention\.merged_arguments, .*transfer='pages'"):
            window.arguments(0, 0, GRID)
        with pytest.raises(RuntimeError, match=r"attend_written gives this rank's part .*transfer='pages'"):
            window.attend_written(0, torch.zeros(2, 6, HEADS // heads, 8, device=device_type()))
        own = [slice(mesh.head_rank * (n // heads), (mesh.head_rank + 1) * (n // heads)) for n in (HEADS, 2, 2)]
        retrieved = 0
        for block in range(14 if transfer == "merge" else 22):
            n = 1 if block % 5 == 3 else 2
            start = whole._blocks.expected
            for _, layer in itertools.product(range(2 if block % 2 else 1), range(2)):
                drawn = [torch.randn(2, 3 * n, count, 8, generator=generator) for count in (HEADS, 2, 2)]
                qkv = [x.to(device_type()) for x in drawn]
                want, want_lse = whole.attend(layer, *qkv, start, GRID, return_lse=True)
                mine = [x[:, :, part] for x, part in zip(qkv, own, strict=True)]
                out, lse = window.attend(layer, *mine, start, GRID, return_lse=True)
                assert (
                    off_by(out, want[:, :, own[0]]) <= tolerance() and off_by(lse, want_lse[:, own[0]]) <= tolerance()
                )
            assert window.selected == whole.selected and window.selected_scores == whole.selected_scores
            retrieved += sum(map(len, window.selected))
            embeddings = torch.randn(2, n, 4, generator=generator).to(device_type())
            if block % 2:
                window.retrieve(start, embeddings)
                window.finish(start)
            else:
                window.finish(start, embeddings)
            whole.finish(start, embeddings)
        assert retrieved > 30
        for closed in (whole, window):
            assert closed.bank is not None
            closed.bank.close()


@pytest.mark.parametrize(("ranks", "heads"), [(2, 1), (4, 2)])
def test_a_window_of_ranks_is_one_window(ranks: int, heads: int, device: str) -> None:
    run_ranks(ranks, _rank_has_a_window, ranks, heads, device=device)


def _rank_dies(rank: int, ranks: int) -> None:
    mesh = MemoryMesh(init_device_mesh(device_type(), (ranks,), mesh_dim_names=("frames",)), timeout=60)
    out, lse = torch.zeros(1, 4, 1, 8, device=device_type()), torch.zeros(1, 1, 4, device=device_type())
    group = mesh.frame_group
    assert group is not None
    merge_over_ranks(out, lse, group, collectives=mesh.collectives)
    dist.barrier()
    mesh.collectives.timeout = 3
    if rank == 1:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RankFailure, match="parts of attention"):
        while True:  # at once, but where a stream waits for the other rank: then the host hears of it when time is over
            merge_over_ranks(out, lse, group, collectives=mesh.collectives)
            time.sleep(0.1)
    with pytest.raises(RankFailure, match="any more"):
        merge_over_ranks(out, lse, group, collectives=mesh.collectives)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_dies_is_an_error_for_the_others(ranks: int, device: str) -> None:
    outcomes = run_all(ranks, _rank_dies, ranks, device=device)
    assert [worked for worked, _ in outcomes] == [True, False, True][:ranks], outcomes


def test_what_is_not_allowed_is_named() -> None:
    group: Any = None
    with pytest.raises(ValueError, match="exclude"):
        merged_arguments(MemoryWindow(SMALL, **SIZES), 0, 0, GRID)
    with pytest.raises(TypeError, match="out"):
        merge_over_ranks(torch.zeros(1, 2, 1, 8, dtype=torch.int64), torch.zeros(1, 1, 2), group)
    with pytest.raises(ValueError, match="lse"):
        merge_over_ranks(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 2), group)
    with pytest.raises(ValueError, match="even number of channels, got 7"):
        merge_over_ranks(torch.zeros(1, 2, 1, 7), torch.zeros(1, 1, 2), group)
    assert part_rows_received(7, 1) == 0
