"""Attention mass over the full history, exactly.

What would a block attend to if it could attend to everything? For each layer of the clean forward, the block's
queries are taken against every finished frame and the block itself: sink and local frames where the window has them,
every other frame from its canonical page at temporal position 0, where a retrieved frame would sit. No score matrix
of the whole history is made: ``window_attend`` gives the log-sum-exp of each frame alone, and a frame's share is
``exp(lse_frame - lse_all)``, averaged over queries, heads and layers.

A frame that a full memory bank has forgotten has no share.

Position 0 favours nobody among old frames, but a plain sliding window would hold its newest frames at their own
positions. So a second set of shares is measured with the newest ``W - S`` frames there, everything else the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .. import reference
from ..config import WindowConfig, temporal_position
from ..rotary import default_split, rotary_table
from ..window import MemoryWindow

__all__ = ["Masses", "Probe"]


@dataclass(frozen=True)
class Masses:
    """Share of attention per frame (frames,) float64, each array summing to 1.

    ``placed``: old frames at temporal position 0. ``sliding``: the newest ``W - S`` frames at their own positions.
    ``by_layer`` (layers, frames): ``placed`` before averaging over layers.
    """

    placed: NDArray[np.float64]
    sliding: NDArray[np.float64]
    by_layer: NDArray[np.float64]


class Probe:
    """Measures one window; ``head_dim`` and ``grid`` are the model's."""

    def __init__(self, window: MemoryWindow, config: WindowConfig, head_dim: int, grid: tuple[int, int]) -> None:
        self.window, self.config, self.grid = window, config, grid
        self.split = default_split(head_dim)
        self.rope = rotary_table(head_dim)

    def rotated(self, q: torch.Tensor, start: int) -> torch.Tensor:
        """Queries (1, n * T, H, D) as the layer rotated them for the block starting at ``start``."""
        frames = q.shape[1] // (self.grid[0] * self.grid[1])
        positions = torch.tensor([self._position(start + i, start, frames) for i in range(frames)])
        return reference.rotate(q, self.rope, self.split, self.grid, positions)

    def _position(self, frame: int, start: int, frames: int) -> int:
        c = self.config
        return temporal_position(frame, start, frames, c.window, c.sink, c.top_k, c.position_rule)

    @torch.no_grad()
    def measure(self, queries: Sequence[torch.Tensor], start: int) -> Masses:
        """Shares for a block whose clean forward has attended but which is not finished yet.

        Args:
            queries: per layer (1, n * T, H, D), not rotated.
            start: the block's first frame.
        """
        rotated = [self.rotated(q, start) for q in queries]
        frames = rotated[0].shape[1] // (self.grid[0] * self.grid[1])
        placed, sliding = [], []
        for frame in range(start + frames):
            here, there = self._frame(rotated, frame, start, frames)
            placed.append(here)
            sliding.append(there)
        # (frames, layers, H, n * T) -> (layers, frames)
        by_layer, slid = (self._shares(self._joined(torch.stack(parts))) for parts in (placed, sliding))
        return Masses(by_layer.mean(0).numpy(), slid.mean(0).numpy(), by_layer.numpy())

    def _joined(self, log_sum_exp: torch.Tensor) -> torch.Tensor:
        """(frames, layers, H, n * T) of all frames and heads, where ranks share them."""
        return log_sum_exp

    def _frame(
        self, queries: Sequence[torch.Tensor], frame: int, start: int, frames: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exp of one frame, (layers, H, n * T) float64: placed, and where a sliding window has it."""
        c, window = self.config, self.window
        held = window.window_frames[0]
        if frame in held and frame not in window.selected[0]:
            slot = held.index(frame)
            placed = torch.stack(
                [self._log_sum_exp(q, window.pool[layer][:, :, slot : slot + 1]) for layer, q in enumerate(queries)]
            )
            return placed, placed
        try:
            page = window.history_page(frame)  # (layers, 2, 1, T, H, D)
        except KeyError:  # a full bank has forgotten it: no attention can go there
            gone = torch.full((len(queries), *queries[0].shape[2:0:-1]), -torch.inf, dtype=torch.float64)
            return gone, gone
        placed = torch.stack([self._log_sum_exp(q, page[layer][:, :, None]) for layer, q in enumerate(queries)])
        # The frames that a sliding window of W frames would hold besides those held in place already.
        if not max(c.sink, start + frames - (c.window - c.sink)) <= frame < start:
            return placed, placed
        position = self._position(frame, start, frames)  # before_window: negative ahead of its local part
        zero = torch.zeros(1, 1, dtype=torch.int64)
        parts = []
        for layer, q in enumerate(queries):
            turned = torch.empty_like(page[layer][:, :, None])
            source = page[layer][:, :, None]
            reference.place_frames(turned, zero, zero, zero + position, self.rope, self.split, source[0], source[1])
            parts.append(self._log_sum_exp(q, turned))
        return placed, torch.stack(parts)

    @staticmethod
    def _log_sum_exp(q: torch.Tensor, page: torch.Tensor) -> torch.Tensor:
        """Log-sum-exp (H, n * T) float64 of scores against one page (2, 1, 1, T, H, D)."""
        lse: torch.Tensor = torch.ops.longlive.window_attend(q, page, run=1, return_lse=True)[1]
        return lse[0].double()

    @staticmethod
    def _shares(log_sum_exp: torch.Tensor) -> torch.Tensor:
        """(frames, layers, H, n * T) -> (layers, frames): softmax over frames, then the mean over heads and queries."""
        return log_sum_exp.softmax(0).mean((2, 3)).T
