"""Ranks that do something together step by step: where one fails, all of them fail, with the same error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from .failure import RankFailure
from .mesh import MemoryMesh
from .process_groups import check_group_counts, is_world, make_group
from .sent_error import sent_error

T = TypeVar("T")


class AgreeingRanks:
    """The ranks of a mesh, with a process group of their own.

    The group is gloo's, because what travels in it are small objects of the host, and has a time-out of its own: work
    that touches disks takes longer than what a mesh waits for. It is the mesh's from then on.

    Args:
        mesh: of the ranks; None for this process alone, whether or not there are others.
        what: they do, for errors: "saving a bank into /checkpoints/7".
        timeout: seconds that one step may take on one rank longer than on another.

    Attributes:
        group: the process group; None for this process alone.
        first: whether this is the first of the ranks.

    Raises:
        RankFailure: a rank has died, or has not answered within the time-out. Every method raises it too.
    """

    def __init__(self, mesh: MemoryMesh | None, what: str, timeout: float) -> None:
        self._mesh, self._what, self._timeout = mesh, what, timeout
        self._ranks = [0] if mesh is None else mesh.ranks
        self._at = 0 if mesh is None else mesh.ranks.index(mesh.rank)
        self.first = self._at == 0
        self.group: dist.ProcessGroup | None = None
        if mesh is not None and len(mesh.ranks) > 1:
            groups = mesh.host_groups
            if timeout not in groups:
                with self._failures():
                    groups[timeout] = _new_group(mesh.ranks, timeout)
            self.group = groups[timeout]

    def gather(self, call: Callable[[], T]) -> list[T]:
        """What the call returns on each rank, on all of them. Where it raises on one, all raise that.

        When it raises on several, it is the error of the first of them.
        """
        outcome = _outcome(call)
        found = self._all(outcome)
        for at, (_, error) in enumerate(found):
            if error is not None:
                raise (outcome[1] or error) if at == self._at else error
        return [value for value, _ in found]  # type: ignore[misc]  # where there is no error there is a value

    def do(self, call: Callable[[], T]) -> T:
        """As `gather`, but what the call returns stays on its rank."""
        kept: list[T] = []
        self.gather(lambda: kept.append(call()))
        return kept[0]

    def once(self, call: Callable[[], T]) -> T:
        """What the call returns on the first rank, which alone makes it; on all."""
        return self.gather(lambda: call() if self.first else None)[0]  # type: ignore[return-value]

    def checkpoint(self, call: Callable[..., Any]) -> None:
        """Calls ``torch.distributed.checkpoint.save`` or ``load`` with the ranks' group; errors as in `gather`."""
        try:
            if self.group is None:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "torch.distributed is disabled")
                    call(no_dist=True)
            else:
                with self._failures():
                    call(process_group=self.group)
        except CheckpointException as error:
            first = error.failures[min(error.failures)][0]
            raise first from None

    def _all(self, value: T) -> list[T]:
        if self.group is None:
            return [value]
        found: list[Any] = [None] * len(self._ranks)
        with self._failures():
            dist.all_gather_object(found, value, group=self.group)
        return found

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """RuntimeError is all that torch.distributed raises for ranks that are gone; errors of calls are caught before
        they come here."""
        try:
            yield
        except RuntimeError as error:
            if self._mesh is not None:
                self._mesh.host_groups.clear()  # they are of no use any more
            reason = str(error).strip().partition("\n")[0]
            raise RankFailure(
                f"{self._what}: failed among ranks {self._ranks} (time-out {self._timeout:g} s): {reason}"
            ) from error


def _new_group(ranks: list[int], timeout: float) -> dist.ProcessGroup:
    if not is_world(ranks):
        check_group_counts(ranks, timeout)
    group = make_group(ranks, timeout, is_world(ranks), "gloo")
    assert group is not None
    return group


def _outcome(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What a call returns or raises, as other processes can have it."""
    try:
        return call(), None
    except BaseException as error:  # an interrupt too: the others must not wait for this rank
        return None, sent_error(error)
