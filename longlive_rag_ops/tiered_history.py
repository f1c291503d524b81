"""A history whose pages live in a memory bank: on the device as far as there are slots, in host memory, on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .assignment import memory_arrivals
from .bank import BankConfig, MemoryBank
from .bank.limits import fetch_slots
from .bank.page_format import PageFormat
from .bank_history import BankHistory
from .config import WindowConfig, candidate_end
from .history import (
    block_pages,
    chosen_frames,
    least_history,
    recent_frames,
    search_options,
)
from .index import unit_query
from .modes import normal_tensors
from .pool import empty_pages
from .renewed_pages import RenewedPages
from .transfer import HostCopy


class TieredHistory(BankHistory):
    """Pages in a `MemoryBank`. Only newcomers to the window are fetched; what a choice keeps stays where it is.

    Args:
        config: sizes of the window.
        shape: ``(layers, 2, samples, tokens_per_frame, kv_heads, head_dim)``.
        dtype, device: of the window.
        bank: limits and storage of the bank.
        device_slots: frames whose pages the device holds beside the window; None for as many as the bank's
            ``device_bytes`` holds or, without that, twice what one block can fetch, so that a fetch finds room while
            the last one is still being placed.
        engine: that searches the index.

    Raises:
        ValueError: nothing is ever retrieved, or a limit is too small for one block and what must not be forgotten.
    """

    def __init__(
        self,
        config: WindowConfig,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        bank: BankConfig,
        device_slots: int | None,
        engine: str,
    ) -> None:
        if not isinstance(bank, BankConfig):
            raise TypeError(f"bank must be a BankConfig or None, got {type(bank).__name__}")
        if config.top_k == 0:
            raise ValueError("bank keeps frames to retrieve: top_k must be at least 1 with one, got 0")
        layers, _, samples, tokens, heads, head_dim = shape
        super().__init__(config, samples, engine)
        most_fetched = samples * config.top_k
        form = PageFormat(bank.storage, layers, samples, tokens, heads, head_dim, dtype)
        slots = fetch_slots(form, bank, device_slots, most_fetched)
        plain = bank.storage == "plain"
        self._pages = empty_pages(shape, config.window + (slots if plain else 0), dtype, device)
        self.bank = MemoryBank(
            form,
            bank,
            slots=self._pages if plain else None,
            first_slot=config.window if plain else 0,
            device_slots=slots,
            device=self._pages.device,
            sink=config.sink,
            frames_per_commit=config.frames_per_block,
            most_fetched=most_fetched,
        )
        least, room, block = config.sink + least_history(config, samples), self.bank.room(), "frames_per_block"
        if bank.policy != "error":  # which spares what the finished block has fetched, as well as what comes next
            least += max(0, most_fetched - config.frames_per_block)
            block = "the larger of frames_per_block and batch * top_k"
        if room < least:
            self.bank.close()
            raise ValueError(
                f"host_bytes and disk_bytes must hold at least {least} frames (window + recent_exclude + {block} + "
                f"batch * top_k) of {self.bank.format.record_bytes} bytes each, got room for {room}"
            )
        self.clear()

    @property
    def in_pool(self) -> bool:
        return self.bank.format.storage == "plain"

    def clear(self) -> None:
        super().clear()
        self._search: tuple[int, HostCopy, HostCopy] | None = None
        self._fetched: set[int] = set()
        self._renewed = RenewedPages(self._pages.shape[0])

    @property
    def embedding_dim(self) -> int | None:
        index = self.bank.index
        return None if index is None else index.embedding_dim

    @normal_tensors
    def search(self, start: int, newest: torch.Tensor) -> None:
        config, index = self.config, self.bank.index
        stored = newest if index is None else newest.to(index.embeddings.dtype)  # what will be in the index
        ids, scores = self.bank.search(
            unit_query(stored),
            config.top_k,
            end_frame=candidate_end(start, config.window, config.sink),
            **search_options(config, self.engine),
        )
        self._search = start, HostCopy(ids), HostCopy(scores)

    def add(self, start: int, embeddings: torch.Tensor, staging: torch.Tensor) -> None:
        frames = range(start, start + embeddings.shape[1])
        searched = self._search is not None and self._search[0] == frames.stop
        if not searched:
            self.search(frames.stop, embeddings[:, -1])
        chosen, _ = self._result()
        # What the next block needs must not be given up for this one's pages.
        pinned, wanted = self._pinned, chosen_frames(chosen) | set(recent_frames(self.config, frames.stop))
        self._pin({frame for frame in wanted if frame in self.bank})
        try:
            pages = block_pages(frames, staging, self.pages, self.config)
            self.bank.commit(frames, [keys for keys, _ in pages], [values for _, values in pages], embeddings)
        except BaseException:
            self._pin(pinned)
            if not searched:  # the embeddings may be others the next time
                self._search = None
            raise
        self._pin(wanted)

    def choose(self, start: int, state: torch.Tensor) -> None:
        self.chosen, self.scores = self._result()
        self.release()
        self._fetch(memory_arrivals(state, self.chosen))
        self._search = None  # last: until then the call may be repeated

    def settle(self, state: torch.Tensor) -> None:
        while True:
            lost = self.bank.settle()
            self._fetched -= {frame for frame, _ in lost}
            # A page that was committed anew meanwhile is there, the one that was fetched is not.
            self._leave_out({frame for frame, reason in lost if reason != "replaced"})
            # With fewer frames, one that the window kept may have to move, and is fetched for that. So is what could
            # not be asked for when this was called the last time.
            missing = memory_arrivals(state, self.chosen) - self._fetched
            if not missing:
                return
            self._fetch(missing)

    @normal_tensors
    def replace(self, layer: int, frames: range, keys: torch.Tensor, values: torch.Tensor) -> None:
        for i, frame in enumerate(frames):
            self._renewed.put(layer, frame, keys[:, i], values[:, i])

    def replaced(self) -> None:
        self._fetched -= self._renewed.commit(self.bank)

    def abandon(self) -> None:
        self._renewed.clear()

    def forget(self, before: int) -> list[int]:
        frames = {frame for frame in self.bank.frames() if self.config.sink <= frame < before}
        self._leave_out(frames)
        self._pin(self._pinned - frames)
        self.bank.release(sorted(self._fetched & frames))
        self._fetched -= frames
        self.bank.forget(sorted(frames))
        return sorted(frames)

    def wait(self, layer: int) -> None:
        self.bank.wait(layer)

    def release(self) -> None:
        """The fetched pages have been placed: their slots may be filled again."""
        self.bank.release(sorted(self._fetched))
        self._fetched = set()

    def slot(self, frame: int) -> int:
        return self.bank.slot(frame)

    def stored_pages(self, layer: int) -> dict[str, torch.Tensor]:
        return {} if self.in_pool else self.bank.format.views(self.bank.slots[layer])

    def _result(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._search is not None
        return self._search[1].get(), self._search[2].get()

    def _fetch(self, frames: set[int]) -> None:
        self.bank.prefetch(sorted(frames))
        self._fetched |= frames
