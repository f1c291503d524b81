"""Which frames a block may retrieve, and which it does: by similarity, or by recency."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..config import WindowConfig, candidate_end
from ..index import FrameIndex

Chosen = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A block of latent frames from ``start`` on, and the frames that it may retrieve."""

    start: int
    eligible: range


def blocks(frames: int, config: WindowConfig) -> list[Block]:
    """The whole blocks of a clip of so many frames."""
    size, sink = config.frames_per_block, config.sink
    found = []
    for start in range(0, frames - size + 1, size):
        end = candidate_end(start, config.window, sink) - config.recent_exclude
        found.append(Block(start, range(sink, max(sink, end))))
    return found


def choosing_blocks(frames: int, config: WindowConfig) -> list[Block]:
    """Blocks that may retrieve more frames than they can. Others take all there are, whatever the rule."""
    return [block for block in blocks(frames, config) if len(block.eligible) > config.top_k]


def shortest_choosing(config: WindowConfig) -> int:
    """Frames of the shortest clip that has one of `choosing_blocks`."""
    size = config.frames_per_block
    start = config.window + config.recent_exclude + config.top_k + 1
    return -(-start // size) * size + size


def most_similar(embeddings: torch.Tensor, chosen_for: Iterable[Block], config: WindowConfig) -> list[Chosen]:
    """What a `MemoryWindow` retrieves for each block when it finished frames with these embeddings ``(frames, E)``.

    Returns:
        Frames most similar to frame ``start - 1``, most similar first, the older of equals first; at most ``top_k``.
    """
    frames, dim = embeddings.shape
    index = FrameIndex(1, dim, embeddings.dtype, most=frames)
    index.append(range(frames), embeddings[None])
    found = []
    for block in chosen_for:
        ids, _ = torch.ops.longlive.topk_retrieve(
            index.embedding(block.start - 1),
            index.embeddings,
            index.ids,
            index.length,
            torch.tensor([candidate_end(block.start, config.window, config.sink)]),
            config.top_k,
            first_frame=config.sink,
            recent_exclude=config.recent_exclude,
            normalized=True,
        )
        found.append(tuple(frame for frame in ids[0].tolist() if frame >= 0))
    return found


def newest(block: Block, count: int) -> Chosen:
    """The newest eligible frames, newest first."""
    return tuple(reversed(block.eligible[-count:])) if count else ()
