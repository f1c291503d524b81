"""`retrieve_attend` in resident mode: every candidate has a page in the pool, and the host waits for nothing.

The sequence is that of `chain.retrieve_attend`, with everything that depends on a number kept on the device: the
caller may capture a call in a CUDA graph and change ``start_frame``, ``window_state``, ``index_length``, the index and
the pool in place between replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..chain import choose_frames, place_window
from .assign_window import assign_window
from .place_frames import place_frames
from .topk_retrieve import topk_retrieve
from .window_attend import attend_run, window_attend
from .window_plan import check_dtype
from .write_frames import write_frames

# Torch takes fewer than 255 characters on a GPU (aten/src/ATen/native/cuda/TensorCompare.cu).
MESSAGE = (
    "window_state must hold all frames up to start_frame (attend to every block in order, with select=True on its "
    "first call), frame_slot a page of each retrieved frame, rope every position; count must be the number of occupied "
    "slots"
)


class Steps(NamedTuple):
    """The steps that an engine brings: functions with the arguments of `reference`'s, but for the last.

    Attributes:
        attend: takes q, pool_layer, counts ``(B,)`` on the device, count (the same on the host, or None), most (no
            count is greater), scale, return_lse; attends to the slots ``0 .. counts[b] - 1``.
    """

    topk_retrieve: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    write_frames: Callable[..., torch.Tensor]
    place_frames: Callable[..., None]
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def attend_counted(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    counts: torch.Tensor,
    count: int | None,
    most: int,
    scale: float | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton's `Steps.attend`."""
    if count is None:
        return attend_run(q, pool_layer, counts, most, scale, return_lse)
    return window_attend(q, pool_layer, None, count, scale, return_lse)


STEPS = Steps(topk_retrieve, write_frames, place_frames, attend_counted)


def retrieve_attend(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Retrieval, placement, rotation and attention in one call; arguments as of `run_chain` after ``steps``."""
    check_dtype(args[0] if args else options["q"])  # before the first step changes anything
    return run_chain(STEPS, *args, **options)


def run_chain(
    steps: Steps,
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
    """Selects (once a block), places (once a block and layer), writes, attends; no host synchronisation on a GPU.

    Arguments and result are those of the op. Selecting again for a block that is in the window already changes
    nothing.

    Raises:
        RuntimeError: on a CPU, before anything is changed, when ``window_state`` cannot be used. On a GPU a
            device-side assertion fails instead: nothing after it runs, and the process needs a new CUDA context.
    """
    window = window_state.shape[2]
    chosen = None
    if select:
        chosen = choose_frames(
            steps,
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
    plan = assign_window(
        window_state,
        chosen,
        frame_slot,
        start_frame,
        q.shape[1] // pool_layer.shape[3],
        sink=sink,
        top_k=top_k,
        staging_rows=staging.shape[1],
        pool_slots=pool_layer.shape[2],
        positions=rope.shape[0],
        position_rule=position_rule,
        count=count,
    )
    torch._assert_async(plan.ok, MESSAGE)
    if select:
        window_state.copy_(plan.state)
    if place:
        place_window(steps, pool_layer, staging, plan.state, rope, rope_split)
    rotated = steps.write_frames(
        q,
        k,
        v,
        pool_layer,
        staging,
        plan.slots,
        plan.staging_rows,
        plan.positions,
        rope,
        rope_split,
        grid,
        q_weight,
        k_weight,
        eps,
    )
    return steps.attend(rotated, pool_layer, plan.counts, count, window, scale, return_lse)
