"""Which rank keeps what: a `DeviceMesh` as the history sees it, of ranks that divide heads, frames or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from ..config import check_int
from .failure import Collectives, waits_on_stream
from .process_groups import check_group_counts, is_world, make_group

T = TypeVar("T")

LEAST_TIMEOUT = 0.001  # seconds, what torch.distributed counts in
MOST_TIMEOUT = 30 * 24 * 3600.0
BACKSTOP = 2  # time-outs of the mesh until a group on a GPU gives up by itself


class MemoryMesh:
    """A mesh of ranks over which one window's history is spread.

    Along its dimension ``heads`` every rank keeps the pages of its share of the key/value heads, of all frames. Along
    ``frames`` every rank keeps the pages of its share of the frames, of all its heads. Making one is collective: all
    ranks of the mesh do it together, in the same order as any other they make. It has process groups of its own, so
    that its collectives never get between the model's.

    Args:
        mesh: from ``torch.distributed.device_mesh.init_device_mesh("cuda", (2, 4), mesh_dim_names=("frames",
            "heads"))``, or a slice of a larger one: ``mesh["frames", "heads"]``.
        heads, frames: names of the dimensions; a mesh may lack one of them.
        timeout: seconds after which a rank that does not answer is given up.
        deal: which of ``frame_ranks`` ranks keeps a finished frame, a function of the frame that is the same on all
            ranks; None deals the frames behind the sink in turn.

    Attributes:
        mesh, timeout: as given.
        rank, ranks: this rank and all of the mesh, numbered as by ``torch.distributed``.
        head_ranks, head_rank: ranks that share a frame's heads, and which of them this one is; 1 and 0 without such a
            dimension.
        frame_ranks, frame_rank: likewise of ranks that share the frames.
        group, head_group, frame_group: process groups: of all ranks of the mesh, and along each dimension; None for a
            dimension that is not there or has one rank.
        collectives: begins and awaits the collectives of these groups.
        host_groups: gloo's, of all ranks of the mesh, by their time-outs: what `AgreeingRanks` has made. Kept here,
            because torch may give a new group the name of one that was destroyed, and so its old addresses.

    Raises:
        TypeError: ``mesh`` is no `DeviceMesh`.
        ValueError: ``timeout``, dimensions or ranks of ``mesh`` are not allowed, or this rank is not in it; or it has
            some of all ranks, and these have made different numbers of process groups before.
        RankFailure: a rank did not join within the time-out.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        heads: str | None = "heads",
        frames: str | None = "frames",
        timeout: float = 60.0,
        deal: Callable[[int], int] | None = None,
    ) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a torch.distributed DeviceMesh or a MemoryMesh, got {type(mesh).__name__}")
        known = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not known or not LEAST_TIMEOUT <= timeout <= MOST_TIMEOUT:
            raise ValueError(f"timeout must be {LEAST_TIMEOUT} to {MOST_TIMEOUT:.0f} seconds, got {timeout!r}")
        self.mesh = mesh
        self._closed = False
        self.timeout = float(timeout)
        self._deal = deal
        names = mesh.mesh_dim_names or ()
        allowed = [name for name in (frames, heads) if name is not None]
        if frames == heads or not names or any(name not in allowed for name in names):
            raise ValueError(
                f"mesh must have dimensions of the names {' and '.join(map(repr, allowed))}, or one of them; got "
                f"{names or 'no names'} (of a larger mesh, pass a slice: mesh[{', '.join(map(repr, allowed))}])"
            )
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"mesh must have this rank, {dist.get_rank()}, among its ranks {mesh.mesh.tolist()}")
        self.rank = dist.get_rank()
        self.ranks: list[int] = mesh.mesh.flatten().tolist()
        places = dict(zip(names, zip(mesh.mesh.shape, coordinate, strict=True), strict=True))
        self.head_ranks, self.head_rank = places.get(heads or "", (1, 0))
        self.frame_ranks, self.frame_rank = places.get(frames or "", (1, 0))
        if self.ranks != sorted(self.ranks):
            raise ValueError(f"mesh must number its ranks in ascending order, got {mesh.mesh.tolist()}")
        self.collectives = Collectives(self.ranks, self.rank, self.timeout, mesh.device_type)
        self.host_groups: dict[float, dist.ProcessGroup] = {}
        self._whole = is_world(self.ranks)
        if not self._whole:
            self._run(lambda: check_group_counts(self.ranks, self.timeout))
        group = self._new_group(self.ranks)
        assert group is not None
        self.group = group
        self.head_group = self._group_along(heads, names)
        self.frame_group = self._group_along(frames, names)
        self.collectives.note_in(self.group)
        for made in (self.group, self.head_group, self.frame_group):
            if made is not None and waits_on_stream(made, mesh.device_type):
                self._connect(made)

    @property
    def device(self) -> torch.device:
        """Where tensors of the collectives live: the CPU, or this rank's current GPU."""
        if self.mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.mesh.device_type)

    def owner(self, frame: int, sink: int) -> int:
        """The ``frame_rank`` that keeps a finished frame's page and embedding; ``sink`` is the window's.

        ValueError when ``deal`` names no such rank.
        """
        check_int("frame", frame, 0)
        if self.frame_ranks == 1:
            return 0
        if self._deal is None or frame < sink:  # sink frames are never retrieved: any deal does
            return (frame - sink) % self.frame_ranks
        return check_int(f"deal({frame})", self._deal(frame), 0, self.frame_ranks - 1)

    @property
    def deals_in_turn(self) -> bool:
        """Whether frames go to the ranks in turn, so that of any so many in a row each has its share."""
        return self._deal is None

    @property
    def frame_peers(self) -> list[int]:
        """The ranks that share frames with this one, by ``frame_rank``, numbered as by ``torch.distributed``."""
        return [self.rank] if self.frame_group is None else dist.get_process_group_ranks(self.frame_group)

    def close(self) -> None:
        """Gives threads and process groups back; all ranks call it when none uses the mesh any more. Again: nothing.

        Groups are left as they are where destroying them may hang or make names ambiguous: after a failure, and on a
        mesh of some of all ranks. Without `close`, they stay until ``destroy_process_group``.
        """
        if self._closed:
            return
        self._closed = True
        self.collectives.close()
        for key in [key for key, mesh in _wrapped.items() if mesh is self]:
            del _wrapped[key]
        if self.collectives.failure is None and self._whole and dist.is_initialized():
            for group in (*self.host_groups.values(), self.frame_group, self.head_group, self.group):
                if group is not None and group in distributed_c10d._world.pg_map:  # else the world itself has ended
                    dist.destroy_process_group(group)
        self.host_groups.clear()

    def shape(self) -> dict[str, int]:
        """``frame_ranks`` and ``head_ranks``."""
        return {"frame_ranks": self.frame_ranks, "head_ranks": self.head_ranks}

    def __repr__(self) -> str:
        return f"<MemoryMesh {self.frame_ranks} frame ranks x {self.head_ranks} head ranks, rank {self.rank}>"

    def _group_along(self, name: str | None, names: tuple[str, ...]) -> dist.ProcessGroup | None:
        if name not in names:
            return None
        place = names.index(name)
        size = self.mesh.mesh.shape[place]
        slices: list[list[int]] = self.mesh.mesh.movedim(place, -1).reshape(-1, size).tolist()
        if size == 1:
            return None
        if not self._whole:  # other slices of a larger mesh need not take part
            slices = [ranks for ranks in slices if self.rank in ranks]
        made = [self._new_group(ranks) for ranks in slices]
        return next(group for group in made if group is not None)

    def _new_group(self, ranks: list[int]) -> dist.ProcessGroup | None:
        # Where a stream waits, the group's own time-out ends the process: it comes behind ours.
        on_stream = waits_on_stream(self._world, self.mesh.device_type)
        limit = BACKSTOP * self.timeout if on_stream else self.timeout
        return self._run(lambda: make_group(ranks, limit, self._whole))

    def _connect(self, group: dist.ProcessGroup) -> None:
        """NCCL makes a group's communicator in its first collective, on the host, and waits for ever for ranks that do
        not come: so it is here, where all have just met in the store, and not in the middle of a video."""
        one = torch.ones(1, device=self.device)
        self.collectives.begin(
            "connecting the ranks of the mesh", lambda: dist.all_reduce(one, group=group, async_op=True), group, (one,)
        ).wait_on_host()

    def _run(self, call: Callable[[], T]) -> T:
        return self.collectives.run("making process groups of the mesh", call)

    @property
    def _world(self) -> dist.ProcessGroup:
        world = dist.group.WORLD
        assert world is not None
        return world


_wrapped: dict[tuple[DeviceMesh, Any], MemoryMesh] = {}


def memory_mesh(mesh: MemoryMesh | DeviceMesh | None) -> MemoryMesh | None:
    """What a window takes as ``mesh``; of a `DeviceMesh`, the same `MemoryMesh` each time, as long as it works."""
    if mesh is None or isinstance(mesh, MemoryMesh):
        return mesh
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh or a MemoryMesh, got {type(mesh).__name__}")
    world = dist.group.WORLD  # groups end with the process group that they were made beside
    for old in [key for key in _wrapped if key[1] is not world]:
        _wrapped.pop(old).collectives.close()
    key = mesh, world
    if key in _wrapped and _wrapped[key].collectives.failure is not None:
        _wrapped.pop(key).close()
    if key not in _wrapped:
        _wrapped[key] = MemoryMesh(mesh)
    return _wrapped[key]
