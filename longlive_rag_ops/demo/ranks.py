"""The demo on many ranks: every one runs the whole model, and keeps its share of the history.

What ranks cannot do alone is here: attention where each has some of the heads, and attention mass of frames that
others keep.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ..distributed import MemoryMesh
from ..window import MemoryWindow
from .probe import Masses, Probe

__all__ = ["RankProbe", "attend_on_ranks", "first_before_others"]

T = TypeVar("T")


def own_heads(mesh: MemoryMesh, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """This rank's heads of tensors ``(1, tokens, heads, head_dim)``."""
    return [x.chunk(mesh.head_ranks, 2)[mesh.head_rank].contiguous() for x in tensors]


def all_heads(mesh: MemoryMesh, own: torch.Tensor, what: str) -> torch.Tensor:
    """All ranks' heads of a tensor that has this one's in dimension 2."""
    if mesh.head_group is None:
        return own
    parts, pending = mesh.collectives.all_gather(what, own.contiguous(), mesh.head_group)
    pending.wait()
    return torch.cat(parts.unbind(), 2)


def attend_on_ranks(
    window: MemoryWindow,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    grid: tuple[int, int],
) -> torch.Tensor:
    """``MemoryWindow.attend`` with all heads, of a window that has a share of them or all."""
    mesh = window.mesh
    if mesh is None or mesh.head_ranks == 1:
        return window.attend(layer, q, k, v, start, grid)
    own_q, own_k, own_v = own_heads(mesh, q, k, v)
    return all_heads(mesh, window.attend(layer, own_q, own_k, own_v, start, grid), "heads of the output")


class RankProbe(Probe):
    """As `Probe`; each rank measures the frames and heads that it keeps."""

    def measure(self, queries: Sequence[torch.Tensor], start: int) -> Masses:
        if self.window.mesh is not None:
            queries = [own_heads(self.window.mesh, q)[0] for q in queries]
        return super().measure(queries, start)

    def _joined(self, log_sum_exp: torch.Tensor) -> torch.Tensor:
        mesh = self.window.mesh
        if mesh is None:
            return log_sum_exp
        group = mesh.frame_group
        if group is not None:  # frames that others keep are -inf here; of those that all have, the values are equal
            most = dist.ReduceOp.MAX
            mesh.collectives.begin(
                "attention mass", lambda: dist.all_reduce(log_sum_exp, most, group=group, async_op=True), group
            ).wait()
        return all_heads(mesh, log_sum_exp, "attention mass of the heads")


def first_before_others(mesh: MemoryMesh | None, call: Callable[[], T]) -> T:
    """What a call returns that one rank makes before the others do, such as one that fills a cache."""
    if mesh is None:
        return call()
    first = mesh.rank == mesh.ranks[0]
    try:
        made = call() if first else None
    finally:
        mesh.collectives.begin(
            "waiting for the first rank", lambda: dist.barrier(group=mesh.group, async_op=True), mesh.group
        ).wait()
    return call() if made is None else made
