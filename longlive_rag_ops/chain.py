"""`retrieve_attend` as a sequence of the other ops, written once for every engine that has no fused form of it.

The oracle and the dense engine share this sequence, so holding one against the other says nothing about it; what does
is the brute-force simulator of the tests, and the recorded traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from .assignment import FRAME, POSITION, SOURCE, STAGED, advance_window, check_state, occupied_slots
from .config import window_slot


def retrieve_attend(
    engine: ModuleType,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool_layer: torch.Tensor,
    staging: torch.Tensor,
    window_state: torch.Tensor,
    index: torch.Tensor,
    index_ids: torch.Tensor,
    index_length: torch.Tensor,
    frame_slot: torch.Tensor,
    start_frame: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
    grid: Sequence[int],
    *,
    sink: int,
    top_k: int,
    recent_exclude: int,
    select: bool,
    place: bool,
    count: int | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    position_rule: str = "slot",
    index_normalized: bool = False,
    return_lse: bool = False,
    index_scale: torch.Tensor | None = None,
    min_score: float | None = None,
    diversity: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select (once a block), place (once a block and layer), write, attend; ``engine`` gives the single steps.

    Everything is checked before anything is written. Selecting again for a block that is already in the window
    changes nothing, so that a call that failed half-way can be made again.
    """
    start, window = int(start_frame), window_state.shape[2]
    block = range(start, start + q.shape[1] // pool_layer.shape[3])
    slots = [window_slot(frame, sink, window - sink - top_k) for frame in block]
    state = window_state
    if select and not _holds(window_state, block, slots):
        chosen = choose_frames(
            engine,
            index,
            index_ids,
            index_length,
            start_frame,
            window=window,
            sink=sink,
            top_k=top_k,
            recent_exclude=recent_exclude,
            normalized=index_normalized,
            index_scale=index_scale,
            min_score=min_score,
            diversity=diversity,
        )
        state = advance_window(
            window_state,
            chosen,
            frame_slot,
            start,
            len(block),
            sink=sink,
            top_k=top_k,
            staging_rows=staging.shape[1],
            position_rule=position_rule,
        )
    if not _holds(state, block, slots):
        raise RuntimeError(
            f"window_state must hold the block's frames {list(block)} (start_frame {start}) in slots {slots} of every "
            f"sample, got {state[:, FRAME, slots].tolist()}: pass select=True on one call a block, before any other"
        )
    check_state(state, slots=pool_layer.shape[2], staging_rows=staging.shape[1], positions=rope.shape[0], count=count)
    if state is not window_state:
        window_state.copy_(state)
    if place:
        place_window(engine, pool_layer, staging, state, rope, rope_split)
    rotated = engine.write_frames(
        q,
        k,
        v,
        pool_layer,
        staging,
        torch.tensor(slots, device=q.device),
        torch.tensor([frame % staging.shape[1] for frame in block], device=q.device),
        state[0, POSITION, slots],
        rope,
        rope_split,
        grid,
        q_weight,
        k_weight,
        eps,
    )
    table = occupied_slots(state) if count is None else None
    out, lse = engine.window_attend(rotated, pool_layer, table, count, scale, return_lse)
    return out, lse


def _holds(state: torch.Tensor, block: range, slots: list[int]) -> bool:
    """Whether every sample has the block's frames in their slots."""
    return all(row == list(block) for row in state[:, FRAME, slots].tolist())


def choose_frames(
    engine: Any,
    index: torch.Tensor,
    index_ids: torch.Tensor,
    index_length: torch.Tensor,
    start_frame: torch.Tensor,
    *,
    window: int,
    sink: int,
    top_k: int,
    recent_exclude: int,
    normalized: bool,
    index_scale: torch.Tensor | None,
    min_score: float | None,
    diversity: float,
) -> torch.Tensor:
    """Frames to retrieve for the block at ``start_frame``, ``(B, K)`` int64, most similar first, -1 for none.

    The query is the embedding of the frame before the block, found by its id. A sample without one (the first block, a
    non-finite embedding) retrieves nothing. What depends on a number stays on the device: the host waits for nothing
    that ``engine.topk_retrieve`` does not wait for.
    """
    samples, rows, channels = index.shape
    if top_k == 0 or rows == 0:
        return index_ids.new_full((samples, top_k), -1)
    start = start_frame.reshape(1)
    used = torch.arange(rows, device=index.device) < index_length.reshape(1)
    newest = (index_ids == start - 1) & used  # (B, N), at most one row a sample
    row = newest.int().argmax(1, keepdim=True)
    query = index.gather(1, row[:, :, None].expand(-1, -1, channels))[:, 0]
    if index_scale is not None:
        query = query.float() * index_scale.gather(1, row).float()
    ids, _ = engine.topk_retrieve(
        query.masked_fill(~newest.any(1, keepdim=True), torch.nan),
        index,
        index_ids,
        index_length,
        (start - window).clamp(min=0) + sink,  # config.candidate_end
        top_k,
        sink,
        recent_exclude,
        None,
        normalized,
        index_scale,
        min_score,
        diversity,
    )
    return ids


def place_window(
    engine: Any,
    pool_layer: torch.Tensor,
    staging: torch.Tensor,
    window_state: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
) -> None:
    """Carries out the placement plan of ``window_state`` in one layer."""
    numbers = torch.arange(window_state.shape[2], device=window_state.device).expand_as(window_state[:, FRAME])
    position = window_state[:, POSITION]
    engine.place_frames(pool_layer, numbers, window_state[:, SOURCE], position, rope, rope_split)
    engine.place_frames(pool_layer, numbers, window_state[:, STAGED], position, rope, rope_split, staging)
