"""Whether the ranks of a mesh do the same: their settings at the start, their choice and window in every block."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..transfer import HostCopy, device_copy
from .failure import RankFailure
from .mesh import MemoryMesh
from .side_stream import SideStream

ERROR = "error"  # in place of a rank's settings


class RanksDisagree(RuntimeError):
    """Ranks of a mesh have chosen other frames, hold other windows, or were given other embeddings, than others: what
    they compute is worthless. It does not end with the video: the window cannot go on, nor after ``reset``."""


def gather_settings(mesh: MemoryMesh, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every rank's settings, in rank order. Values are what JSON has.

    Raises:
        RankFailure: a rank has not answered within the time-out.
    """
    text = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8).to(mesh.device)
    sizes = _gather(mesh, torch.tensor([len(text)], device=mesh.device))[:, 0].tolist()
    padded = text.new_zeros(max(sizes))
    padded[: len(text)] = text
    rows = _gather(mesh, padded).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]


def check_settings(mesh: MemoryMesh, settings: Callable[[], Mapping[str, Any]]) -> None:
    """Compares what was asked for on every rank.

    Args:
        mesh: of the ranks.
        settings: returns this rank's, or raises an error about them, which is every rank's then.

    Raises:
        ValueError: something differs; the same message on every rank names it, with each rank's value. Or another rank
            has an error, which is named.
        Exception: this rank's error.
        RankFailure: a rank has not answered within the time-out.
    """
    if len(mesh.ranks) == 1:
        settings()
        return
    own: Exception | None = None
    try:
        told = settings()
    except Exception as error:
        own, told = error, {ERROR: f"{type(error).__name__}: {error}"}
    found = gather_settings(mesh, told)
    errors = [f"rank {rank}: {one[ERROR]}" for rank, one in zip(mesh.ranks, found, strict=True) if ERROR in one]
    if own is not None:
        raise own
    if errors:
        raise ValueError(f"arguments are not allowed on {'; '.join(errors)}")
    differing = []
    for name in dict.fromkeys(name for one in found for name in one):
        by_value: dict[str, list[int]] = {}
        for rank, one in zip(mesh.ranks, found, strict=True):
            by_value.setdefault(json.dumps(one.get(name, "not given")), []).append(rank)
        if len(by_value) > 1:
            values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_value.items())
            differing.append(f"{name} ({values})")
    if differing:
        raise ValueError(f"all ranks of the mesh must be given the same settings; these differ: {'; '.join(differing)}")


def tell_error(mesh: MemoryMesh, what: str, own: Exception | None) -> None:
    """Tells all ranks of an error of one.

    Args:
        mesh: of the ranks.
        what: has failed, for errors of the others.
        own: this rank's error; None: it has none.

    Raises:
        Exception: ``own``. RuntimeError: the other ranks' errors. RankFailure: a rank has not answered within the
            time-out.
    """
    if len(mesh.ranks) > 1:
        try:
            found = gather_settings(mesh, {} if own is None else {ERROR: f"{type(own).__name__}: {own}"})
        except RankFailure as failure:
            raise failure from own
        errors = [f"rank {rank}: {one[ERROR]}" for rank, one in zip(mesh.ranks, found, strict=True) if ERROR in one]
        if own is None and errors:
            raise RuntimeError(f"{what} on {'; '.join(errors)}")
    if own is not None:
        raise own


class Comparison:
    """Whether all ranks have the same number; begun when it is made.

    Args:
        mesh: of the ranks.
        start: of a block, for errors.
        number: ``0 .. 2**63 - 1``.
        side: where a GPU does it.
    """

    def __init__(self, mesh: MemoryMesh, start: int, number: int, side: SideStream) -> None:
        self._mesh = mesh
        self._bounds = device_copy(torch.tensor([number, -number]), mesh.device)
        with side.entered():
            self._pending = mesh.collectives.begin(
                f"comparing windows of the block at {start}",
                lambda: dist.all_reduce(self._bounds, dist.ReduceOp.MAX, group=mesh.group, async_op=True),
                mesh.group,
                (self._bounds,),
            )
            if not side.on_host:
                self._pending.wait()
                self._copy = HostCopy(self._bounds)

    def equal(self) -> bool:
        """Waits for the answer."""
        self._pending.wait_on_host()
        most, least = (self._copy.get() if self._bounds.is_cuda else self._bounds).tolist()
        return bool(most == -least)


class BlockAgreement:
    """Whether all ranks hold the same window, and were given the same, compared by a hash of 63 bits in one small
    collective a block.

    It is begun when a block is, and looked at when the next one begins: nobody waits for it.

    Args:
        mesh: of the ranks.
    """

    def __init__(self, mesh: MemoryMesh) -> None:
        self._mesh = mesh
        self._failure: str | None = None
        self._side = SideStream(mesh.device)
        self._begun: tuple[int, int, Comparison] | None = None

    def begin(self, start: int, *tensors: torch.Tensor) -> None:
        """Compares these tensors of the host, for the block at ``start``."""
        self.check()
        digest = hashlib.blake2b(str(start).encode(), digest_size=8)
        for tensor in tensors:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        number = int.from_bytes(digest.digest(), "little") >> 1
        self._begun = start, number, Comparison(self._mesh, start, number, self._side)

    def check(self) -> None:
        """Looks at the comparison that was begun last.

        Raises:
            RanksDisagree: ranks hold other windows than others, now or before. The message names them.
            RankFailure: a rank has not answered within the time-out.
        """
        if self._failure is not None:
            raise RanksDisagree(self._failure)
        if self._begun is None:
            return
        (start, number, comparison), self._begun = self._begun, None
        if comparison.equal():
            return
        self._failure = self._difference(start, number)
        raise RanksDisagree(self._failure)

    def forget(self) -> None:
        """A new video begins: an unequal answer for the last block is a warning, because that video is over.

        What `check` has raised before it goes on raising.

        Raises:
            RankFailure: a rank has not answered within the time-out.
        """
        begun, self._begun = self._begun, None
        if begun is None or self._mesh.collectives.failure is not None:
            return
        start, number, comparison = begun
        if not comparison.equal():
            warnings.warn(f"of the video before reset, {self._difference(start, number)}", RuntimeWarning, stacklevel=4)

    def _difference(self, start: int, number: int) -> str:
        """Which ranks are of one mind; all of them ask, since the answer was the same for all."""
        numbers = _gather(self._mesh, torch.tensor([number], device=self._mesh.device))[:, 0].tolist()
        groups: dict[int, list[int]] = {}
        for rank, value in zip(self._mesh.ranks, numbers, strict=True):
            groups.setdefault(value, []).append(rank)
        parts = "; ".join(_ranks(ranks) for ranks in groups.values())
        return (
            f"ranks of the mesh hold different windows for the block at {start}, or were given different embeddings "
            f"before it: of one mind are {parts}. All must be given the same embeddings, bit for bit, in the same order"
        )


def _gather(mesh: MemoryMesh, row: torch.Tensor) -> torch.Tensor:
    """``(ranks, *row.shape)``."""
    rows, pending = mesh.collectives.all_gather("comparing ranks of the mesh", row, mesh.group)
    pending.wait_on_host()
    return rows


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
