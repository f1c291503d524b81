"""Ranks of one machine for tests, on its CPU or a GPU each, run under a time-out that kills what hangs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longlive_rag_ops.distributed.sent_error import sent_error

LIMIT = 180.0  # seconds for all ranks together; a busy machine takes twenty to import torch
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class Ended(Exception):
    """A rank ended without a result."""


def device_type() -> str:
    """What the ranks of this process group compute on; the CPU without one."""
    return "cuda" if dist.is_initialized() and "nccl" in dist.get_backend_config() else "cpu"


def _rank_main(
    rank: int, ranks: int, folder: str, result: Connection, function: Callable[..., Any], args: Any, device: str
) -> None:
    torch.set_num_threads(1)
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        dist.init_process_group(BACKENDS[device], init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        outcome = True, function(rank, *args)
    except BaseException as error:
        error = sent_error(error)
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        outcome = False, error
    result.send_bytes(pickle.dumps(outcome))
    result.close()
    os._exit(0)  # what is under way to ranks that are gone must not keep the process


def _context() -> Any:
    """Processes are forked from a server that has imported torch once, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    # The second for functional collectives, whose first call imports it: two seconds in every rank.
    context.set_forkserver_preload(["torch.distributed", "torch._dynamo", "longlive_rag_ops.distributed.rank_share"])
    return context


def run_all(
    ranks: int, function: Callable[..., Any], *args: Any, limit: float = LIMIT, device: str = "cpu"
) -> list[tuple[bool, Any]]:
    """Runs ``function(rank, *args)`` in as many processes of one group: gloo's, or for ``cuda`` NCCL's with a GPU each.

    Skips the test where there are fewer GPUs.

    Returns:
        For each rank, whether it returned, and what: the result, the exception, or `Ended`.

    Raises:
        TimeoutError: the ranks did not all end within ``limit`` seconds; they are killed.
    """
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, there are {torch.cuda.device_count()}")
    context, outcomes, processes = _context(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        ends: dict[Any, int] = {}
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(rank, ranks, folder, theirs, function, args, device), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            ends[ours] = rank
        deadline = time.monotonic() + limit
        try:
            while ends:
                ready = wait(list(ends), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"ranks {sorted(ends.values())} of {function.__name__} took over {limit} s")
                for end in ready:
                    rank = ends.pop(end)
                    try:
                        outcomes[rank] = pickle.loads(end.recv_bytes())
                    except EOFError:
                        outcomes[rank] = False, Ended(f"rank {rank} ended without a result")
        finally:
            for process in processes:
                process.join(0 if ends else 10)
                if process.is_alive():
                    process.kill()
                    process.join()
    return [outcomes[rank] for rank in range(ranks)]


def run_ranks(
    ranks: int, function: Callable[..., Any], *args: Any, limit: float = LIMIT, device: str = "cpu"
) -> list[Any]:
    """As `run_all`; returns what each rank did, and raises what the first one that failed by itself raised."""
    outcomes = run_all(ranks, function, *args, limit=limit, device=device)
    failed = [outcome for worked, outcome in outcomes if not worked]
    # A rank that failed takes others with it, who are told by the name of their error.
    for error in sorted(failed, key=lambda error: type(error).__name__ in ("RankFailure", "Ended")):
        raise error
    return [outcome for _, outcome in outcomes]
