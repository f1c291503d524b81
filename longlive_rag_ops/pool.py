"""The pool of pages: window slots, then canonical pages of the history, the same slot number in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .config import check_int
from .modes import normal_tensors
from .slot_table import SlotTable

FULL_POLICIES = ("error", "forget")


def empty_pages(shape: Sequence[int], slots: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A pool ``(layers, 2, samples, slots, tokens_per_frame, kv_heads, head_dim)``; ``shape`` is that without slots."""
    return torch.zeros((*shape[:3], slots, *shape[3:]), dtype=dtype, device=device)


class HistoryPool:
    """One tensor of pages, and the table that says which frame's canonical page is where.

    Args:
        window: window slots, the first of the pool.
        shape: ``(layers, 2, samples, tokens_per_frame, kv_heads, head_dim)``.
        dtype, device: of the pages.
        capacity: most frames of history, None for as many as come (the pool then doubles when it is full).
        on_full: with a capacity: ``error`` raises when it is exceeded; ``forget`` gives up the least recently
            retrieved frame.

    Attributes:
        pages: ``(layers, 2, samples, slots, tokens_per_frame, kv_heads, head_dim)``; replaced when the pool grows.
        table: frame -> slot of its canonical page.
    """

    FIRST_CAPACITY = 16

    @normal_tensors
    def __init__(
        self,
        window: int,
        shape: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity: int | None,
        on_full: str,
    ) -> None:
        if on_full not in FULL_POLICIES:
            raise ValueError(f"on_full must be one of {', '.join(FULL_POLICIES)}; got {on_full!r}")
        self.window = window
        self.limit = capacity
        self.on_full = on_full
        slots = self.FIRST_CAPACITY if capacity is None else check_int("history_slots", capacity, 1)
        self.table = SlotTable(slots, first=window)
        self.pages = empty_pages(shape, window + slots, dtype, device)

    @property
    def page_bytes(self) -> int:
        """Bytes of one frame: keys and values of all layers and samples."""
        return self.pages[:, :, :, 0].numel() * self.pages.element_size()

    def reserve(self, frames: range) -> list[int]:
        """Makes room for new frames' pages; returns the frames given up for them. All or nothing.

        Raises:
            RuntimeError: the capacity is used up and ``on_full`` is ``error``.
        """
        needed = len(self.table) + sum(frame not in self.table for frame in frames)
        if needed > self.table.capacity:
            if self.limit is None:
                self._grow(max(needed, 2 * self.table.capacity))
            elif self.on_full == "error":
                raise RuntimeError(
                    f"history_slots ({self.limit}) are used up by {len(self.table)} frames and {len(frames)} more are "
                    "finished: raise history_slots, leave it None to grow, or pass on_full='forget'"
                )
        return [result.evicted for result in self.table.acquire_many(list(frames)) if result.evicted is not None]

    def commit(self, frame: int, canonical_keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copies a finished frame's pages: keys and values ``(layers, samples, T, Hkv, D)``."""
        slot = self.table.lookup(frame)
        self.pages[:, 0, :, slot] = canonical_keys
        self.pages[:, 1, :, slot] = values

    def clear(self) -> None:
        """Forgets every frame; keeps the memory."""
        self.table.clear()

    @normal_tensors
    def _grow(self, capacity: int) -> None:
        old = self.pages
        shape = list(old.shape)
        shape[3] = self.window + capacity
        self.pages = old.new_zeros(shape)
        self.pages[:, :, :, : old.shape[3]] = old
        self.table.grow(capacity)
