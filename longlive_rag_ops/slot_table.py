"""Which slot of a pool holds which frame, kept by the C++ core (``csrc/slot_table.h``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, SupportsIndex

from longlive_rag_ops.build_info import extension


class Acquired(NamedTuple):
    """What :meth:`SlotTable.acquire` gave."""

    slot: int
    is_new: bool  # the frame was not there: its page must be written into the slot
    evicted: int | None  # the frame that lost this slot


class SlotTable:
    """Maps frames (int64, >= 0) to the slots ``first .. first + capacity - 1`` (int32), one slot a frame.

    A frame that is not there gets the lowest free slot; when none is free, the slot of the least recently used frame
    that nobody has pinned. *Used* means acquired, touched, or unpinned for the last time. The slots given depend on the
    sequence of calls alone. A call that raises leaves the table as it was.

    Integers may be anything with ``__index__`` (int, numpy integers, integer tensors of one element). Every method
    raises TypeError for what is no integer and ValueError for a frame below 0. Calls take constant time each frame;
    they are safe between Python threads only because they hold the interpreter lock.

    Args:
        capacity: number of slots, >= 1.
        first: the lowest slot, >= 0; ``first + capacity - 1`` must fit into an int32.

    Raises:
        ImportError: the extension module is not built (the message says how to build it).
        ValueError: ``capacity`` or ``first`` is not allowed.
    """

    def __init__(self, capacity: SupportsIndex, first: SupportsIndex = 0) -> None:
        self._table = extension().SlotTable(capacity, first)

    def acquire(self, frame: SupportsIndex) -> Acquired:
        """The slot of ``frame``, given now if it has none. Counts as a use.

        Raises RuntimeError when every slot is held by a pinned frame.
        """
        return Acquired(*self._table.acquire(frame))

    def acquire_many(self, frames: Iterable[SupportsIndex]) -> list[Acquired]:
        """Slots for all of ``frames``, in their order, or, when they do not all fit, RuntimeError and no change.

        No frame of the request is evicted for another one of it. A frame named twice gets one slot (``is_new`` and
        ``evicted`` are set where it is named first). Afterwards the last of the request is the most recently used.
        """
        return [Acquired(*acquired) for acquired in self._table.acquire_many(frames)]

    def lookup(self, frame: SupportsIndex) -> int:
        """The slot of ``frame``, -1 when it has none. Not a use."""
        return int(self._table.lookup(frame))

    def touch(self, frame: SupportsIndex) -> int:
        """The slot of ``frame``, -1 when it has none. Counts as a use."""
        return int(self._table.touch(frame))

    def pin(self, frame: SupportsIndex) -> int:
        """Keeps ``frame`` from being evicted or released until it is unpinned as often; returns its pins.

        Raises ValueError when the frame has no slot.
        """
        return int(self._table.pin(frame))

    def unpin(self, frame: SupportsIndex) -> int:
        """Takes back one :meth:`pin`; returns the pins that are left. Taking back the last one counts as a use.

        Raises ValueError when the frame has no slot, RuntimeError when it is not pinned.
        """
        return int(self._table.unpin(frame))

    def pins(self, frame: SupportsIndex) -> int:
        """How often ``frame`` is pinned; 0 when it has no slot."""
        return int(self._table.pins(frame))

    def release(self, frame: SupportsIndex) -> int:
        """Frees the slot of ``frame`` and returns it.

        Raises ValueError when the frame has no slot, RuntimeError when it is pinned.
        """
        return int(self._table.release(frame))

    def clear(self) -> None:
        """Forgets every frame, the pinned ones too: the table is as new, of its present capacity."""
        self._table.clear()

    def grow(self, capacity: SupportsIndex) -> None:
        """Adds slots at the end until there are ``capacity``.

        Raises ValueError when that is less than the present capacity, or the last slot would not fit into an int32.
        """
        self._table.grow(capacity)

    def frames(self) -> list[int]:
        """The frames in the order in which they would be evicted, least recently used first; then the pinned ones."""
        return list(self._table.frames())

    @property
    def size(self) -> int:
        """Number of frames that have a slot."""
        return int(self._table.size)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return int(self._table.capacity)

    @property
    def first(self) -> int:
        """The lowest slot."""
        return int(self._table.first)

    def __len__(self) -> int:
        return self.size

    def __contains__(self, frame: SupportsIndex) -> bool:
        return self.lookup(frame) >= 0

    def __repr__(self) -> str:
        return f"SlotTable(capacity={self.capacity}, first={self.first}, size={self.size})"
