"""Process groups of ranks that may have made other groups before: torch takes names from how many each has made."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

COUNTS = "longlive/groups"


def is_world(ranks: Sequence[int]) -> bool:
    """Whether these are all ranks that there are."""
    return len(ranks) == dist.get_world_size()


def make_group(
    ranks: list[int], timeout: float, together: bool, backend: str | None = None
) -> dist.ProcessGroup | None:
    """A group; None where this rank is not in it.

    Args:
        ranks: ascending.
        timeout: seconds, the group's own.
        together: all ranks there are make it, in the same order as others. Else its own ranks alone, and then torch
            waits for ever for ranks that have not made equally many groups before: see `check_group_counts`.
        backend: the world's when not given.

    Raises:
        RuntimeError: a rank did not join in time.
    """
    with nullcontext() if together else _unbound():
        made = dist.new_group(
            ranks, timeout=timedelta(seconds=timeout), backend=backend, use_local_synchronization=not together
        )
    return made if dist.get_rank() in ranks else None


@contextmanager
def _unbound() -> Iterator[None]:
    """With ``init_process_group(device_id=...)`` torch makes a group by splitting the world's communicator, and waits
    for all ranks there are; beside a world that is bound to no device, a group gets a communicator of its own."""
    world = distributed_c10d._get_default_group()
    bound = world.bound_device_id
    if bound is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


def check_group_counts(ranks: list[int], timeout: float) -> None:
    """Compares how many process groups each of some ranks has made. All of them call it before they make one alone.

    Raises:
        ValueError: they differ; the same message on all of them.
        RuntimeError: a rank did not answer within ``timeout`` seconds.
    """
    store = distributed_c10d._get_default_store()
    rank = dist.get_rank()
    prefix = f"{COUNTS}/{'_'.join(map(str, ranks))}"
    turn = store.add(f"{prefix}/turns of {rank}", 1)  # how often these ranks have done this
    store.set(f"{prefix}/{turn}/{rank}", str(len(distributed_c10d._world.pg_names)))
    keys = [f"{prefix}/{turn}/{other}" for other in ranks]
    deadline = time.monotonic() + timeout
    while not store.check(keys):  # not `wait`, in which some stores cannot be interrupted
        if time.monotonic() > deadline:
            missing = [other for other, key in zip(ranks, keys, strict=True) if not store.check([key])]
            raise RuntimeError(f"ranks {missing} did not say how many process groups they have")
        time.sleep(0.01)
    counts = [int(store.get(key)) for key in keys]
    if len(set(counts)) > 1:
        found = ", ".join(f"{count} on rank {other}" for other, count in zip(ranks, counts, strict=True))
        raise ValueError(
            f"mesh must be of ranks that have made equally many process groups before, got {found}: torch names a "
            "group of some of all ranks by their number. Make the same groups on each of these ranks"
        )
