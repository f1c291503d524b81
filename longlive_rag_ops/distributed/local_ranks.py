"""Ranks that a command starts by itself on one machine, as gloo processes, and ends again whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from .failure import RankFailure
from .sent_error import sent_error


def run_on_local_ranks(
    ranks: int, function: Callable[..., Any], *args: Any, limit: float = 3600.0, what: str = "ranks of this machine"
) -> list[Any]:
    """What ``function(*args)`` returns in each of as many new processes, in rank order.

    In each, ``torch.distributed`` is initialised with gloo, and torch has its share of the CPU's cores.

    Args:
        function: of a module, since the processes import it; likewise picklable are ``args`` and what it returns.
        limit: seconds for all of it.
        what: they do, for errors.

    Raises:
        RankFailure: a process ended without a result, or they did not all end in time. None is left.
        Exception: what the function raised in the first of the processes in which it did.
    """
    context = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + limit
    processes, rank_of = [], {}
    outcomes: dict[int, tuple[bool, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="longlive_ranks") as folder:
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main, args=(rank, ranks, folder, theirs, function, args), daemon=True
                )
                process.start()
                theirs.close()
                processes.append(process)
                rank_of[ours] = rank
            while rank_of and all(worked for worked, _ in outcomes.values()):
                ready = wait(list(rank_of), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RankFailure(
                        f"{what}: ranks {sorted(rank_of.values())} did not end within {limit:g} s",
                        sorted(rank_of.values()),
                    )
                for end in ready:
                    assert isinstance(end, Connection)
                    rank = rank_of.pop(end)
                    try:
                        outcomes[rank] = pickle.loads(end.recv_bytes())
                    except EOFError:
                        outcomes[rank] = False, RankFailure(f"{what}: rank {rank} ended without a result", [rank])
        finally:
            for process in processes:
                if len(outcomes) == ranks:
                    process.join(5)
                process.kill()
                process.join()
    failed = [value for _, (worked, value) in sorted(outcomes.items()) if not worked]
    # A rank that fails by itself takes others with it, who say so by the type of their error.
    for error in sorted(failed, key=lambda error: isinstance(error, RankFailure)):
        raise error
    return [outcomes[rank][1] for rank in range(ranks)]


def _rank_main(
    rank: int, ranks: int, folder: str, result: Connection, function: Callable[..., Any], args: Sequence[Any]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    outcome: tuple[bool, Any]
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        outcome = True, function(*args)
    except BaseException as error:
        outcome = False, sent_error(error)
    result.send_bytes(pickle.dumps(outcome))
    result.close()
    os._exit(0)  # what is under way to ranks that are gone must not keep the process
