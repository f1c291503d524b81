"""Window state: which frame each window slot holds, and what must be placed there before a block attends.

The state is one int64 tensor ``(samples, 4, window)``; its rows are

====================  =======================================================================================
`FRAME`               frame in the slot, the block's own frames included; -1 for an empty slot
`POSITION`            temporal rotary position of the slot's key while this block is generated
`SOURCE`              pool slot of the canonical page that must be placed here; -1 for nothing to place
`STAGED`              row of the staging buffer whose canonical key must be placed here; -1 for none
====================  =======================================================================================

`SOURCE` and `STAGED` are the block's placement plan, carried out once per layer. Slots are ordered sink, local,
memory and stay compact: slots ``0 .. count-1`` are occupied, the others empty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .config import local_frames, memory_position, temporal_position, window_slot

FRAME, POSITION, SOURCE, STAGED = 0, 1, 2, 3
STATE_ROWS = 4


def empty_window_state(samples: int, window: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """State of a window in which nothing has been attended to: ``(samples, 4, window)`` int64, all -1."""
    return torch.full((samples, STATE_ROWS, window), -1, dtype=torch.int64, device=device)


def advance_window(
    state: torch.Tensor,
    chosen: torch.Tensor,
    frame_slot: torch.Tensor | Callable[[int], int],
    start_frame: int,
    frames: int,
    *,
    sink: int,
    top_k: int,
    staging_rows: int,
    position_rule: str = "slot",
) -> torch.Tensor:
    """Window state for the block that starts at ``start_frame``, a function of the last state and the choice alone.

    A chosen frame that the window already holds keeps its slot. Newcomers take the freed memory slots in ascending
    order, by rank. When fewer frames are chosen than before, the page in the last occupied slot fills the first hole.

    Args:
        state: ``(B, 4, W)`` int64, the previous block's state; not changed.
        chosen: ``(B, K)`` int64, chosen frames, most similar first; -1 where there is none.
        frame_slot: ``(B, F)`` int64, pool slot of each frame's canonical page; -1 where it has none. Or a function of
            the frame alone.
        start_frame: first frame of the block.
        frames: frames in the block, ``n``.
        staging_rows: rows of the staging buffer; frame ``f`` is staged in row ``f % staging_rows``.

    Returns:
        The new state, ``(B, 4, W)`` int64.

    Raises:
        RuntimeError: ``state`` lacks a frame of the local part (a block was skipped), or a chosen frame has no
            resident page.
    """
    window = state.shape[2]
    local = window - sink - top_k
    end = start_frame + frames
    # Sink and local part: the same in every sample, each frame in a slot that is a function of its number.
    fixed = [*range(min(sink, end)), *local_frames(start_frame, frames, sink, local)]
    plan = [
        (
            frame,
            window_slot(frame, sink, local),
            temporal_position(frame, start_frame, frames, window, sink, top_k, position_rule),
        )
        for frame in fixed
    ]
    previous, wanted = state.tolist(), chosen.tolist()
    page_slots = [frame_slot] * len(previous) if callable(frame_slot) else [_lookup(row) for row in frame_slot.tolist()]
    result = [[[-1] * window for _ in range(STATE_ROWS)] for _ in previous]
    for old, new, ranked, page_slot in zip(previous, result, wanted, page_slots, strict=True):
        for frame, slot, position in plan:
            new[FRAME][slot], new[POSITION][slot] = frame, position
            if frame >= start_frame:
                continue
            if old[FRAME][slot] != frame:
                raise RuntimeError(
                    f"window_state must hold frame {frame} in slot {slot} when a block starts at start_frame "
                    f"{start_frame}, got {old[FRAME][slot]}: every block from frame 0 on must be attended to, in order"
                )
            if old[POSITION][slot] != position:
                new[STAGED][slot] = frame % staging_rows
        memory = _assign_memory(old[FRAME][window - top_k :], [frame for frame in ranked if frame >= 0])
        for offset, (frame, arrives) in enumerate(memory):
            slot = window - top_k + offset
            new[FRAME][slot], new[POSITION][slot] = frame, memory_position(frame, position_rule)
            if arrives:
                new[SOURCE][slot] = page_slot(frame)
                if new[SOURCE][slot] < 0:
                    raise RuntimeError(f"frame_slot must give a page for the retrieved frame {frame}, got none")
    return torch.tensor(result, dtype=torch.int64, device=state.device)


def memory_arrivals(state: torch.Tensor, chosen: torch.Tensor) -> set[int]:
    """Frames whose canonical page some sample must place when `advance_window` goes from ``state`` to ``chosen``.

    Args:
        state: ``(B, 4, W)`` int64, the previous block's state.
        chosen: ``(B, K)`` int64; -1 where there is none.
    """
    window, top_k = state.shape[2], chosen.shape[1]
    memory = state[:, FRAME, window - top_k :].tolist()
    return {
        frame
        for old, ranked in zip(memory, chosen.tolist(), strict=True)
        for frame, arrives in _assign_memory(old, [frame for frame in ranked if frame >= 0])
        if arrives
    }


def _lookup(slots: list[int]) -> Callable[[int], int]:
    return lambda frame: slots[frame] if frame < len(slots) else -1


def _assign_memory(old: list[int], chosen: list[int]) -> list[tuple[int, bool]]:
    """Frame of each memory slot from the first on, and whether its page must be placed there."""
    slots = [frame if frame in chosen else -1 for frame in old]
    stayed = set(slots)
    arrived: set[int] = set()
    for frame in chosen:
        if frame not in stayed:
            slots[slots.index(-1)] = frame
            arrived.add(frame)
    while slots and slots[-1] < 0:
        slots.pop()
    while -1 in slots:  # the last page moves into the first hole, so that what is attended to stays one run
        frame = slots.pop()
        slots[slots.index(-1)] = frame
        arrived.add(frame)
        while slots and slots[-1] < 0:
            slots.pop()
    return [(frame, frame in arrived) for frame in slots]


def occupied_slots(state: torch.Tensor) -> torch.Tensor:
    """Slot table for `window_attend`: ``(B, W)`` int64, the slot's number where it holds a frame, else -1."""
    numbers = torch.arange(state.shape[2], device=state.device)
    return torch.where(state[:, FRAME] >= 0, numbers, -1)


def check_state(state: torch.Tensor, *, slots: int, staging_rows: int, positions: int, count: int | None) -> None:
    """Checks a window state that a caller may have made, before anything is placed by it.

    Args:
        state: ``(B, 4, W)`` int64.
        slots: slots of the pool; canonical pages lie in ``W .. slots-1``.
        staging_rows: rows of the staging buffer.
        positions: rows of the rotary table.
        count: occupied slots in every sample, when the caller says so.

    Raises:
        ValueError: a number is out of range, the occupied slots are not the first ones, or ``count`` is not their
            number.
    """
    window = state.shape[2]
    for sample, rows in enumerate(state.tolist()):
        for slot, (frame, position, source, staged) in enumerate(zip(*rows, strict=True)):
            where = f"window_state of sample {sample}, slot {slot}:"
            if frame >= 0 and position >= positions:
                raise ValueError(f"rope must reach temporal position {position}, got a table of {positions} positions")
            if frame >= 0 and position < 0:
                raise ValueError(f"{where} position must lie between 0 and {positions - 1}, got {position}")
            if source != -1 and not window <= source < slots:
                raise ValueError(f"{where} source must be -1 or lie between {window} and {slots - 1}, got {source}")
            if not -1 <= staged < staging_rows:
                raise ValueError(f"{where} staging row must lie between -1 and {staging_rows - 1}, got {staged}")
        occupied = [frame >= 0 for frame in rows[FRAME]]
        if occupied != [slot < sum(occupied) for slot in range(window)]:
            raise ValueError(
                f"window_state of sample {sample}: the occupied slots must be the first ones, got frames {rows[FRAME]}"
            )
        if count is not None and sum(occupied) != count:
            raise ValueError(
                f"count must be the number of occupied slots, the first ones, in every sample; got {count}, but "
                f"window_state of sample {sample} holds {rows[FRAME]}"
            )
