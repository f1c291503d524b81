"""Process groups of a mesh: made by ranks with other groups before, and given back."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import device_type, run_ranks
from shard_cases import compare, make_window
from torch.distributed.device_mesh import init_device_mesh

from longlive_rag_ops.distributed import MemoryMesh, RankFailure, process_groups
from longlive_rag_ops.distributed import mesh as mesh_module
from longlive_rag_ops.distributed.agreeing_ranks import AgreeingRanks


def own_group() -> Any:
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def unequal(rank: int) -> list[str]:
    whole = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("frames", "heads"))
    parts = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("replicas", "frames"))
    if rank == 1:
        group = own_group()
    # All ranks there are: that one has a group more does not matter.
    mesh = MemoryMesh(whole, timeout=30)
    assert [mesh.group.size(), mesh.frame_group.size(), mesh.head_group.size()] == [4, 2, 2]
    assert mesh.frame_peers == [rank % 2, rank % 2 + 2]
    everybody: list[Any] = [None] * 4
    dist.all_gather_object(everybody, rank, group=mesh.group)
    assert everybody == [0, 1, 2, 3]
    assert AgreeingRanks(mesh, "test", 30).gather(lambda: rank) == everybody
    # Some of them: an error that says so, where torch would wait for ever. Others are not concerned.
    began = time.monotonic()
    messages = []
    for name in ("first", "second"):
        if rank < 2:
            with pytest.raises(ValueError, match="equally many process groups") as caught:
                MemoryMesh(parts["frames"], timeout=30)
            messages.append(str(caught.value))
        else:
            mesh = MemoryMesh(parts["frames"], timeout=30)
            assert mesh.ranks == [2, 3], name
    if rank == 0:
        group = own_group()
    if rank < 2:
        mesh = MemoryMesh(parts["frames"], timeout=30)
        assert mesh.ranks == [0, 1]
        assert AgreeingRanks(mesh, "test", 30).gather(lambda: rank) == [0, 1]
        if rank == 1:
            group = own_group()
        with pytest.raises(ValueError, match="equally many process groups"):
            AgreeingRanks(mesh, "test", 20)
        assert group is not None
    assert time.monotonic() - began < 20
    # A rank that does not come is a failure within the time-out.
    if rank == 3:
        with pytest.raises(RankFailure, match=r"ranks \[2\] did not say how many process groups"):
            MemoryMesh(parts["frames"], timeout=1)
    return messages


def test_ranks_that_have_made_other_groups_before(device: str) -> None:
    first, second, *others = run_ranks(4, unequal, device=device)
    assert first == second and len(first) == 2 and others == [[], []]
    assert all(re.search(r"got (\d+) on rank 0, (?!\1 )\d+ on rank 1: ", message) for message in first), first


def threads(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def closed(rank: int) -> None:
    device_mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("frames",))
    before = set(dist.distributed_c10d._world.pg_map)
    for _ in range(2):  # again with new groups
        window = make_window(device_mesh)
        mesh = window.mesh
        assert make_window(device_mesh).mesh is mesh and threads("longlive-progress") == 1
        compare(mesh, blocks=8, transfer="pages")
        AgreeingRanks(mesh, "test", 30).gather(lambda: rank)
        assert len(set(dist.distributed_c10d._world.pg_map) - before) == 3
        mesh.close()
        mesh.close()
        assert threads("longlive-progress") == 0 and not mesh_module._wrapped
        assert set(dist.distributed_c10d._world.pg_map) == before
        with pytest.raises(RuntimeError, match="it was closed"):
            window.attend(0, *torch.zeros(3, 1, 8, 2, 8, device=device_type()), 0, (2, 2))
        window.bank.close()
    # A mesh that failed is made anew, and its groups stay.
    first = make_window(device_mesh).mesh
    first.collectives.fail_alone(OSError("disk"))
    second = make_window(device_mesh).mesh
    assert second is not first and threads("longlive-progress") == 1
    assert first.group in dist.distributed_c10d._world.pg_map
    (key,) = mesh_module._wrapped
    assert key[1] is dist.group.WORLD
    dist.barrier()
    dist.destroy_process_group()
    second.close()
    assert threads("longlive-progress") == 0 and not mesh_module._wrapped


def test_a_mesh_is_closed(device: str) -> None:
    run_ranks(2, closed, device=device)


def test_groups_of_some_ranks_do_not_split_the_worlds_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    """For which torch would wait for the other ranks, when ``init_process_group`` was given a device."""
    world, seen = SimpleNamespace(bound_device_id=torch.device("cuda", 3)), []
    monkeypatch.setattr(process_groups.distributed_c10d, "_get_default_group", lambda: world)
    monkeypatch.setattr(process_groups.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(process_groups.dist, "new_group", lambda *args, **options: seen.append(world.bound_device_id))
    process_groups.make_group([0, 1], 5.0, together=False)
    process_groups.make_group([0, 1], 5.0, together=True)
    assert seen == [None, torch.device("cuda", 3)] and world.bound_device_id == torch.device("cuda", 3)


def backstop(rank: int) -> None:
    """Groups whose own time-out ends the process get a longer one than ours."""
    limits = []

    def noted(*args: Any, timeout: timedelta, **options: Any) -> Any:
        limits.append(timeout.total_seconds())
        return made(*args, timeout=timeout, **options)

    made, dist.new_group = dist.new_group, noted
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("frames",))
    MemoryMesh(mesh, timeout=7)
    mesh_module.waits_on_stream = lambda group, device_type: True
    MemoryMesh(mesh, timeout=7)
    assert limits == [7, 14]


def test_groups_of_gpus_give_up_later() -> None:
    run_ranks(1, backstop)
