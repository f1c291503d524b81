"""A history whose frames are spread over ranks: each keeps a bank of its own, all make the same choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..assignment import memory_arrivals
from ..bank import BankConfig, MemoryBank
from ..bank.limits import fetch_slots
from ..bank.page_format import PageFormat
from ..bank_history import BankHistory
from ..config import WindowConfig, candidate_end
from ..history import (
    block_pages,
    chosen_frames,
    recent_frames,
    search_options,
)
from ..index import unit_query
from ..modes import normal_tensors
from ..pool import empty_pages
from ..renewed_pages import RenewedPages
from .lost_frames import LostFrames
from .mesh import MemoryMesh
from .page_exchange import PageExchange
from .rank_room import check_room
from .shard_search import ShardSearch
from .side_stream import SideStream


class ShardedHistory(BankHistory):
    """Pages and embeddings in a `MemoryBank` a rank, of the frames that the mesh deals to it; chosen pages travel.

    All ranks that share frames are given the same blocks, and hold the same window. Of the choice, only newcomers to
    the window travel: from the banks of those who keep them into arrival slots on every rank, from which they are
    placed. What is counted and held is this rank's.

    Args:
        config: sizes of the window.
        shape: ``(layers, 2, samples, tokens_per_frame, kv_heads, head_dim)``, of this rank's heads.
        dtype, device: of the window.
        bank: limits and storage of this rank's bank.
        device_slots: slots in which a rank's own chosen pages come to the device, as for a window without a mesh.
        engine: that searches the index.
        mesh: of the ranks.

    Raises:
        TypeError, ValueError: as for a window with a bank; the ranks' limits together must hold what one's must.
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
        mesh: MemoryMesh,
    ) -> None:
        layers, _, samples, tokens, heads, head_dim = shape
        super().__init__(config, samples, engine)
        self.mesh = mesh
        self.most_fetched = samples * config.top_k
        self.format = PageFormat(bank.storage, layers, samples, tokens, heads, head_dim, dtype)
        self._pages = empty_pages(shape, config.window, dtype, device)
        self.bank = MemoryBank(
            self.format,
            bank,
            device_slots=fetch_slots(self.format, bank, device_slots, self.most_fetched, self.sets_of_slots),
            device=self._pages.device,
            sink=config.sink,
            frames_per_commit=config.frames_per_block,
            most_fetched=self.most_fetched,
        )
        try:
            check_room(self.bank, self.most_fetched, config, mesh, at_once=self._releases_at_once(bank))
            # Without a disk, pages that are held cannot be lost: ranks need not ask each other.
            self._lost = LostFrames(mesh, self.most_fetched, self._pages.device) if bank.disk_bytes > 0 else None
            self._side = SideStream(self._pages.device)
            self._exchange = self._new_exchange()
        except BaseException:
            self.bank.close()
            raise
        self._search: ShardSearch | None = None
        self._embedding: tuple[int, torch.dtype] | None = None
        self.clear()

    sets_of_slots = 1  # what was fetched is released as soon as it is packed

    def _releases_at_once(self, bank: BankConfig) -> bool:
        return bank.disk_bytes == 0

    def _new_exchange(self) -> PageExchange | None:
        return PageExchange(self.format, self.most_fetched, self.mesh, self._pages.device)

    @property
    def in_pool(self) -> bool:
        return False

    def clear(self) -> None:
        self._abandon_search()
        if self._exchange is not None:
            self._exchange.drain()
            self._exchange.slots = {}
        super().clear()
        if self._lost is not None:
            self._lost.clear()
        self._embedding = None
        self._next = 0  # the block that the choice is for
        self._asked: set[int] = set()  # frames of all ranks whose pages were asked for, for the next block
        self._fetched: list[int] = []  # those among them that this rank's bank holds in slots
        self._sent = self._settled = True
        self._arrived = 0  # frames of other ranks
        self._renewed = RenewedPages(self._pages.shape[0])

    @property
    def embedding_dim(self) -> int | None:
        return None if self._embedding is None else self._embedding[0]

    def keeps(self, frame: int) -> bool:
        """Whether this rank keeps a frame."""
        return self.mesh.owner(frame, self.config.sink) == self.mesh.frame_rank

    @normal_tensors
    def search(self, start: int, newest: torch.Tensor) -> None:
        self._abandon_search()
        # The dtype of all ranks' embeddings, also where this rank has none yet.
        stored = newest if self._embedding is None else newest.to(self._embedding[1])
        self._search = ShardSearch(
            start, unit_query(stored), self.bank.index, self.config, self.engine, self.mesh, self._side
        )

    @normal_tensors
    def add(self, start: int, embeddings: torch.Tensor, staging: torch.Tensor) -> None:
        frames = range(start, start + embeddings.shape[1])
        searched = self._search is not None and self._search.start == frames.stop
        if not searched:
            self.search(frames.stop, embeddings[:, -1])
        chosen, _ = self._result()
        # What the next block needs must not be given up for this one's pages.
        pinned = self._pinned
        wanted = set(filter(self.keeps, chosen_frames(chosen) | set(recent_frames(self.config, frames.stop))))
        self._pin({frame for frame in wanted if frame in self.bank})
        own = [frame for frame in frames if self.keeps(frame)]
        try:
            if own:
                pages = block_pages(own, staging, self.pages, self.config)
                self.bank.commit(
                    own,
                    [keys for keys, _ in pages],
                    [values for _, values in pages],
                    torch.stack([embeddings[:, frame - start] for frame in own], 1),
                )
        except BaseException:
            self._pin(pinned)
            if not searched:  # the embeddings may be others the next time
                self._abandon_search()
            raise
        self._pin(wanted)
        if self._embedding is None:
            dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
            self._embedding = embeddings.shape[2], dtype

    @normal_tensors
    def prepare(self, start: int, state: torch.Tensor) -> None:
        # On a GPU the host would wait for the choice; there `choose` asks, beside the forward that is under way.
        if self._side.on_host and self._exchange is not None:
            self._ask(start, memory_arrivals(state, self._result()[0]), after_caller=False)

    @normal_tensors
    def choose(self, start: int, state: torch.Tensor) -> None:
        chosen, scores = self._result()
        options = search_options(self.config, self.engine)
        end = candidate_end(start, self.config.window, self.config.sink)
        self.bank.found(chosen, scores, k=self.config.top_k, end_frame=end, **options)
        self._take(chosen, scores)
        needed = memory_arrivals(state, self.chosen)
        if (start, needed) != (self._next, self._asked):  # else `prepare` has asked
            self._ask(start, needed, after_caller=False)
        if not self._sent and not self._side.on_host:
            # The host is ahead of the forward that is under way: it may as well wait for reads from disk here, so that
            # pages travel beside it.
            self._agree(state, after_caller=False)
        self._search = None  # last: until then the call may be repeated

    @normal_tensors
    def settle(self, state: torch.Tensor) -> None:
        if self._settled:  # a call that was rejected is made again, on one rank perhaps
            return
        self._agree(state)
        if self._exchange is not None:
            self._exchange.open()
        self._settled = True

    def _agree(self, state: torch.Tensor, after_caller: bool = True) -> None:
        """Until all pages that the next block needs are on their way; what a rank has lost is given up by all."""
        while True:
            needed = memory_arrivals(state, self.chosen)
            if not needed <= self._asked:
                self._ask(self._next, needed, after_caller)
            if self._lost is None or self._sent:
                break
            # A page that was committed anew meanwhile is there, the one that was fetched is not. A search that was made
            # again may have left some behind.
            named = [lost for lost in self.bank.settle() if lost.reason != "replaced" or lost.frame in self._asked]
            with self._side.entered(after_caller):
                gone, again = self._lost.agree(self._next, named)
            if not gone and not again:
                break
            self._leave_out(gone)
            self._drop(gone)
            self._asked -= gone | again
        if not self._sent:
            with self._side.entered(after_caller):
                self._send()

    @normal_tensors
    def replace(self, layer: int, frames: range, keys: torch.Tensor, values: torch.Tensor) -> None:
        for i, frame in enumerate(frames):
            if self.keeps(frame):
                self._renewed.put(layer, frame, keys[:, i], values[:, i])

    @normal_tensors
    def replaced(self) -> None:
        self._release()
        if self._lost is not None:
            self.bank.settle()  # what it names is asked for again, and named again
        self._renewed.commit(self.bank)
        self._asked, self._settled = set(), False  # what has travelled is the old generation
        if self._exchange is not None:
            self._exchange.slots = {}

    def abandon(self) -> None:
        self._renewed.clear()
        self._settled = False

    def forget(self, before: int) -> list[int]:
        known = {*self.bank.frames(), *chosen_frames(self.chosen), *chosen_frames(self.selected), *self._asked}
        old = {frame for frame in known if self.config.sink <= frame < before}
        self._leave_out(old)
        self._asked -= old
        self._settled = False
        if self._exchange is not None:
            self._exchange.slots = {frame: slot for frame, slot in self._exchange.slots.items() if frame not in old}
        return self._drop(old)

    def wait(self, layer: int) -> None:
        self.bank.wait(layer)
        if self._exchange is not None:
            self._exchange.wait(layer)

    def slot(self, frame: int) -> int:
        return -1 if self._exchange is None else self._exchange.slots.get(frame, -1)

    def page(self, frame: int) -> torch.Tensor:
        if not self.keeps(frame):
            owner = self.mesh.owner(frame, self.config.sink)
            raise KeyError(f"frame {frame} is kept by frame rank {owner}, this one is {self.mesh.frame_rank}")
        return super().page(frame)

    def stored_pages(self, layer: int) -> dict[str, torch.Tensor]:
        return {} if self._exchange is None else self._exchange.views(layer)

    def counts(self) -> dict[str, int]:
        return super().counts() | {"arrived_frames": self._arrived}

    def held(self) -> dict[str, int]:
        return super().held() | {"arrivals": 0 if self._exchange is None else self._exchange.nbytes}

    # Private

    def _result(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._search is not None
        return self._search.result()

    def _abandon_search(self) -> None:
        if self._search is not None:
            self._search.abandon()
            self._search = None

    def _take(self, chosen: torch.Tensor, scores: torch.Tensor) -> None:
        """The choice of all ranks becomes that of the next block."""
        self.chosen, self.scores = chosen.clone(), scores.clone()

    def _ask(self, start: int, frames: set[int], after_caller: bool = True) -> None:
        """Begins to bring pages for the block at ``start``; what was asked for before is not wanted any more.

        On a GPU after all that the caller's stream was given, or after the search.
        """
        self._release()
        self._sent = self._settled = False
        self._next, self._asked = start, set()
        own = sorted(filter(self.keeps, frames))
        with self._side.entered(after_caller):
            self.bank.prefetch(own)
            self._fetched, self._asked = own, set(frames)
            if self._lost is None:
                lost = self.bank.settle()
                if lost:
                    raise RuntimeError(f"pages cannot be had: {', '.join(f'frame {f}: {why}' for f, why in lost)}")
                self._send()

    def _drop(self, frames: set[int]) -> list[int]:
        """Takes frames out of this rank's bank and returns those that were in it."""
        there = {frame for frame in self.bank.frames() if frame in frames}
        self._pin(self._pinned - there)
        self.bank.release([frame for frame in self._fetched if frame in there])
        self._fetched = [frame for frame in self._fetched if frame not in there]
        self.bank.forget(sorted(there))
        return sorted(there)

    def _send(self) -> None:
        """The pages that were asked for begin to travel; settled, so that slots are known."""
        assert self._exchange is not None
        ranks: list[list[int]] = [[] for _ in range(self.mesh.frame_ranks)]
        for frame in sorted(self._asked):
            ranks[self.mesh.owner(frame, self.config.sink)].append(frame)
        self._exchange.begin(self._next, ranks, self._pack)
        self._sent = True
        self._arrived += len(self._asked) - len(ranks[self.mesh.frame_rank])
        self._release()  # they lie in arrival slots now

    def _pack(self, layer: int, frames: Sequence[int], slots: torch.Tensor) -> None:
        self.bank.wait(layer, fetched_only=True)  # the forward that has just been committed may be under way still
        pages = self.bank.slots[layer]
        for frame, slot in zip(frames, slots, strict=True):
            slot.copy_(pages.select(1 if self.format.quantised else 2, self.bank.slot(frame)))

    def _release(self) -> None:
        self.bank.release(self._fetched)
        self._fetched = []
