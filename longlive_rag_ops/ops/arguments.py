"""What the ops accept, one function an op, checked alike by the real and the fake implementations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..assignment import STATE_ROWS
from ..config import check_choice, check_position_rule
from .checks import (
    FLOATS,
    INTEGERS,
    LARGEST_FRAME,
    QUANTISED,
    check,
    check_finite,
    check_grid,
    check_pool,
    check_range,
    check_rotary,
    check_scalar,
    check_scale,
    check_values,
    has_readable_values,
)


def check_topk(
    query: torch.Tensor,
    index: torch.Tensor,
    index_ids: torch.Tensor,
    index_length: torch.Tensor,
    end_frame: torch.Tensor,
    k: int,
    first_frame: int,
    recent_exclude: int,
    exclude: torch.Tensor | None,
    index_scale: torch.Tensor | None,
    min_score: float | None,
    diversity: float,
) -> None:
    """Arguments of ``topk_retrieve``."""
    check("query", query, (None, None), FLOATS, query)
    check_range("query's embedding size", query.shape[1], 1)
    check_index(index, index_ids, index_length, index_scale, query, query.shape[0])
    check("index", index, (None, None, query.shape[1]), (*FLOATS, torch.int8), query)
    check_choice(min_score, diversity)
    check_scalar("end_frame", end_frame, query)
    check_range("k", k, 0)
    check_range("first_frame", first_frame, 0)
    check_range("recent_exclude", recent_exclude, 0)
    if exclude is not None:
        check("exclude", exclude, (query.shape[0], None), INTEGERS, query)


def check_index(
    index: torch.Tensor,
    index_ids: torch.Tensor,
    index_length: torch.Tensor,
    index_scale: torch.Tensor | None,
    like: torch.Tensor,
    samples: int,
) -> None:
    """The embedding matrix ``(B, N, E)``, its frame ids ``(B, N)``, its length on the device, int8 rows' factors."""
    check("index", index, (samples, None, None), (*FLOATS, torch.int8), like)
    check("index_ids", index_ids, (samples, index.shape[1]), INTEGERS, like)
    check_values("index_ids", index_ids, -(2**63), LARGEST_FRAME)
    if (index.dtype == torch.int8) != (index_scale is not None):
        need = "needs" if index_scale is None else "takes no"
        raise ValueError(f"index of dtype {index.dtype} {need} index_scale")
    if index_scale is not None:
        check("index_scale", index_scale, index_ids.shape, FLOATS, like)
    check_scalar("index_length", index_length, like)
    check_values("index_length", index_length, 0, index.shape[1])


def check_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pool_layer: torch.Tensor, staging: torch.Tensor
) -> int:
    """A block's q, k, v against the pool and the staging buffer; returns the frames in the block."""
    check_pool(pool_layer, q)
    samples, length, _, head_dim = q.shape
    tokens, kv_heads = pool_layer.shape[3], pool_layer.shape[4]
    check("k", k, (samples, length, kv_heads, head_dim), (q.dtype,), q)
    check("v", v, (samples, length, kv_heads, head_dim), (q.dtype,), q)
    check("staging", staging, (samples, None, tokens, kv_heads, head_dim), (q.dtype,), q)
    if tokens < 1 or length == 0 or length % tokens:
        raise ValueError(
            f"q must hold a whole number of frames of {tokens} tokens (the pool's tokens_per_frame), at least one; "
            f"got {length} tokens"
        )
    return int(length // tokens)


def check_weights(
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
) -> None:
    """RMSNorm weights over the model width; both or none."""
    if (q_weight is None) != (k_weight is None):
        given, missing = ("q_weight", "k_weight") if k_weight is None else ("k_weight", "q_weight")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if q_weight is not None and k_weight is not None:
        check("q_weight", q_weight, (q.shape[2] * q.shape[3],), FLOATS, q)
        check("k_weight", k_weight, (k.shape[2] * k.shape[3],), FLOATS, q)


def check_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool_layer: torch.Tensor,
    staging: torch.Tensor,
    slots: torch.Tensor,
    staging_rows: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
    grid: Sequence[int],
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
) -> None:
    """Arguments of ``write_frames``."""
    frames = check_block(q, k, v, pool_layer, staging)
    check_rotary(rope, rope_split, q.shape[3], q)
    check_grid(grid, pool_layer.shape[3], rope)
    check_weights(q_weight, k_weight, q, k)
    for name, table, limit, low in (
        ("slots", slots, pool_layer.shape[2], -1),
        ("staging_rows", staging_rows, staging.shape[1], -1),
        ("positions", positions, rope.shape[0], 0),
    ):
        check(name, table, (frames,), INTEGERS, q)
        check_values(name, table, low, limit - 1)
    for name, table in (("slots", slots), ("staging_rows", staging_rows)):
        if has_readable_values(table):
            _check_distinct(name, table.tolist())


def check_place(
    pool_layer: torch.Tensor,
    slots: torch.Tensor,
    source: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
    k_pages: torch.Tensor | None,
    v_pages: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Arguments of ``place_frames``."""
    check("pool_layer", pool_layer, (2, None, None, None, None, None), FLOATS, pool_layer)
    _, samples, pool_slots, tokens, kv_heads, head_dim = pool_layer.shape
    check_rotary(rope, rope_split, head_dim, pool_layer)
    check("slots", slots, (samples, None), INTEGERS, pool_layer)
    check("source", source, slots.shape, INTEGERS, pool_layer)
    check("positions", positions, slots.shape, INTEGERS, pool_layer)
    pages = pool_slots
    if k_pages is None:
        for name, given in (("v_pages", v_pages), ("k_scale", k_scale), ("v_scale", v_scale)):
            if given is not None:
                raise ValueError(f"{name} must be given together with k_pages, got it without")
    else:
        pages = k_pages.shape[1] if k_pages.dim() == 5 else 0
        _check_pages("k", k_pages, k_scale, (samples, None, tokens, kv_heads, head_dim), pool_layer)
        if v_pages is not None:
            _check_pages("v", v_pages, v_scale, tuple(k_pages.shape), pool_layer)
    check_values("slots", slots, -1, pool_slots - 1)
    check_values("source", source, -1, pages - 1)
    placed = (slots >= 0) & (source >= 0)
    check_values("positions", torch.where(placed, positions, 0), 0, rope.shape[0] - 1)
    if has_readable_values(slots):
        _check_disjoint(slots, source, k_pages is None)


def _check_pages(
    which: str, pages: torch.Tensor, scale: torch.Tensor | None, shape: Sequence[int | None], pool_layer: torch.Tensor
) -> None:
    check(f"{which}_pages", pages, shape, (pool_layer.dtype, *QUANTISED), pool_layer)
    if (pages.dtype in QUANTISED) != (scale is not None):
        need = "needs" if pages.dtype in QUANTISED else "takes no"
        raise ValueError(f"{which}_pages of dtype {pages.dtype} {need} {which}_scale")
    if scale is not None:
        check(f"{which}_scale", scale, pages.shape[:4], FLOATS, pool_layer)
        check_finite(f"{which}_scale", scale, nan=True)  # how the bank stores a row that held NaN or infinity


def _check_distinct(name: str, targets: list[int]) -> None:
    """Places to write to must differ: the order of writing would decide. -1 writes nothing."""
    written = [target for target in targets if target >= 0]
    if len(set(written)) < len(written):
        raise ValueError(f"{name} must name each place once, got {targets}")


def _check_disjoint(slots: torch.Tensor, source: torch.Tensor, same_pool: bool) -> None:
    """Targets must differ, and none may be a source of the same call: the order of copies would decide."""
    for to, from_ in zip(slots.tolist(), source.tolist(), strict=True):
        pairs = [(slot, page) for slot, page in zip(to, from_, strict=True) if slot >= 0 and page >= 0]
        targets = [slot for slot, _ in pairs]
        _check_distinct("slots", targets)
        if same_pool and not set(targets).isdisjoint(page for _, page in pairs):
            raise ValueError(f"source must not name a slot that the same call overwrites, got {pairs} (slot, source)")


def check_attend(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    slots: torch.Tensor | None,
    run: int | None,
    scale: float | None,
    shifts: torch.Tensor | None,
    rope: torch.Tensor | None,
    rope_split: Sequence[int] | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Arguments of ``window_attend``."""
    check_pool(pool_layer, q, quantised=True)
    check_scale(scale)
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (factor is not None) != (pool_layer.dtype == torch.int8):
            need = "needs" if factor is None else "takes no"
            raise ValueError(f"pool_layer of dtype {pool_layer.dtype} {need} {name}")
        if factor is not None:
            check(name, factor, pool_layer.shape[1:5], FLOATS, q)
            check_finite(name, factor)
    if (slots is None) == (run is None):
        raise ValueError(f"exactly one of slots and run must be given, got {'none' if run is None else 'both'}")
    if slots is not None:
        check("slots", slots, (q.shape[0], None), INTEGERS, q)
        check_values("slots", slots, -1, pool_layer.shape[2] - 1)
    if run is not None:
        check_range("run", run, 0, pool_layer.shape[2])
    given = {"shifts": shifts is not None, "rope": rope is not None, "rope_split": rope_split is not None}
    if shifts is None or rope is None or rope_split is None:
        if any(given.values()):
            missing = ", ".join(name for name, present in given.items() if not present)
            raise ValueError(f"shifts, rope and rope_split must be given together, got none of {missing}")
        return
    if slots is None:
        raise ValueError("shifts must be given together with slots, got run")
    check_rotary(rope, rope_split, q.shape[3], q)
    check("shifts", shifts, slots.shape, INTEGERS, q)
    check_values("shifts", torch.where(slots >= 0, shifts, 0), 1 - rope.shape[0], rope.shape[0] - 1)


def check_merge(outs: torch.Tensor, lses: torch.Tensor) -> None:
    """Arguments of ``merge_attention``."""
    check("outs", outs, (None, None, None, None, None), FLOATS, outs)
    parts, samples, length, heads, _ = outs.shape
    check_range("outs' number of parts", parts, 1)
    check("lses", lses, (parts, samples, heads, length), (torch.float32, torch.float64), outs)


def check_retrieve(
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
    sink: int,
    top_k: int,
    recent_exclude: int,
    count: int | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    scale: float | None,
    position_rule: str,
    index_scale: torch.Tensor | None,
    min_score: float | None,
    diversity: float,
) -> None:
    """Arguments of ``retrieve_attend``."""
    frames = check_block(q, k, v, pool_layer, staging)
    samples = q.shape[0]
    check_rotary(rope, rope_split, q.shape[3], q)
    check_grid(grid, pool_layer.shape[3], rope)
    check_weights(q_weight, k_weight, q, k)
    check("window_state", window_state, (samples, STATE_ROWS, None), INTEGERS, q)
    check_index(index, index_ids, index_length, index_scale, q, samples)
    check_choice(min_score, diversity)
    check_scale(scale)
    check("frame_slot", frame_slot, (samples, None), INTEGERS, q)
    check_scalar("start_frame", start_frame, q)
    check_values("start_frame", start_frame, 0, 2**62)
    check_position_rule(position_rule)
    for name, value in (("sink", sink), ("top_k", top_k), ("recent_exclude", recent_exclude)):
        check_range(name, value, 0)
    window = window_state.shape[2]
    local = window - sink - top_k
    if local < frames:
        raise ValueError(
            f"window - sink - top_k must be at least the {frames} frames of the block, got {window} - {sink} - "
            f"{top_k} = {local}"
        )
    if staging.shape[1] < local + frames:
        raise ValueError(
            f"staging must have at least window - sink - top_k + {frames} = {local + frames} rows, "
            f"got {staging.shape[1]}"
        )
    if pool_layer.shape[2] < window:
        raise ValueError(f"pool_layer must have at least window ({window}) slots, got {pool_layer.shape[2]}")
    if has_readable_values(frame_slot):
        given = frame_slot[frame_slot != -1]
        check_values("frame_slot (a canonical page, or -1)", given, window, pool_layer.shape[2] - 1)
    if count is not None:
        check_range("count", count, 1, window)
