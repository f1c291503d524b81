"""How far each rank has come, noted in the store of a process group, to tell afterwards who has fallen silent."""

from __future__ import annotations

import contextlib
import threading
import time

import torch.distributed as dist

GRACE = 2.0  # seconds at most in which other ranks may say that they have failed as well
PREFIX = "longlive/progress"


class Progress:
    """Notes how many collectives this rank has begun. Nothing here raises, or waits longer than it says.

    Threads of its own speak to the store, because one whose host stalls would stall its callers.

    Args:
        group: of all ranks of the mesh.
        rank: this one.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._rank = rank
        self._count = 0
        self._changed = threading.Event()
        self._closed = False
        self._writing: threading.Thread | None = None
        self._store: dist.Store | None = None
        with contextlib.suppress(RuntimeError):  # a backend without one: nobody is named then
            self._store = group.get_group_store()
            self._writing = threading.Thread(target=self._write, name="longlive-progress", daemon=True)
            self._writing.start()

    def note(self, count: int) -> None:
        """This rank has begun so many collectives."""
        self._count = count
        self._changed.set()

    def close(self) -> None:
        """Ends the thread, and waits for that a moment; nothing is noted any more."""
        self._closed = True
        self._changed.set()
        if self._writing is not None:
            self._writing.join(GRACE)

    def silent(self, count: int, ranks: list[int], timeout: float) -> list[int]:
        """Notes that this rank has failed in its collective ``count``, and returns those of ``ranks`` that have not.

        When some of these are known to be behind, only them. Waits for others at most `GRACE` or half the time-out.
        """
        if self._store is None:
            return []
        others = [rank for rank in ranks if rank != self._rank]
        grace = min(GRACE, timeout / 2)
        found: list[int] = []
        looking = threading.Thread(
            target=lambda: found.extend(self._look(self._store, count, others, time.monotonic() + grace)), daemon=True
        )
        looking.start()
        looking.join(2 * grace)
        return found

    def _look(self, store: dist.Store | None, count: int, others: list[int], deadline: float) -> list[int]:
        assert store is not None
        with contextlib.suppress(RuntimeError):
            store.set(f"{PREFIX}/{self._rank}/failed", str(count))
            while others and time.monotonic() < deadline:
                others = [rank for rank in others if not store.check([f"{PREFIX}/{rank}/failed"])]
                time.sleep(0.02)
            counts = {rank: _number(store, f"{PREFIX}/{rank}") for rank in others}
            behind = [rank for rank, number in counts.items() if number < count]
            return behind or [rank for rank, number in counts.items() if number <= count]
        return []

    def _write(self) -> None:
        written = -1
        with contextlib.suppress(RuntimeError):  # the store is gone
            while self._store is not None and not self._closed:
                self._changed.wait()
                self._changed.clear()
                if self._count != written:
                    written = self._count
                    self._store.set(f"{PREFIX}/{self._rank}", str(written))


def _number(store: dist.Store, key: str) -> int:
    return int(store.get(key)) if store.check([key]) else 0
