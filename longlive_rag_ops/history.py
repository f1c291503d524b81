"""The history: finished frames that the window can retrieve, with their pages, their embeddings and what is chosen."""

from __future__ import annotations

import torch

from .config import WindowConfig, candidate_end, check_int, window_slot
from .index import FrameIndex
from .modes import normal_tensors
from .pool import HistoryPool


def check_history_slots(history_slots: int | None, config: WindowConfig, batch: int) -> None:
    """Raises `ValueError` when a bounded history could not hold what one block needs at once."""
    if history_slots is None or config.top_k == 0:
        return
    # Frames too new to be retrieved, the next block, and what each sample has chosen.
    least = config.window - config.sink + config.recent_exclude + config.frames_per_block + batch * config.top_k
    if check_int("history_slots", history_slots, 1) < least:
        raise ValueError(
            f"history_slots must be at least {least} (window - sink + recent_exclude + frames_per_block + batch * "
            f"top_k), got {history_slots}"
        )


class FrameHistory:
    """Pages and embeddings of finished frames, and the choice of those to retrieve.

    Frames that are chosen, and frames too new to be retrieved yet, are pinned: a bounded history never gives them up.

    Args:
        config: sizes of the window.
        pool: where pages live; shared with the window.
        engine: that searches the index.

    Attributes:
        index: embeddings; None before the first block is finished.
        chosen: ``(B, K)`` int64, frames chosen for the next block, most similar first, -1 for none.
        scores: ``(B, K)``, their cosines.
        forgotten: frames given up so far.
        non_finite: embeddings with NaN or infinity so far.
    """

    def __init__(self, config: WindowConfig, pool: HistoryPool, engine: str) -> None:
        self.config = config
        self.pool = pool
        self.engine = engine
        self.clear()

    @normal_tensors
    def clear(self) -> None:
        """Forgets every frame."""
        self.pool.clear()
        shape, device = (self.pool.pages.shape[2], self.config.top_k), self.pool.pages.device
        self.index: FrameIndex | None = None
        self.chosen = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.scores = torch.full(shape, -torch.inf, device=device)
        self.forgotten = self.non_finite = 0
        self._pinned: set[int] = set()

    def add(self, start: int, embeddings: torch.Tensor, staging: torch.Tensor) -> None:
        """Adds a finished block: canonical keys from ``staging``, values from its window slots.

        Args:
            start: first frame of the block.
            embeddings: ``(B, n, E)``.
            staging: ``(layers, B, R, T, Hkv, D)``, frame ``f`` in row ``f % R``.

        Raises:
            RuntimeError: the history is full; nothing has changed then.
        """
        sink, end = self.config.sink, start + embeddings.shape[1]
        kept = range(max(sink, start), max(sink, end))  # sink frames are never retrieved
        forgotten = self.pool.reserve(kept)
        if self.index is None:
            self.index = FrameIndex(embeddings.shape[0], embeddings.shape[2], embeddings.dtype, self.pool.pages.device)
        for frame in forgotten:
            self.index.remove(frame)
        for frame in kept:
            self.pool.commit(
                frame, staging[:, :, frame % staging.shape[2]], window_slot(frame, sink, self.config.local)
            )
        self.forgotten += len(forgotten)
        self.non_finite += self.index.append(range(start, end), embeddings)

    @normal_tensors
    def choose(self, start: int) -> None:
        """Chooses for the block that starts at ``start``, by the embedding of frame ``start - 1``."""
        config, index = self.config, self.index
        if index is None:
            raise RuntimeError("choose must follow add, got an empty history")
        end = candidate_end(start, config.window, config.sink)
        self.chosen, self.scores = torch.ops.longlive.topk_retrieve(
            index.embedding(start - 1),
            index.embeddings,
            index.ids,
            index.length,
            index.length.new_tensor([end]),
            config.top_k,
            first_frame=config.sink,
            recent_exclude=config.recent_exclude,
            normalized=True,
            min_score=config.min_score,
            diversity=config.diversity,
            engine=self.engine,
        )
        chosen = {frame for row in self.chosen.tolist() for frame in row if frame >= 0}
        self._pin(chosen, range(max(config.sink, end - config.recent_exclude), start))

    def _pin(self, chosen: set[int], recent: range) -> None:
        table = self.pool.table
        wanted = chosen | set(recent)
        for frame in sorted(wanted - self._pinned):
            table.pin(frame)
        for frame in sorted(self._pinned - wanted):
            table.unpin(frame)
        for frame in sorted(chosen):
            table.touch(frame)
        self._pinned = wanted
