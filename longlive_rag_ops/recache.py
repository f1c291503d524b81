"""Finished frames that are encoded once more: which window slots they get, at which positions, who attends to what.

After a change of prompt a backbone encodes its newest frames again, in one bidirectional forward. Memory is off in that
forward: it attends to the sink and to the frames that are encoded. Their pages then are a new *generation*.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .assignment import FRAME, POSITION, SOURCE, STAGED
from .config import WindowConfig, check_int, temporal_position, window_slot


@dataclass
class Recache:
    """A forward over finished frames, as it is planned for all layers.

    Attributes:
        start, frames: first frame and how many there are.
        slots: window slot of each frame, -1 for a frame that only asks: its page is not in the window.
        positions: temporal position of each frame.
        staging_rows: row of the staging buffer of each frame, -1 for none.
        attended: window slots that the forward attends to, ascending.
        state: ``(B, 4, W)``, the window afterwards.
        layers: layers that have attended.
    """

    start: int
    frames: int
    slots: list[int]
    positions: list[int]
    staging_rows: list[int]
    attended: list[int]
    state: torch.Tensor
    layers: set[int] = field(default_factory=set)

    @property
    def run(self) -> int | None:
        """How many slots are attended to when they are the first ones, else None."""
        return len(self.attended) if self.attended == list(range(len(self.attended))) else None

    @property
    def numbers(self) -> range:
        """The frames."""
        return range(self.start, self.start + self.frames)


def plan_recache(
    state: torch.Tensor, start_frame: int, frames: int, finished: int, config: WindowConfig, renew_sink: bool
) -> Recache:
    """Plans the forward over frames ``start_frame ..``; all of them are finished.

    Sink frames among them stay sink frames. Of the others the newest ``window - sink`` are in the window, the newest
    ``local`` of these in their own slots, older ones where memory was. Under rule ``slot`` they sit at ``W-m .. W-1``
    once the window is full; those that become the sink at ``0 .. S-1``, as every sink.

    Args:
        state: ``(B, 4, W)`` int64 on the host, of the last block; not changed.
        finished: frames that are finished.
        renew_sink: the first ``sink`` frames that are encoded become the window's sink.

    Raises:
        ValueError: frames that are not finished, or more than the window holds, or that cannot become the sink.
    """
    check_int("start_frame", start_frame, 0)
    check_int("frames to cache again", frames, 1)
    window, sink, local = config.window, config.sink, config.local
    end = start_frame + frames
    if end > finished:
        raise ValueError(
            f"start_frame and q must name finished frames (0 .. {finished - 1}) to cache again, got {start_frame} .. "
            f"{end - 1}"
        )
    if frames > window:
        raise ValueError(f"q must hold at most window ({window}) frames to cache again, got {frames}")
    renewed = range(start_frame, start_frame + sink) if renew_sink and start_frame > 0 else range(0)
    if renewed and (start_frame < sink or frames < sink):
        raise ValueError(
            f"renew_sink must leave the old sink: start_frame must be 0 or at least {sink} and q hold at least {sink} "
            f"frames, got start_frame {start_frame} and {frames} frames"
        )
    oldest_local = finished + 1 - local  # that the next block may attend to; a frame has one page in the window
    if renewed and renewed.stop > oldest_local:
        raise ValueError(
            f"renew_sink must take frames that have left the local part: start_frame must be 0 or at most "
            f"{oldest_local - sink}, got {start_frame}"
        )
    numbers = range(start_frame, end)
    kept = [frame for frame in numbers if frame >= sink and frame not in renewed][-(window - sink) :]
    own = set(kept[-local:])
    newest = own if end == finished else set()  # others have no part in the next block's window
    spare = iter(range(window - config.top_k, window))
    slots, positions, rows = [], [], []
    for frame in numbers:
        if frame in renewed:
            slot = frame - start_frame
        elif frame < sink or frame in own:
            slot = window_slot(frame, sink, local)
        else:
            slot = next(spare) if frame in kept else -1
        slots.append(slot)
        # Who becomes the sink sits where later blocks have it. Memory has no part in this window: top_k is 0.
        role = slot if frame in renewed and config.position_rule != "absolute" else frame
        positions.append(temporal_position(role, start_frame, frames, window, sink, 0, config.position_rule))
        # A row that an older frame wrote would be a local frame's, which the next block may place anew.
        rows.append(frame % config.staging_rows if frame in newest else -1)
    attended = sorted({*range(min(sink, end)), *(slot for slot in slots if slot >= 0)})
    return Recache(
        start_frame,
        frames,
        slots,
        positions,
        rows,
        attended,
        _state_after(state, numbers, slots, positions, newest, config),
    )


def abandoned_state(plan: Recache, state: torch.Tensor, config: WindowConfig) -> torch.Tensor:
    """The window ``(B, 4, W)`` after a forward that was not finished: slots that it may have written hold nothing."""
    return _state_after(state, plan.numbers, plan.slots, plan.positions, set(), config)


def _state_after(
    state: torch.Tensor, numbers: range, slots: list[int], positions: list[int], local: set[int], config: WindowConfig
) -> torch.Tensor:
    """Slots that were written hold their sink or local frame, or nothing: what was there before is lost."""
    after = state.clone()
    after[:, SOURCE], after[:, STAGED] = -1, -1
    memory = after[:, FRAME, config.window - config.top_k :]
    stale = (memory >= numbers.start) & (memory < numbers.stop)  # an older generation
    memory[stale] = -1
    for frame, slot, position in zip(numbers, slots, positions, strict=True):
        if slot >= config.sink:
            after[:, FRAME, slot] = frame if frame in local else -1
            after[:, POSITION, slot] = position if frame in local else -1
    # Memory slots are in use from the first one on; who was behind an emptied one is placed anew.
    holes = (after[:, FRAME, config.window - config.top_k :] < 0).cumsum(1) > 0
    for row in (FRAME, POSITION):
        after[:, row, config.window - config.top_k :][holes] = -1
    return after
