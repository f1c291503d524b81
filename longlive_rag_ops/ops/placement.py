"""``torch.ops.longlive.write_frames`` and ``place_frames``: pages into window slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import arguments
from .registration import implementation, register


@register
def write_frames(
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
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    engine: str = "auto",
) -> torch.Tensor:
    """Rotates a block's queries and keys and writes its pages.

    Frame ``i`` of the block is rotated to temporal position ``positions[i]`` (RoFormer, arXiv 2104.09864, over time,
    height and width; channel pairs interleaved). Its placed key and its value go to window slot ``slots[i]``, its
    canonical key (temporal position 0) to row ``staging_rows[i]``; -1 writes nothing. With weights, q and k pass an
    RMSNorm over the model width first.

    Args:
        q: ``(B, n*T, Hq, D)`` float64, float32, float16 or bfloat16, before rotation; tokens frame-major, then
            row-major over the grid.
        k, v: ``(B, n*T, Hkv, D)`` in q's dtype, as are the pool and the staging buffer.
        pool_layer: ``(2, B, slots, T, Hkv, D)``, keys and values of one layer; mutated.
        staging: ``(B, R, T, Hkv, D)``, canonical keys; mutated.
        slots, staging_rows, positions: ``(n,)`` int64.
        rope: ``(P, D/2, 2)`` float32 or float64, cosine and sine by position (`rotary.rotary_table`).
        rope_split: real channels of (time, height, width).
        grid: ``(h, w)``, ``h * w = T``.
        q_weight, k_weight: ``(Hq*D,)``, ``(Hkv*D,)``; both or none.
        eps: of the RMSNorm.

    Returns:
        Rotated queries ``(B, n*T, Hq, D)``.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: a shape, size or device is not allowed, or a slot or row is named twice.
            Values of index tables are checked on a CPU only.
        RuntimeError: an input requires grad in grad mode, or the engine is not available.
    """
    arguments.check_write(
        q, k, v, pool_layer, staging, slots, staging_rows, positions, rope, rope_split, grid, q_weight, k_weight
    )
    return implementation(engine, q).write_frames(
        q,
        k,
        v,
        pool_layer,
        staging,
        slots,
        staging_rows,
        positions,
        rope,
        rope_split,
        grid,
        q_weight,
        k_weight,
        eps,
    )


@register
def place_frames(
    pool_layer: torch.Tensor,
    slots: torch.Tensor,
    source: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
    *,
    k_pages: torch.Tensor | None = None,
    v_pages: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    engine: str = "auto",
) -> None:
    """Places canonical pages in window slots: dequantises, rotates the key to a temporal position, copies.

    Page ``source[b, j]`` goes to slot ``slots[b, j]`` at position ``positions[b, j]``; a slot or source of -1 skips.

    Args:
        pool_layer: ``(2, B, slots, T, Hkv, D)``; mutated.
        slots, source, positions: ``(B, m)`` int64. A slot is named once, and never as source of the same call.
        rope, rope_split: as in ``write_frames``.
        k_pages, v_pages: ``(B, P, T, Hkv, D)`` in the pool's dtype, int8 or float8_e4m3fn. Without ``k_pages`` pages
            come from the pool itself, keys and values; without ``v_pages`` only keys are placed.
        k_scale, v_scale: ``(B, P, T, Hkv)``, factor of a quantised page per token and head. One of NaN makes its
            token and head NaN; infinity is refused (on a CPU).

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: a shape, size or device is not allowed, or a slot is named twice or is also a source.
            Values of index tables are checked on a CPU only.
        RuntimeError: an input requires grad in grad mode, or the engine is not available.
    """
    arguments.check_place(pool_layer, slots, source, positions, rope, rope_split, k_pages, v_pages, k_scale, v_scale)
    implementation(engine, pool_layer).place_frames(
        pool_layer, slots, source, positions, rope, rope_split, k_pages, v_pages, k_scale, v_scale
    )
