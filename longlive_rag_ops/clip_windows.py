"""The windows of a whole clip at once, for training: what every block attends to, and at which positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .assignment import FRAME, POSITION, advance_window, empty_window_state
from .config import WindowConfig, candidate_end, check_int
from .index import FrameIndex
from .modes import normal_tensors
from .ops.checks import FLOATS, check
from .transfer import device_copy


@dataclass(frozen=True)
class BlockWindow:
    """What one block of a clip attends to.

    Attributes:
        start, frames: its first frame and how many there are.
        table: for each sample the frames in its window, the block's own included. Padded with a frame of the block
            where a sample holds fewer than another.
        positions: ``(B, count)`` int64, temporal rotary positions of these frames.
        own: ``(frames,)`` int64, temporal positions of the block's own frames, the same in every sample.
        held: ``(B, count)`` bool, False where padded; None when nothing is.
        reach: the largest of all positions plus one: rows that a rotary table must have.
    """

    start: int
    frames: int
    table: list[list[int]]
    positions: torch.Tensor
    own: torch.Tensor
    held: torch.Tensor | None
    reach: int


@normal_tensors
def clip_windows(
    config: WindowConfig,
    frames: int,
    batch: int,
    embeddings: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> list[BlockWindow]:
    """The windows of all blocks of a clip, as `MemoryWindow` would hold them were the clip generated block by block.

    The choice of frames waits for the device once. All layers attend to the same windows: make them once per batch and
    hand them to every layer as ``windows``.

    Args:
        config: sizes of the window. Blocks have ``frames_per_block`` frames, the last one what is left.
        frames: of the clip, ``F``, which starts at frame 0 of its video.
        batch: samples, ``B``.
        embeddings: ``(B, F, E)`` floating point, one a frame; not looked at when ``top_k`` is 0. No gradient flows
            through the choice.
        device: of the tensors returned; the embeddings' when not given, without embeddings the CPU.

    Raises:
        TypeError, ValueError: the embeddings are missing or not allowed, or a size is not.
    """
    check_int("frames", frames, 1)
    check_int("batch", batch, 1)
    starts = range(0, frames, config.frames_per_block)
    if config.top_k == 0:
        chosen = torch.empty(len(starts), batch, 0, dtype=torch.int64)
    elif embeddings is None:
        raise ValueError(f"embeddings must be given when top_k is {config.top_k}, got None")
    else:
        check("embeddings", embeddings, (batch, frames, None), FLOATS, embeddings)
        check_int("embeddings' size", embeddings.shape[2], 1)
        chosen = _choose(config, starts, embeddings)
    where = torch.device(device or (embeddings.device if embeddings is not None else "cpu"))
    state, windows = empty_window_state(batch, config.window), []
    for start, choice in zip(starts, chosen, strict=True):
        n = min(config.frames_per_block, frames - start)
        state = advance_window(
            state,
            choice,
            lambda frame: 0,  # every frame of a clip has a page
            start,
            n,
            sink=config.sink,
            top_k=config.top_k,
            staging_rows=config.staging_rows,
            position_rule=config.position_rule,
        )
        windows.append(_block_window(state, start, n, where))
    return windows


def _choose(config: WindowConfig, starts: Sequence[int], embeddings: torch.Tensor) -> torch.Tensor:
    """Frames retrieved for each block, ``(blocks, B, K)`` int64 on the host, by the index and the op of the window."""
    batch, frames, width = embeddings.shape
    index = FrameIndex(batch, width, embeddings.dtype, embeddings.device, most=frames)
    # The whole clip at once: what a block may choose ends long before it, so later rows do no harm.
    index.put(range(frames), embeddings.detach())
    chosen = [torch.full((batch, config.top_k), -1, dtype=torch.int64, device=embeddings.device)]
    for start in starts[1:]:
        end = candidate_end(start, config.window, config.sink)
        ids, _ = torch.ops.longlive.topk_retrieve(
            index.embedding(start - 1),
            index.embeddings,
            index.ids,
            index.length,
            torch.full_like(index.length, end),
            config.top_k,
            first_frame=config.sink,
            recent_exclude=config.recent_exclude,
            normalized=True,
            min_score=config.min_score,
            diversity=config.diversity,
        )
        chosen.append(ids)
    return torch.stack(chosen).cpu()


def _block_window(state: torch.Tensor, start: int, frames: int, device: torch.device) -> BlockWindow:
    """The window of ``state (B, 4, W)``, in which occupied slots come first."""
    held = state[:, FRAME] >= 0
    count = int(held.sum(1).max())
    held = held[:, :count]
    at = {int(frame): int(position) for frame, position in zip(*state[0, [FRAME, POSITION]].tolist(), strict=True)}
    block = range(start, start + frames)
    table = torch.where(held, state[:, FRAME, :count], start).tolist()
    positions = torch.where(held, state[:, POSITION, :count], at[start])
    return BlockWindow(
        start,
        frames,
        table,
        device_copy(positions, device),
        device_copy(torch.tensor([at[frame] for frame in block]), device),
        None if bool(held.all()) else device_copy(held, device),
        int(positions.max()) + 1,
    )
