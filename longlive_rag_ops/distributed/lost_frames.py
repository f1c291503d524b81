"""Frames whose pages a rank could not read, told to all ranks, so that they go on with the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..bank.contents import Lost
from .mesh import MemoryMesh

NONE, AGAIN, GONE = 0, 1, 2


class LostFrames:
    """What ranks tell each other before a block begins, in one collective of a fixed size, where disks may fail.

    All ranks of the mesh take part: heads of a frame that are lost on one rank are given up on the others.

    Args:
        mesh: of the ranks.
        most: frames told at a time; what is left is told the next time, and after a loss there is one.
        device: of the collective.
    """

    def __init__(self, mesh: MemoryMesh, most: int, device: torch.device) -> None:
        self._mesh, self._most, self._device = mesh, most, device
        self._untold: list[tuple[int, int]] = []

    def clear(self) -> None:
        """A new video begins."""
        self._untold = []

    def agree(self, start: int, lost: Sequence[Lost]) -> tuple[set[int], set[int]]:
        """Tells the others what this rank has lost, and hears what they have.

        Args:
            start: of the block that begins.
            lost: what ``MemoryBank.settle`` has named.

        Returns:
            Frames that are gone, and those that must be fetched again because they were replaced meanwhile; the same on
            all ranks.

        Raises:
            RankFailure: a rank has not answered within the time-out.
        """
        self._untold += [(frame, AGAIN if reason == "replaced" else GONE) for frame, reason in lost]
        told, self._untold = self._untold[: self._most], self._untold[self._most :]
        told += [(-1, NONE)] * (self._most - len(told))
        own = torch.tensor(told, dtype=torch.int64).to(self._device)
        rows, pending = self._mesh.collectives.all_gather(
            f"looking for lost pages of the block at {start}", own, self._mesh.group
        )
        pending.wait_on_host()
        found = rows.flatten(0, 1).tolist()
        gone = {frame for frame, fate in found if fate == GONE}
        return gone, {frame for frame, fate in found if fate == AGAIN} - gone
