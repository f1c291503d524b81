"""``torch.ops.longlive.retrieve_attend``, ``window_attend`` and ``merge_attention``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import arguments
from .registration import Pair, implementation, register


@register
def retrieve_attend(
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
    engine: str = "auto",
) -> Pair:
    """Attention of a block over ``[sink | retrieved memory | local]``: the op that backbones call.

    With ``select`` it first chooses the frames to retrieve by the embedding of frame ``start_frame - 1`` and advances
    ``window_state``; with ``place`` it brings the pages of the state's plan into this layer's window slots. Then it
    writes the block's pages in place and attends. `MemoryWindow.arguments` gives everything after ``v``.

    Args:
        q, k, v: the block's ``n`` frames, before rotation, shapes and dtypes as in ``write_frames``.
        pool_layer: ``(2, B, slots, T, Hkv, D)``: slots ``0 .. W-1`` are the window, the rest canonical pages; mutated.
        staging: ``(B, R, T, Hkv, D)``, ``R >= W - S - K + n``; mutated.
        window_state: ``(B, 4, W)`` int64 (see `assignment`); mutated when ``select``.
        index, index_ids, index_length: as in ``topk_retrieve``; every finished frame, the newest included.
        frame_slot: ``(B, F)`` int64, pool slot of each frame's canonical page, -1 for none.
        start_frame: int64 with one element, on the device: first frame of the block.
        rope, rope_split, grid, q_weight, k_weight, eps: as in ``write_frames``.
        sink, top_k, recent_exclude: ``S``, ``K``, ``R`` of the window rules; ``W`` is the state's width.
        select: choose now. True on one call a block, before the others, or on none when the caller advanced the state.
        place: True on a block's first forward in each layer; on a later one True only costs the copies again.
        count: occupied slots, when the caller knows them to be the same in every sample; saves reading the state.
        scale, return_lse: as in ``window_attend``.
        position_rule: ``slot``, ``absolute`` or ``before_window``, see `WindowConfig`. The last puts sink and memory
            right before the local part, as Rolling-Forcing and SANA-WM do, but counted from the sink: attention depends
            on differences of positions alone, and so ``rope`` needs no more than ``W`` rows, however long the video
            (beside what ``grid`` needs).
        index_normalized: the index's rows already have unit length.
        index_scale, min_score, diversity: as in ``topk_retrieve``.

    Returns:
        out ``(B, n*T, Hq, D)``, lse ``(B, Hq, n*T)`` or ``(0,)``, as ``window_attend``.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: a shape, size or device is not allowed, or ``window - sink - top_k`` is less than the block.
            Values of index tables are checked on a CPU only.
        RuntimeError: an input requires grad in grad mode, or the engine is not available,
            or ``window_state`` lacks frames it must hold. The engines ``triton`` and ``auto`` on a GPU do not wait for
            the device to say so: a device-side assertion fails, after which the process needs a new CUDA context.
    """
    arguments.check_retrieve(
        q,
        k,
        v,
        pool_layer,
        staging,
        window_state,
        index,
        index_ids,
        index_length,
        frame_slot,
        start_frame,
        rope,
        rope_split,
        grid,
        sink,
        top_k,
        recent_exclude,
        count,
        q_weight,
        k_weight,
        scale,
        position_rule,
        index_scale,
        min_score,
        diversity,
    )
    return implementation(engine, q).retrieve_attend(
        q,
        k,
        v,
        pool_layer,
        staging,
        window_state,
        index,
        index_ids,
        index_length,
        frame_slot,
        start_frame,
        rope,
        rope_split,
        grid,
        sink=sink,
        top_k=top_k,
        recent_exclude=recent_exclude,
        select=select,
        place=place,
        count=count,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        scale=scale,
        position_rule=position_rule,
        index_normalized=index_normalized,
        return_lse=return_lse,
        index_scale=index_scale,
        min_score=min_score,
        diversity=diversity,
    )


@register
def window_attend(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    slots: torch.Tensor | None = None,
    *,
    run: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    shifts: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    rope_split: Sequence[int] | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    engine: str = "auto",
) -> Pair:
    """Softmax attention of a block over the pages in a table of slots, without a mask.

    Args:
        q: ``(B, S, Hq, D)``, rotated.
        pool_layer: ``(2, B, slots, T, Hkv, D)`` in q's dtype, or int8; ``Hq`` is a multiple of ``Hkv`` (grouped
            queries).
        slots: ``(B, N)`` int64; -1 is skipped. The order does not matter, but for rounding.
        run: instead of ``slots``: attend to slots ``0 .. run-1`` of every sample.
        scale: of the logits; ``D ** -0.5`` when not given.
        return_lse: also return the log-sum-exp (natural logarithm) of the scaled logits.
        shifts: ``(B, N)`` int64, for each entry of ``slots`` how far its keys are moved in time, ``-P < shift < P``:
            the query is turned by ``-shift`` instead, which gives the same logits.
        rope, rope_split: as in ``write_frames``; needed for ``shifts``, and only there.
        k_scale, v_scale: ``(B, slots, T, Hkv)``, factors of an int8 pool's keys and values per token and head.

    Returns:
        out ``(B, S, Hq, D)`` in q's dtype; lse ``(B, Hq, S)`` float32 (float64 for float64), of shape ``(0,)`` when
        not asked for. A sample with nothing to attend to gets output 0 and log-sum-exp -inf.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: a shape, size or device is not allowed, or not exactly one of slots and run is given.
            Values of index tables are checked on a CPU only.
        RuntimeError: an input requires grad in grad mode, or the engine is not available.
    """
    arguments.check_attend(q, pool_layer, slots, run, scale, shifts, rope, rope_split, k_scale, v_scale)
    return implementation(engine, q).window_attend(
        q, pool_layer, slots, run, scale, return_lse, shifts, rope, rope_split, k_scale, v_scale
    )


@register
def merge_attention(outs: torch.Tensor, lses: torch.Tensor, *, engine: str = "auto") -> Pair:
    """Joins attention over disjoint sets of keys by log-sum-exp, in the order given (FlashAttention, arXiv 2205.14135).

    Args:
        outs: ``(P, B, S, H, D)``, output over each part.
        lses: ``(P, B, H, S)`` float32 or float64; -inf for an empty part, which adds nothing.

    Returns:
        out ``(B, S, H, D)``, lse ``(B, H, S)``; 0 and -inf where every part is empty.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: a shape, size or device is not allowed, or the engine is unknown.
            Values of index tables are checked on a CPU only.
        RuntimeError: an input requires grad in grad mode, or the engine is not available.
    """
    arguments.check_merge(outs, lses)
    return implementation(engine, outs).merge_attention(outs, lses)
