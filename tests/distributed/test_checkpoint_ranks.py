"""What some ranks save opens on others, with the bytes of one process's bank; an error of one rank is everybody's."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_cases import (
    FRAMES,
    comparable,
    flip_pages,
    held,
    limits,
    one_bank,
    page_file,
    page_format,
    share,
    shared_bank,
)
from rank_processes import Ended, run_all, run_ranks
from shard_cases import GRID, LAYERS, Blocks, make_window, own_heads
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from longlive_rag_ops.bank import BankConfig, DamagedPage, MemoryBank
from longlive_rag_ops.distributed import MemoryMesh, RankFailure, checkpoint, load, save
from longlive_rag_ops.distributed.checkpoint_plans import BankSavePlanner
from longlive_rag_ops.distributed.head_rows import head_rows, row_bytes

SHAPES = ((2, 2), (2, 1), (1, 2), (1, 1))


def mesh_of(rank: int, shape: tuple[int, int]) -> MemoryMesh | None:
    """A mesh of the first ranks; None on the others, which have nothing to do with it.

    Of one rank, every rank has one of its own: torch numbers process groups that some ranks make by how many a rank has
    made, and ranks that have not made equally many cannot make another.
    """
    count, names = shape[0] * shape[1], ("frames", "heads")
    meshes = [
        DeviceMesh("cpu", first + torch.arange(count).reshape(shape), mesh_dim_names=names)
        for first in (range(dist.get_world_size()) if count == 1 else [0])
    ]
    mesh = meshes[rank if count == 1 else 0]
    return MemoryMesh(mesh, timeout=30) if rank < count or count == 1 else None


def expect(rank: int, kind: type[BaseException], text: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        assert text in str(error), f"rank {rank}: {error}"
    else:
        raise AssertionError(f"rank {rank}: no {kind.__name__}")


def _every_pair(rank: int, folder: Path) -> None:
    warnings.simplefilter("error", RuntimeWarning)
    meshes = {shape: mesh_of(rank, shape) for shape in SHAPES}
    taking_part = {shape: mesh if rank < shape[0] * shape[1] else None for shape, mesh in meshes.items()}
    for storage in ("plain", "int8"):
        whole = one_bank(storage)
        form = page_format(storage)
        for shape, mesh in taking_part.items():
            path = folder / f"{storage}-{shape}"
            if mesh is not None:
                with shared_bank(mesh, whole) as bank:
                    assert save(bank, path, mesh=mesh, settings={"shape": list(shape)}) == []
            dist.barrier()
            written = [file.name for file in path.glob("data-*/__*")]
            # Nothing is written twice, and every rank writes what it has.
            assert len(written) == shape[0] + FRAMES * shape[1]
            assert {name.split("_")[2] for name in written} == {str(at) for at in range(shape[0] * shape[1])}
        for saved, opened in itertools.product(SHAPES, SHAPES):
            mesh = taking_part[opened]
            if mesh is not None:
                path = folder / f"{storage}-{saved}"
                mine, frames = share(mesh, whole)
                with load(path, limits(mine), mesh=mesh, format=form, settings={"shape": list(saved)}) as bank:
                    assert bank.format == mine
                    assert held(bank) == comparable(frames), f"{storage}: {saved} -> {opened}"
                    indexed = [] if bank.index is None else bank.index.frames()
                    assert indexed == [frame for frame, found in frames.items() if found[2] is not None]
        if rank == 0:  # and one process without others
            with load(folder / f"{storage}-(2, 2)", limits(form), format=form) as bank:
                assert held(bank) == held(whole)
        dist.barrier()


def test_every_pair_of_meshes(tmp_path: Path) -> None:
    run_ranks(4, _every_pair, tmp_path)


def _as_dtensors(rank: int, folder: Path) -> None:
    """`torch.distributed.checkpoint` alone reads the entries, sharded over heads."""
    mesh = mesh_of(rank, (1, 2))
    assert mesh is not None
    with one_bank("int8") as whole, shared_bank(mesh, whole) as bank:
        save(bank, folder / "saved", mesh=mesh)
        form = bank.format
        entries = {
            f"pages.{frame}": DTensor.from_local(
                torch.zeros(form.kv_heads, row_bytes(form), dtype=torch.uint8), mesh.mesh["heads"], [Shard(0)]
            )
            for frame in bank.frames()
        }
        (data,) = (folder / "saved").glob("data-*")
        dcp.load(entries, checkpoint_id=data)
        for frame in bank.frames():
            want = head_rows(form, bank.record(frame), frame, bank.generation(frame), rank * form.kv_heads)
            assert torch.equal(entries[f"pages.{frame}"].to_local(), want)


def test_entries_are_what_dtensors_would_be(tmp_path: Path) -> None:
    run_ranks(2, _as_dtensors, tmp_path)


def _one_rank_fails(rank: int, folder: Path) -> None:
    """Errors of one rank are everybody's, and the state saved before stays."""
    path = folder / "saved"
    by_heads, by_frames = mesh_of(rank, (1, 2)), mesh_of(rank, (2, 1))
    assert by_heads is not None and by_frames is not None
    with one_bank() as whole, one_bank(seed=1) as other, shared_bank(by_heads, whole) as bank:
        save(bank, path, mesh=by_heads)
        want = held(bank)
        with shared_bank(by_heads, other) as changed:
            original = BankSavePlanner.resolve_data
            if rank == 1:

                def full(self: Any, item: Any) -> Any:
                    if item.index.fqn == "pages.6":
                        raise OSError(28, "No space left on device", "somewhere")
                    return original(self, item)

                BankSavePlanner.resolve_data = full  # type: ignore[method-assign]
            expect(rank, OSError, "No space left on device", lambda: save(changed, path, mesh=by_heads))
            BankSavePlanner.resolve_data = original  # type: ignore[method-assign]
        with load(path, limits(bank.format), mesh=by_heads) as opened:
            assert held(opened) == want
        dist.barrier()
        assert sum(1 for _ in path.glob("data-*")) == 1

        # Banks that do not fit together
        with shared_bank(by_heads, whole) as changed:
            if rank == 1:
                changed.forget([7])
            expect(
                rank,
                ValueError,
                "ranks 0 and 1, which differ in frames [7]",
                lambda: save(changed, path, mesh=by_heads),
            )
        expect(rank, ValueError, "got frame 0 on ranks 0 and 1", lambda: save(bank, path, mesh=by_frames))
        with MemoryBank(bank.format, limits(bank.format), sink=rank) as changed:
            expect(
                rank, ValueError, "the same sink on all ranks, got 0 on rank 0, 1 on rank 1",
                lambda: save(changed, path, mesh=by_heads),
            )  # fmt: skip
        if rank == 1:
            bank.close()
        expect(rank, RuntimeError, "is closed", lambda: save(bank, path, mesh=by_heads))

        # Limits of one rank
        form = share(by_heads, whole)[0]
        room = limits(form, 1 if rank else None)
        expect(rank, ValueError, "host_bytes must be at least", lambda: load(path, room, mesh=by_heads))
        room = limits(form, 8 if rank else 7, policy="oldest")
        options = {"mesh": by_heads, "frames_per_commit": 1}
        expect(rank, ValueError, "got 7 and 8 of 11 frames", lambda: load(path, room, **options))
        with load(path, limits(form, 7, policy="oldest"), **options) as opened:
            assert opened.frames() == [0, 1, 6, 7, 8, 9, 10]
        expect(
            rank,
            ValueError,
            "heads ranks that divide the saved 4 kv_heads, got 3",
            lambda: load_by_three(path, by_heads),
        )


def load_by_three(path: Path, mesh: MemoryMesh) -> None:
    shape = mesh.head_ranks
    mesh.head_ranks = 3
    try:
        load(path, limits(page_format()), mesh=mesh)
    finally:
        mesh.head_ranks = shape


def test_errors_of_one_rank_are_everybodys(tmp_path: Path) -> None:
    run_ranks(2, _one_rank_fails, tmp_path)


def _one_rank_makes_no_bank(rank: int, folder: Path) -> None:
    """The bank that a rank has made is closed when another rank fails to make its own."""
    mesh, made = mesh_of(rank, (1, 2)), []
    assert mesh is not None
    with one_bank() as whole, shared_bank(mesh, whole) as bank:
        save(bank, folder / "saved", mesh=mesh)

    class Noted(MemoryBank):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)  # nobody else closes it

    checkpoint.MemoryBank = Noted  # type: ignore[misc]
    config = limits(bank.format, 1 if rank else None)
    expect(rank, ValueError, "host_bytes must be at least", lambda: load(folder / "saved", config, mesh=mesh))
    assert [bank.closed for bank in made] == ([] if rank else [True])


def test_a_rank_that_makes_no_bank(tmp_path: Path) -> None:
    run_ranks(2, _one_rank_makes_no_bank, tmp_path)


def _damaged(rank: int, folder: Path) -> None:
    """A page that one rank cannot read is left out by all that share its frame."""
    path, mesh = folder / "saved", mesh_of(rank, (1, 2))
    assert mesh is not None
    with one_bank() as whole, shared_bank(mesh, whole) as bank:
        save(bank, path, mesh=mesh)
        want = held(bank)
    if rank == 1:
        flip_pages(page_file(path, 3, 1))
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with load(path, limits(bank.format), mesh=mesh) as opened:
            assert held(opened) == {frame: found for frame, found in want.items() if frame != 3}
            assert opened.stats()["forgotten"]["damaged"] == 1
    (message,) = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    assert "damaged frames lost 1: frame 3: heads 2: their checksums do not match" in message or "heads 3" in message
    if rank == 0:
        (path / "checkpoint.json").write_text("{}")
    dist.barrier()
    expect(rank, ValueError, "is no checkpoint of a bank", lambda: load(path, limits(bank.format), mesh=mesh))


def test_damage_that_one_rank_finds(tmp_path: Path) -> None:
    run_ranks(2, _damaged, tmp_path)


def _damaged_in_a_bank(rank: int, folder: Path) -> None:
    """Saving finds it on one rank; all give the frame up, so that they go on choosing alike."""
    mesh = mesh_of(rank, (1, 2))
    assert mesh is not None
    with one_bank() as whole, shared_bank(mesh, whole) as bank:
        if rank == 1:
            original = bank.record

            def record(frame: int, out: torch.Tensor | None = None) -> torch.Tensor:
                if frame == 5:
                    bank.forget([5])  # as a damaged page does
                    raise DamagedPage("frame 5 is damaged: layer 0, sample 0: checksum")
                return original(frame, out)

            bank.record = record  # type: ignore[method-assign]
        with pytest.warns(RuntimeWarning, match="frames left out 1: frame 5"):
            assert [frame for frame, _ in save(bank, folder / "saved", mesh=mesh)] == [5]
        assert 5 not in bank and len(bank) == FRAMES - 1


def test_damage_that_a_save_finds(tmp_path: Path) -> None:
    run_ranks(2, _damaged_in_a_bank, tmp_path)


def differences(found: dict[int, tuple[Any, ...]], wanted: dict[int, tuple[Any, ...]]) -> list[str]:
    """What differs of frames, by name."""
    parts = ("pages", "generation", "embedding", "retrievals")
    differ = [f"frames {sorted(found.keys() ^ wanted.keys())}"] if found.keys() != wanted.keys() else []
    for frame in found.keys() & wanted.keys():
        for name, mine, theirs in zip(parts, found[frame], wanted[frame], strict=True):
            if mine != theirs:
                shown = f" {mine}, not {theirs}" if isinstance(mine, int) else ""
                differ.append(f"{name} of frame {frame}{shown}")
    return differ


def _windows(rank: int, folder: Path, storage: str) -> None:
    """Windows over a mesh save what one process's window has in its bank; that opens on another mesh."""
    by_frames, by_heads = mesh_of(rank, (2, 1)), mesh_of(rank, (1, 2))
    assert by_frames is not None and by_heads is not None
    bank_options = {"storage": storage}
    alone, stream = make_window(None, bank_options=bank_options), Blocks(kind="nan")
    shared = [make_window(mesh, bank_options=bank_options) for mesh in (by_frames, by_heads)]
    for start in range(0, 24, stream.frames):
        for layer in range(LAYERS):
            qkv = stream.qkv()
            for window in (alone, *shared):
                window.attend(layer, *own_heads(window.mesh, *qkv), start, GRID)
        embeddings = stream.embeddings()
        for window in (alone, *shared):
            window.finish(start, embeddings)
    assert alone.bank is not None
    config = BankConfig(host_bytes=2**22, slab_bytes=2**16, storage=storage)
    assert shared[1].bank is not None
    # By frame, pages are one process's bit for bit; by head, keys are so but for how a CPU's vectors round a rotation.
    cases = [
        (shared[0], None, held(alone.bank)),
        (shared[0], by_heads, comparable(share(by_heads, alone.bank)[1])),
        (shared[1], by_heads, held(shared[1].bank)),
    ]
    for window, mesh, wanted in cases:
        save(window, folder / "saved")
        with load(folder / "saved", config, mesh=mesh, format=alone.bank.format) as bank:
            differ = differences(held(bank), wanted)
            assert not differ, differ
        dist.barrier()


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_windows(tmp_path: Path, storage: str) -> None:
    run_ranks(2, _windows, tmp_path, storage)


def _dies(rank: int, folder: Path) -> None:
    """A rank that is killed while it saves: the other fails in time, and what was saved before opens."""
    path, mesh = folder / "saved", mesh_of(rank, (1, 2))
    assert mesh is not None
    with one_bank() as whole, one_bank(seed=1) as other, shared_bank(mesh, whole) as bank:
        save(bank, path, mesh=mesh)
        with shared_bank(mesh, other) as changed:
            if rank == 1:
                BankSavePlanner.resolve_data = lambda *_: os._exit(7)  # type: ignore[method-assign]
            expect(rank, RankFailure, "failed among ranks [0, 1]", lambda: save(changed, path, mesh=mesh, timeout=20))
        with load(path, limits(whole.format)) as opened:
            assert held(opened) == held(whole)
        assert save(other, path) == []  # by this process alone: the lock is free again
        assert sum(1 for _ in path.glob("data-*")) == 1


def test_a_rank_that_dies(tmp_path: Path) -> None:
    (worked, error), (_, ended) = run_all(2, _dies, tmp_path)
    assert worked, error
    assert isinstance(ended, Ended)
