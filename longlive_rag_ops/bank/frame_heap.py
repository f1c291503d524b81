"""Frames in an order that changes slowly: which is the first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection

SPARE = 64  # entries that may be out of date, beside as many as are not


class FrameHeap:
    """Finds the frame with the smallest key, the lowest number among equals, in ``O(log n)``.

    Keys may grow and frames may go without a word to the heap: it looks when a frame comes to the top. A frame that
    comes back with a smaller key is pushed again.

    Args:
        holds: whether a frame still counts.
        key: of a frame, now.
    """

    def __init__(self, holds: Callable[[int], bool], key: Callable[[int], int] = lambda _: 0) -> None:
        self._holds = holds
        self._key = key
        self.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Holds no frame."""
        self._entries: list[tuple[int, int]] = []
        self._limit = SPARE

    def push(self, frame: int) -> None:
        """Takes a frame in."""
        heapq.heappush(self._entries, (self._key(frame), frame))
        if len(self._entries) > self._limit:
            frames = {frame for _, frame in self._entries}
            self._entries = [(self._key(frame), frame) for frame in frames if self._holds(frame)]
            heapq.heapify(self._entries)
            self._limit = 2 * len(self._entries) + SPARE

    def first(self, kept: Collection[int]) -> int | None:
        """The first frame that is not in ``kept``; None when there is none. It stays in the heap."""
        found, aside = None, []
        while self._entries and found is None:
            key, frame = self._entries[0]
            now = self._key(frame)
            if not self._holds(frame) or now < key:  # gone, or here a second time with its key of before
                heapq.heappop(self._entries)
            elif now > key:
                heapq.heapreplace(self._entries, (now, frame))
            elif frame in kept:
                aside.append(heapq.heappop(self._entries))
            else:
                found = frame
        for entry in aside:
            heapq.heappush(self._entries, entry)
        return found
