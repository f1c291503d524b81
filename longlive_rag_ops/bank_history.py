"""What a history over a `MemoryBank` holds and counts, whether one process keeps it or each of many ranks its share."""

from __future__ import annotations

import torch

from .bank import MemoryBank
from .history import FrameHistory, replace_pins

COUNTED = ("forgotten_frames", "non_finite_embeddings")


class BankHistory(FrameHistory):
    """A history whose pages are in ``bank``, which a subclass makes before it calls `clear`; with them the window's own
    slots, ``pages``."""

    bank: MemoryBank
    _pages: torch.Tensor

    @property
    def pages(self) -> torch.Tensor:
        return self._pages

    def clear(self) -> None:
        super().clear()
        self.bank.clear()
        counted = self.bank.stats()
        self._before = {name: counted[name] for name in COUNTED}
        self._pinned: set[int] = set()

    def page(self, frame: int) -> torch.Tensor:
        return torch.stack(self.bank.read(frame), 1).to(self._pages.device)

    def counts(self) -> dict[str, int]:
        counted = self.bank.stats()
        return {name: counted[name] - before for name, before in self._before.items()}

    def __len__(self) -> int:
        return len(self.bank) - sum(frame in self.bank for frame in range(self.config.sink))

    def held(self) -> dict[str, int]:
        stats = self.bank.stats()
        return {
            "history": stats["device"]["bytes"],
            "history_reserved": stats["device"]["reserved_bytes"],
            "index": stats["index_bytes"],
            "quantising": stats["staging_bytes"],
            "host": stats["host"]["reserved_bytes"],
            "disk": stats["disk"]["reserved_bytes"],
        }

    def _pin(self, frames: set[int]) -> None:
        """Keeps exactly these frames from being forgotten."""
        self._pinned = replace_pins(self._pinned, frames, self.bank.pin, self.bank.unpin)
