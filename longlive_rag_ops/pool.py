"""The pool of pages: window slots, then canonical pages of the history, the same slot number in every layer."""

from __future__ import annotations

import torch

from .config import check_int
from .modes import normal_tensors
from .slot_table import SlotTable

FULL_POLICIES = ("error", "forget")


class HistoryPool:
    """One tensor of pages, and the table that says which frame's canonical page is where.

    Args:
        window: window slots, the first of the pool.
        layers, samples, tokens_per_frame, kv_heads, head_dim, dtype, device: of the pages.
        capacity: most frames of history, None for as many as come (the pool then doubles when it is full).
        on_full: with a capacity: ``error`` raises when it is exceeded; ``forget`` gives up the least recently
            retrieved frame.

    Attributes:
        pages: ``(layers, 2, samples, slots, tokens_per_frame, kv_heads, head_dim)``; replaced when the pool grows.
        frame_slot: ``(samples, F)`` int64, slot of each frame's canonical page, -1 for none.
    """

    FIRST_CAPACITY = 16

    @normal_tensors
    def __init__(
        self,
        window: int,
        *,
        layers: int,
        samples: int,
        tokens_per_frame: int,
        kv_heads: int,
        head_dim: int,
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
        shape = (layers, 2, samples, window + slots, tokens_per_frame, kv_heads, head_dim)
        self.pages = torch.zeros(shape, dtype=dtype, device=device)
        self.frame_slot = torch.full((samples, slots), -1, dtype=torch.int64, device=device)

    @property
    def page_bytes(self) -> int:
        """Bytes of one frame: keys and values of all layers and samples."""
        return self.pages[:, :, :, 0].numel() * self.pages.element_size()

    @normal_tensors
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
        if frames.stop > self.frame_slot.shape[1]:
            more = max(frames.stop, 2 * self.frame_slot.shape[1]) - self.frame_slot.shape[1]
            absent = self.frame_slot.new_full((self.frame_slot.shape[0], more), -1)
            self.frame_slot = torch.cat([self.frame_slot, absent], 1)
        acquired = self.table.acquire_many(list(frames))
        forgotten = [result.evicted for result in acquired if result.evicted is not None]
        self.frame_slot[:, forgotten] = -1
        for frame, result in zip(frames, acquired, strict=True):
            self.frame_slot[:, frame] = result.slot
        return forgotten

    def commit(self, frame: int, canonical_keys: torch.Tensor, window_slot: int) -> None:
        """Copies a finished frame: keys ``(layers, samples, T, Hkv, D)`` as given, values from its window slot."""
        slot = self.table.lookup(frame)
        self.pages[:, 0, :, slot] = canonical_keys
        self.pages[:, 1, :, slot] = self.pages[:, 1, :, window_slot]

    def clear(self) -> None:
        """Forgets every frame; keeps the memory."""
        self.table.clear()
        self.frame_slot.fill_(-1)

    @normal_tensors
    def _grow(self, capacity: int) -> None:
        old = self.pages
        shape = list(old.shape)
        shape[3] = self.window + capacity
        self.pages = old.new_zeros(shape)
        self.pages[:, :, :, : old.shape[3]] = old
        self.table.grow(capacity)
