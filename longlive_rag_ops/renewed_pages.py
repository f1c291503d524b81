"""Pages of finished frames that were encoded once more, on their way into a bank."""

from __future__ import annotations

import torch

from .bank import MemoryBank


class RenewedPages:
    """Collects the layers of frames' new pages, which come one layer at a time, and commits them together.

    Args:
        layers: of a frame.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._pages: dict[int, torch.Tensor] = {}  # (2, layers, samples, T, Hkv, D) by frame

    def put(self, layer: int, frame: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes a frame's canonical keys and values ``(samples, T, Hkv, D)`` in one layer."""
        if frame not in self._pages:
            self._pages[frame] = keys.new_empty(2, self._layers, *keys.shape)
        self._pages[frame][0, layer], self._pages[frame][1, layer] = keys, values

    def commit(self, bank: MemoryBank) -> set[int]:
        """Replaces the pages of the frames that the bank has; returns all that were given, and forgets them."""
        there = [frame for frame in sorted(self._pages) if frame in bank]
        for first in range(0, len(there), bank.frames_per_commit):
            part = there[first : first + bank.frames_per_commit]
            keys, values = ([self._pages[frame][i] for frame in part] for i in range(2))
            bank.commit(part, keys, values, replace=True)
        given = set(self._pages)
        self.clear()
        return given

    def clear(self) -> None:
        """Forgets what was given."""
        self._pages = {}
