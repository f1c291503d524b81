"""The history: finished frames that the window can retrieve, with their pages, their embeddings and what is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .config import WindowConfig, candidate_end, check_int, window_slot
from .index import FrameIndex, unit_query
from .modes import normal_tensors
from .pool import HistoryPool
from .transfer import HostCopy


def least_history(config: WindowConfig, batch: int) -> int:
    """Frames that a bounded history must hold: those too new to be retrieved, the next block, what is chosen."""
    return config.local + config.top_k + config.recent_exclude + config.frames_per_block + batch * config.top_k


def check_history_slots(history_slots: int | None, config: WindowConfig, batch: int) -> None:
    """Raises `ValueError` when a bounded history could not hold what one block needs at once."""
    if history_slots is None or config.top_k == 0:
        return
    least = least_history(config, batch)
    if check_int("history_slots", history_slots, 1) < least:
        raise ValueError(
            f"history_slots must be at least {least} (window - sink + recent_exclude + frames_per_block + batch * "
            f"top_k), got {history_slots}"
        )


class FrameHistory:
    """What the window asks of a history, in the order in which it asks. Here is the choice, in subclasses the rest.

    Attributes:
        chosen: ``(B, K)`` int64 on the host, frames chosen for the next block, most similar first, -1 for none.
        scores: ``(B, K)`` on the host, their cosines.
    """

    def __init__(self, config: WindowConfig, samples: int, engine: str) -> None:
        self.config = config
        self.samples = samples
        self.engine = engine

    @normal_tensors
    def clear(self) -> None:
        """Forgets every frame."""
        self.chosen = torch.full((self.samples, self.config.top_k), -1, dtype=torch.int64)
        self.scores = torch.full((self.samples, self.config.top_k), -torch.inf)

    @property
    def pages(self) -> torch.Tensor:
        """``(layers, 2, B, slots, T, Hkv, D)``, the window's slots first; may be another tensor after `add`."""
        raise NotImplementedError

    @property
    def in_pool(self) -> bool:
        """Whether slots given by `slot` are slots of `pages`."""
        return True

    @property
    def embedding_dim(self) -> int | None:
        """Size of an embedding; None before the first."""
        raise NotImplementedError

    def search(self, start: int, newest: torch.Tensor) -> None:
        """Begins to search for the block at ``start`` by the embedding ``(B, E)`` of the frame before it."""

    def prepare(self, start: int, state: torch.Tensor) -> None:
        """May begin to fetch what `search` has found for the block at ``start``, while the block before is open.

        Args:
            start: of the block that was searched for.
            state: ``(B, 4, W)`` on the host, the open block's.
        """

    def add(self, start: int, embeddings: torch.Tensor, staging: torch.Tensor) -> None:
        """Adds a finished block: canonical keys from ``staging``, values from its window slots.

        Args:
            start: first frame of the block.
            embeddings: ``(B, n, E)``.
            staging: ``(layers, B, R, T, Hkv, D)``, frame ``f`` in row ``f % R``.

        Raises:
            RuntimeError: the history is full; nothing has changed then.
        """
        raise NotImplementedError

    def choose(self, start: int, state: torch.Tensor) -> None:
        """Chooses for the block at ``start``; ``state`` ``(B, 4, W)`` on the host is the finished block's."""
        raise NotImplementedError

    def settle(self, state: torch.Tensor) -> None:
        """Leaves frames out of the choice whose pages cannot be had, before a block follows on ``state``."""

    def replace(self, layer: int, frames: range, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes a layer's new pages of finished frames, canonical, ``(B, n, T, Hkv, D)`` each; see `replaced`.

        Frames that the history does not have are passed over.
        """
        raise NotImplementedError

    def replaced(self) -> None:
        """All layers were given to `replace`: the pages are a new generation, older copies are gone."""

    def abandon(self) -> None:
        """What `replace` was given since `replaced` is not to be kept."""

    def forget(self, before: int) -> list[int]:
        """Gives up the frames from the sink to ``before``, leaves them out of the choice, and returns them."""
        raise NotImplementedError

    @property
    def selected(self) -> torch.Tensor:
        """What `chosen` is to the user: the whole choice, also where ``chosen`` is the part that one rank places."""
        return self.chosen

    @property
    def selected_scores(self) -> torch.Tensor:
        """Cosines of `selected`."""
        return self.scores

    def _leave_out(self, frames: set[int]) -> None:
        """Takes frames out of the choice; those behind them move up."""
        self.chosen, self.scores = without(self.chosen, self.scores, frames)

    def wait(self, layer: int) -> None:
        """Makes the current stream wait until a layer's window slots may be written and its history slots read."""

    def slot(self, frame: int) -> int:
        """Device slot of a frame's canonical page, -1 for none."""
        raise NotImplementedError

    def page(self, frame: int) -> torch.Tensor:
        """A frame's canonical keys and values ``(layers, 2, B, T, Hkv, D)``; KeyError when they are gone."""
        raise NotImplementedError

    def stored_pages(self, layer: int) -> dict[str, torch.Tensor]:
        """Keyword arguments of ``place_frames`` for a layer's pages: none when they are in the pool."""
        return {}

    def __len__(self) -> int:
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """``forgotten_frames`` and ``non_finite_embeddings`` since `clear`."""
        raise NotImplementedError

    def held(self) -> dict[str, int]:
        """Bytes held, by what they are for."""
        raise NotImplementedError


def without(chosen: torch.Tensor, scores: torch.Tensor, frames: set[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A choice ``(B, K)`` and its scores without some frames; those behind them move up."""
    chosen, scores = chosen.clone(), scores.clone()
    for sample, row in enumerate(chosen.tolist()):
        kept = [rank for rank, frame in enumerate(row) if frame >= 0 and frame not in frames]
        spare = len(row) - len(kept)
        chosen[sample] = torch.tensor([row[rank] for rank in kept] + [-1] * spare)
        of_kept = scores[sample, kept]
        scores[sample] = torch.cat([of_kept, of_kept.new_full((spare,), -torch.inf)])
    return chosen, scores


def search_options(config: WindowConfig, engine: str) -> dict[str, Any]:
    """Keyword arguments of a search."""
    return {
        "first_frame": config.sink,
        "recent_exclude": config.recent_exclude,
        "min_score": config.min_score,
        "diversity": config.diversity,
        "engine": engine,
    }


def block_pages(
    frames: Iterable[int], staging: torch.Tensor, pages: torch.Tensor, config: WindowConfig
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where the canonical keys and the values of a block's frames lie: views ``(layers, B, T, Hkv, D)``.

    Args:
        frames: of the block, or some of them.
        staging: ``(layers, B, R, T, Hkv, D)``.
        pages: ``(layers, 2, B, slots, T, Hkv, D)``, the window's slots first.
    """
    return [
        (staging[:, :, frame % staging.shape[2]], pages[:, 1, :, window_slot(frame, config.sink, config.local)])
        for frame in frames
    ]


class ResidentHistory(FrameHistory):
    """All pages in the window's own pool.

    Frames that are chosen, and frames too new to be retrieved yet, are pinned: a bounded history never gives them up.

    Args:
        config: sizes of the window.
        pool: where pages live; shared with the window.
        engine: that searches the index.
    """

    def __init__(self, config: WindowConfig, pool: HistoryPool, engine: str) -> None:
        super().__init__(config, pool.pages.shape[2], engine)
        self.pool = pool
        self.clear()

    def clear(self) -> None:
        super().clear()
        self.pool.clear()
        self.index: FrameIndex | None = None
        self._forgotten = self._non_finite = 0
        self._search: tuple[int, HostCopy, HostCopy] | None = None
        self._pinned: set[int] = set()

    @property
    def pages(self) -> torch.Tensor:
        return self.pool.pages

    @property
    def embedding_dim(self) -> int | None:
        return None if self.index is None else self.index.embedding_dim

    @normal_tensors
    def search(self, start: int, newest: torch.Tensor) -> None:
        """The block before ``start`` need not be in the index: none of its frames can be retrieved yet.

        A bounded history then spares what was found; without it, room is made for the block before `choose` searches.
        """
        index = self.index
        self._find(start, unit_query(newest if index is None else newest.to(index.embeddings.dtype)))

    def _find(self, start: int, query: torch.Tensor) -> None:
        """Searches by a unit embedding ``(B, E)``; the host does not wait."""
        index = self.index
        if index is None:  # so that a first block is searched for like any other
            index = FrameIndex(self.samples, query.shape[1], query.dtype, self.pool.pages.device)
        chosen, scores = torch.ops.longlive.topk_retrieve(
            query,
            index.embeddings,
            index.ids,
            index.length,
            index.length.new_full((1,), candidate_end(start, self.config.window, self.config.sink)),
            self.config.top_k,
            normalized=True,
            **search_options(self.config, self.engine),
        )
        self._search = start, HostCopy(chosen), HostCopy(scores)

    def add(self, start: int, embeddings: torch.Tensor, staging: torch.Tensor) -> None:
        sink, end = self.config.sink, start + embeddings.shape[1]
        kept = range(max(sink, start), max(sink, end))  # sink frames are never retrieved
        if self._search is not None and self._search[0] == end:
            # What a search before this has found must not be given up for this block's pages.
            self._pin(chosen_frames(self._search[1].get()) | set(recent_frames(self.config, end)))
        else:
            self._search = None
        forgotten = self.pool.reserve(kept)
        if self.index is None:
            self.index = FrameIndex(self.samples, embeddings.shape[2], embeddings.dtype, self.pool.pages.device)
        for frame in forgotten:
            self.index.remove(frame)
        for frame, (keys, values) in zip(kept, block_pages(kept, staging, self.pool.pages, self.config), strict=True):
            self.pool.commit(frame, keys, values)
        self._forgotten += len(forgotten)
        self._non_finite += self.index.append(range(start, end), embeddings)

    @normal_tensors
    def choose(self, start: int, state: torch.Tensor) -> None:
        if self._search is None or self._search[0] != start:
            if self.index is None:
                raise RuntimeError("choose must follow add, got an empty history")
            self._find(start, self.index.embedding(start - 1))
        assert self._search is not None
        _, chosen, scores = self._search
        self.chosen, self.scores = chosen.get().clone(), scores.get().clone()
        chosen_now = chosen_frames(self.chosen)
        self._pin(chosen_now | set(recent_frames(self.config, start)))
        for frame in sorted(chosen_now):
            self.pool.table.touch(frame)
        self._search = None

    def replace(self, layer: int, frames: range, keys: torch.Tensor, values: torch.Tensor) -> None:
        for i, frame in enumerate(frames):
            slot = self.slot(frame)
            if slot >= 0:
                self.pool.pages[layer, 0, :, slot] = keys[:, i]
                self.pool.pages[layer, 1, :, slot] = values[:, i]

    def forget(self, before: int) -> list[int]:
        frames = {frame for frame in self.pool.table.frames() if self.config.sink <= frame < before}
        self._leave_out(frames)
        self._pin(self._pinned - frames)
        for frame in sorted(frames):
            self.pool.table.release(frame)
            if self.index is not None:
                self.index.remove(frame)
        self._forgotten += len(frames)
        return sorted(frames)

    def slot(self, frame: int) -> int:
        return self.pool.table.lookup(frame)

    def page(self, frame: int) -> torch.Tensor:
        slot = self.slot(frame)
        if slot < 0:
            raise KeyError(f"frame {frame} has no page in the history")
        return self.pool.pages[:, :, :, slot].clone()

    def __len__(self) -> int:
        return len(self.pool.table)

    def counts(self) -> dict[str, int]:
        return {"forgotten_frames": self._forgotten, "non_finite_embeddings": self._non_finite}

    def held(self) -> dict[str, int]:
        pool = self.pool
        return {
            "history": len(pool.table) * pool.page_bytes,
            "history_reserved": pool.pages.nbytes - self.config.window * pool.page_bytes,
            "index": 0 if self.index is None else self.index.nbytes,
        }

    def _pin(self, frames: set[int]) -> None:
        there = {frame for frame in frames if frame in self.pool.table}  # recent frames may have been given up
        self._pinned = replace_pins(self._pinned, there, self.pool.table.pin, self.pool.table.unpin)


def chosen_frames(chosen: torch.Tensor) -> set[int]:
    """The frames in a choice ``(B, K)``, -1 left out."""
    return {frame for row in chosen.tolist() for frame in row if frame >= 0}


def recent_frames(config: WindowConfig, start: int) -> range:
    """Finished frames that are too new to be retrieved for a block at ``start``."""
    end = candidate_end(start, config.window, config.sink)
    return range(max(config.sink, end - config.recent_exclude), start)


def replace_pins(
    pinned: set[int], wanted: set[int], pin: Callable[[int], object], unpin: Callable[[int], object]
) -> set[int]:
    """Pins what is newly wanted, then unpins what no longer is; returns ``wanted``."""
    for frame in sorted(wanted - pinned):
        pin(frame)
    for frame in sorted(pinned - wanted):
        unpin(frame)
    return wanted
