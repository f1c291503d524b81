"""A recorded trace through ranks of this machine that share the history by frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..bank.config import BankConfig
from ..replay import BlockResult, replay
from ..traces import load_trace
from .local_ranks import run_on_local_ranks
from .mesh import MemoryMesh

AMPLE = 2**40  # bytes; host memory is taken as it is needed


def replay_on_ranks(path: Path, ranks: int, engine: str = "auto", transfer: str = "auto") -> list[BlockResult]:
    """Runs a trace as `replay.replay` does, in as many processes.

    Args:
        path: of the trace.
        ranks: processes.
        engine, transfer: as `MemoryWindow` takes them.

    Returns:
        A result a block: the choice of a rank that chose other frames than were recorded, where one did; the largest
        error of all ranks.

    Raises:
        ValueError: the trace retrieves nothing, so that there is no history to share.
        RankFailure: a process has died or has not answered.
    """
    if load_trace(path).config["top_k"] == 0:
        raise ValueError(f"trace {path}: top_k is 0: nothing is retrieved, and ranks have nothing to share")
    of_ranks = run_on_local_ranks(ranks, replay_rank, path, engine, transfer, what=f"replay of {path}")
    return [worst_of(list(blocks)) for blocks in zip(*of_ranks, strict=True)]


def replay_rank(path: Path, engine: str, transfer: str) -> list[BlockResult]:
    """One rank's results; all ranks there are call it."""
    mesh = MemoryMesh(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("frames",)))
    bank = BankConfig(host_bytes=AMPLE, slab_bytes="16MiB")
    return list(replay(load_trace(path), engine, bank=bank, mesh=mesh, transfer=transfer))


def worst_of(results: list[BlockResult]) -> BlockResult:
    """One block's results of all ranks in one; an error that is not a number counts most."""
    chosen = next((result.chosen for result in results if not result.same_choice), results[0].chosen)
    errors = [result.error for result in results]
    return replace(results[0], chosen=chosen, error=next((error for error in errors if error != error), max(errors)))
