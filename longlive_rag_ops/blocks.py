"""Blocks in their order: which one is open, which may come next, which may be finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .assignment import FRAME, SOURCE, STAGED
from .config import check_int
from .transfer import device_copy, device_numbers


@dataclass
class Block:
    """The block being generated: its frames, the window it attends with, the layers that have attended.

    Attributes:
        start, frames: its first frame and how many there are.
        plan: ``(B, 4, W)`` window state on the host, see `assignment`.
        state: what the ops take of it, on the device.
        stored: ``(B, W)`` on the device, where each window slot's canonical page is stored, -1 for nothing to place;
            None when the pool holds these pages and ``state`` says where.
        start_frame: ``start`` as an int64 tensor ``(1,)`` on the device.
        count: occupied window slots; None where samples differ.
        placements: pages that each layer places.
        layers: layers that have attended.
        placed: those among them whose pages are known to be in place.
        embeddings: ``(B, n, E)``, once they were given before the block is finished.
        remembered: its pages and embeddings are in the history; only the choice for the next block is missing.
        tables: small tensors on the device that are the same in every layer and forward.
    """

    start: int
    frames: int
    plan: torch.Tensor
    state: torch.Tensor
    stored: torch.Tensor | None
    start_frame: torch.Tensor
    count: int | None
    placements: int
    layers: set[int] = field(default_factory=set)
    placed: set[int] = field(default_factory=set)
    embeddings: torch.Tensor | None = None
    remembered: bool = False
    tables: dict[Any, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def planned(cls, start: int, frames: int, plan: torch.Tensor, device: torch.device, in_pool: bool) -> Block:
        """A block with the window of ``plan``, sent to the device without waiting for it."""
        source, staged = plan[:, SOURCE], plan[:, STAGED]
        counts = set((plan[:, FRAME] >= 0).sum(1).tolist())
        state, stored = plan, None
        if not in_pool and bool((source >= 0).any()):
            stored = device_copy(source, device)
            state = plan.clone()
            state[:, SOURCE] = -1
        return cls(
            start,
            frames,
            plan,
            device_copy(state, device),
            stored,
            device_numbers([start], device),
            counts.pop() if len(counts) == 1 else None,
            int(((source >= 0) | (staged >= 0)).sum()),
        )

    @property
    def end(self) -> int:
        """One past the last frame."""
        return self.start + self.frames


class BlockSequence:
    """Blocks follow one another without a gap; the open block takes any number of forwards, a finished one none.

    Args:
        layers: layers that must attend before a block can be finished.
        most_frames: frames a block may have.

    Attributes:
        open: the block being generated, None between blocks.
        expected: start of the next block.
    """

    def __init__(self, layers: int, most_frames: int) -> None:
        self.layers = layers
        self.most_frames = most_frames
        self.open: Block | None = None
        self.expected = 0

    def find(self, start_frame: int, frames: int) -> Block | None:
        """The open block when a call belongs to it, None when the call begins the next block.

        Raises:
            RuntimeError: ``start_frame`` is neither the open block's nor, between blocks, the next one's.
            ValueError: the number of frames is not allowed, or not the open block's.
        """
        check_int("start_frame", start_frame, 0)
        check_int("q's number of frames", frames, 1, self.most_frames)
        block = self.open
        if block is None:
            if start_frame != self.expected:
                relation = "earlier" if start_frame < self.expected else "later"
                raise RuntimeError(
                    f"start_frame {start_frame} is {relation} than the next block's, {self.expected}: blocks follow "
                    "one another without a gap, and a finished block is final"
                )
            return None
        if start_frame > block.start:
            raise RuntimeError(
                f"start_frame {start_frame} is later than the current block's, {block.start}: call "
                f"finish({block.start}, ...) first"
            )
        if start_frame < block.start:
            raise RuntimeError(f"start_frame {start_frame} is earlier than the current block's, {block.start}")
        if block.remembered:
            raise RuntimeError(f"finish({block.start}, ...) failed half-way: call it again before attending")
        if frames != block.frames:
            raise ValueError(f"q must hold the current block's {block.frames} frames in every call, got {frames}")
        return block

    def finishable(self, start_frame: int) -> Block:
        """The open block, when it starts there and every layer has attended; else raises `RuntimeError`."""
        check_int("start_frame", start_frame, 0)
        block = self.open
        if block is None or block.start != start_frame:
            current = "no block has begun" if block is None else f"the current block starts at {block.start}"
            raise RuntimeError(f"start_frame {start_frame} cannot be finished: {current}")
        missing = sorted(set(range(self.layers)) - block.layers)
        if missing:
            raise RuntimeError(
                f"the block at start_frame {start_frame} cannot be finished: layers {missing} have not attended"
            )
        return block

    def close(self, block: Block) -> None:
        """The block is final."""
        self.open, self.expected = None, block.end
