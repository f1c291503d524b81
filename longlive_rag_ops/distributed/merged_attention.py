"""Attention to frames that other ranks keep, without fetching them: each rank attends to its own, the parts are joined.

A rank's window has the sink and the local frames, as on every rank, and in its memory slots the chosen frames that it
keeps itself. It attends to these and to its share of the sink and local frames, so that every frame of the window is
attended to by exactly one rank. Output and log-sum-exp of the parts go through collectives of a fixed size, whatever
was chosen, and are joined by ``torch.ops.longlive.merge_attention`` in rank order: the same bits on every rank.

Parts travel as int32 words, output and log-sum-exp of a token and head side by side: one message, which no step on the
way can round, NaN included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from ..assignment import POSITION, SOURCE, STAGED
from ..config import WindowConfig, local_frames, window_slot
from ..ops.checks import FLOATS, check
from ..reference import lse_dtype
from ..transfer import device_copy
from ..window_pieces import PARTS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..window import MemoryWindow
    from .failure import Collectives

# Called all_gather_tensor before PyTorch 2.13, which deprecates that name.
_gather_along = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor


def frames_of_others(
    config: WindowConfig,
    start_frame: int,
    frames: int,
    chosen: Sequence[Sequence[int]],
    owner: Callable[[int], int],
    ranks: int,
    rank: int,
) -> list[int]:
    """The sink and local frames that a rank leaves to others, for a block at ``start_frame``.

    They are dealt to whom the choice gives least: one after the other goes to the rank with the fewest pages so far,
    the lowest of these. So the slowest rank attends to ``ceil(W / N)`` frames, or, where the choice alone is more than
    that, to its chosen frames only.

    Args:
        config: of the window.
        start_frame, frames: of the block.
        chosen: for each sample, the frames chosen for the block, by all ranks; -1 is passed over. It must be the choice
            that was agreed on: were it another on another rank, a frame would be attended to twice or not at all.
        owner: the rank that keeps a frame.
        ranks, rank: how many there are, and which one is asked for.

    Returns:
        Frames, ascending: what `attend_merged` takes as ``exclude``.
    """
    pages = [0] * ranks
    for row in chosen:
        for frame in row:
            if frame >= 0:
                pages[owner(frame)] += 1
    left = []
    end = start_frame + frames
    for frame in (*range(min(config.sink, end)), *local_frames(start_frame, frames, config.sink, config.local)):
        taker = pages.index(min(pages))
        pages[taker] += len(chosen)
        if taker != rank:
            left.append(frame)
    return left


def pack_part(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """A part of attention as words, token by token.

    Args:
        out: ``(B, S, H, D)``.
        lse: ``(B, H, S)``.

    Returns:
        ``(S, B, H, words)`` int32, contiguous: the bits of ``D`` channels, then those of the log-sum-exp.
    """
    channels = out.transpose(0, 1).contiguous().view(torch.int32)
    return torch.cat([channels, lse.permute(2, 0, 1).contiguous().unsqueeze(-1).view(torch.int32)], -1)


def unpack_parts(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of packed parts: ``(P, S, B, H, words)`` int32 to outs ``(P, B, S, H, D)``, lses ``(P, B, H, S)``."""
    kept = lse_dtype(dtype)
    words = rows.shape[-1] - kept.itemsize // rows.dtype.itemsize
    outs = rows[..., :words].view(dtype).transpose(1, 2)
    return outs, rows[..., words:].view(kept)[..., 0].permute(0, 2, 3, 1)


def merge_over_ranks(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: ProcessGroup,
    *,
    collectives: Collectives | None = None,
    engine: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the ranks' parts of attention in rank order; every rank of the group calls it and gets the same bits.

    Two ranks exchange their parts and both join them. More of them join a slice of the tokens each, which brings them
    ``2/N`` of the other parts instead of all (`traffic.part_rows_received` counts), and exchange what is joined: the
    result is the same, every token's parts are joined in rank order.

    Sizes of the collectives depend on shapes alone. Under ``torch.compile`` they are functional ones, which trace; only
    the group's own time-out holds for them.

    Args:
        out: ``(B, S, H, D)`` float64, float32, float16 or bfloat16, the rank's part; an even number of channels.
        lse: ``(B, H, S)`` float32 (float64 for float64), -inf where the part is empty.
        group: the ranks, in whose order the parts are joined.
        collectives: of the mesh, whose time-out holds; without it functional collectives, as under ``torch.compile``.
        engine: as the ops take it.

    Returns:
        out ``(B, S, H, D)``, lse ``(B, H, S)`` over all parts.

    Raises:
        TypeError, ValueError: a dtype or shape is not allowed.
        RankFailure: a rank has not answered within the time-out of ``collectives``.
    """
    check("out", out, (None, None, None, None), FLOATS, out)
    samples, tokens, heads, channels = out.shape
    check("lse", lse, (samples, heads, tokens), (lse_dtype(out.dtype),), out)
    if channels % 2:
        raise ValueError(f"out must have an even number of channels, got {channels}")
    ranks = group.size()
    if ranks == 1 or tokens == 0:
        return torch.ops.longlive.merge_attention(out[None], lse[None], engine=engine)
    rows = pack_part(out, lse)
    if ranks == 2:
        parts = _gather(rows, group, collectives).unflatten(0, (ranks, tokens))
        return torch.ops.longlive.merge_attention(*unpack_parts(parts, out.dtype), engine=engine)
    size = -(-tokens // ranks)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, size * ranks - tokens))
    slices = _swap(rows, group, collectives).unflatten(0, (ranks, size))
    joined = torch.ops.longlive.merge_attention(*unpack_parts(slices, out.dtype), engine=engine)
    outs, lses = unpack_parts(_gather(pack_part(*joined), group, collectives)[None, :tokens], out.dtype)
    return outs[0].contiguous(), lses[0].contiguous()


def attend_merged(
    window: MemoryWindow,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_frame: int,
    grid: Sequence[int],
    *,
    exclude: Collection[int],
    group: ProcessGroup,
    collectives: Collectives | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one block in one layer over the windows of all ranks: `MemoryWindow.attend` in two halves and the
    joining.

    Args:
        window: whose memory slots hold the chosen frames that this rank keeps.
        layer, q, k, v, start_frame, grid, scale: as `MemoryWindow.attend` takes them, the same on all ranks.
        exclude: the sink and local frames that other ranks attend to, see `frames_of_others`.
        group, collectives: the ranks that frames are dealt to, see `merge_over_ranks`.

    Returns:
        out ``(B, n*T, Hq, D)``, lse ``(B, Hq, n*T)``, the same on every rank.
    """
    rotated = window.write(layer, q, k, v, start_frame, grid)
    out, lse = window._attend_written(layer, rotated, exclude=exclude, scale=scale, return_lse=True)
    return merge_over_ranks(out, lse, group, collectives=collectives, engine=window.engine)


def merged_arguments(
    window: MemoryWindow,
    layer: int,
    start_frame: int,
    grid: Sequence[int],
    *,
    exclude: Collection[int] | None = None,
    frames: int | None = None,
    place: bool | None = None,
) -> dict[str, Any]:
    """Everything that `retrieve_attend_merged` takes after q, k, v and the group, for one call, which must follow.

    To be taken outside of a compiled region and passed in, as with `MemoryWindow.arguments`, whose ``frames`` and
    ``place`` it has. ``exclude`` as in `attend_merged`; None for what the window's mesh makes it. The group is
    ``window.mesh.frame_group``.
    """
    grid, config = window._checked_grid(grid), window.config
    block = window._block_at(start_frame, config.frames_per_block if frames is None else frames)
    taken = window._arguments(block, layer, grid, place=block.placements > 0 if place is None else place)
    numbers = range(block.start, block.end)
    slots = [window_slot(frame, config.sink, config.local) for frame in numbers]
    rows = [frame % config.staging_rows for frame in numbers]
    written = dict(zip(("slots", "staging_rows", "positions"), window._block_tables(block, slots, rows), strict=True))
    if exclude is None:
        if window._share is None:
            raise ValueError("exclude must be given for a window without a mesh, got None")
        exclude = window._share.others(window._history, block.start, block.frames)
    key = frozenset(PARTS), tuple(sorted(exclude))  # as `_attend_written` has it
    if key not in block.tables:
        block.tables[key] = device_copy(window._part_slots(block, PARTS, exclude), window.device)
    window._begin(block, layer, grid)
    kept = ("pool_layer", "staging", "window_state", "rope", "rope_split", "grid", "place", "engine")
    return {
        **{name: taken[name] for name in kept},
        **written,
        "window_slots": window._window_slots,
        "attended": block.tables[key],
    }


def retrieve_attend_merged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: ProcessGroup,
    *,
    pool_layer: torch.Tensor,
    staging: torch.Tensor,
    window_state: torch.Tensor,
    slots: torch.Tensor,
    staging_rows: torch.Tensor,
    positions: torch.Tensor,
    window_slots: torch.Tensor,
    attended: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
    grid: Sequence[int],
    place: bool,
    scale: float | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    engine: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attend_merged` does, of tensors alone: it traces under ``torch.compile(fullgraph=True)``.

    Args:
        q, k, v, scale, q_weight, k_weight, eps: as ``torch.ops.longlive.retrieve_attend`` takes them.
        group: the ranks that frames are dealt to.
        pool_layer, staging, rope, rope_split, grid, engine: of the window, see ``write_frames``; the first two mutated.
        window_state: ``(B, 4, W)`` int64, the block's plan, see `assignment`.
        slots, staging_rows, positions: of the block's frames, as ``write_frames`` takes them.
        window_slots: ``(B, W)`` int64, ``0 .. W-1`` in every sample.
        attended: ``(B, W)`` int64, the slots that this rank attends to, -1 for others.
        place: whether the block's pages are placed first.

    Returns:
        As `attend_merged`.
    """
    ops = torch.ops.longlive
    rotated = ops.write_frames(
        *(q, k, v, pool_layer, staging, slots, staging_rows, positions, rope, rope_split, grid),
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        engine=engine,
    )
    if place:
        for row, pages in ((SOURCE, None), (STAGED, staging)):
            ops.place_frames(
                *(pool_layer, window_slots, window_state[:, row], window_state[:, POSITION], rope, rope_split),
                k_pages=pages,
                engine=engine,
            )
    out, lse = ops.window_attend(rotated, pool_layer, attended, scale=scale, return_lse=True, engine=engine)
    return merge_over_ranks(out, lse, group, engine=engine)


def _gather(rows: torch.Tensor, group: ProcessGroup, collectives: Collectives | None) -> torch.Tensor:
    """Everybody's rows, one rank's after another's."""
    if collectives is None or torch.compiler.is_compiling():
        return functional.wait_tensor(_gather_along(rows, 0, group))
    found, pending = collectives.all_gather("gathering parts of attention", rows, group)
    pending.wait()
    return found.flatten(0, 1)


def _swap(rows: torch.Tensor, group: ProcessGroup, collectives: Collectives | None) -> torch.Tensor:
    """Of everybody's rows, in as many slices as ranks, the slices of this rank's number, in rank order."""
    if collectives is None or torch.compiler.is_compiling():
        return functional.wait_tensor(functional.all_to_all_single(rows, None, None, group))
    found = torch.empty_like(rows)
    begun = partial(dist.all_to_all_single, found, rows, group=group, async_op=True)
    collectives.begin("exchanging parts of attention", begun, group, (found, rows)).wait()
    return found
