"""Differentiable attention over a whole clip, every block under its own window: what training runs in place of the ops.

Plain PyTorch on purpose. The ops mutate buffers and have no backward; here autograd sees every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .clip_windows import BlockWindow

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys (before rotation) and values, both ``(B, F*T, Hkv, D)``."""

Pages = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
"""Keys and values, each a tensor ``(T, Hkv, D)`` for every frame of every sample, sample-major."""


def attend_clip(
    q: torch.Tensor,
    own: KeysValues,
    past: KeysValues | None,
    windows: Sequence[BlockWindow],
    rope: torch.Tensor,
    rope_split: Sequence[int],
    grid: Sequence[int],
) -> torch.Tensor:
    """Attention of every block of a clip over its window.

    Keys and values are taken apart and put together by frame. An index into the clip would, in the backward of every
    block, fill a gradient of the whole clip's size; here a block costs what its window costs, forward and backward.

    Args:
        q: ``(B, F*T, Hq, D)`` before rotation, tokens frame-major, then row-major over the grid. Queries and keys may
            have a wider dtype than the values: they are turned in it and rounded to the values' once.
        own: keys and values of the frames that attend.
        past: those of the frames that they attend to outside of their own block; ``own`` when not given.
        windows: of `clip_windows`, all blocks of the clip.
        rope: rotary table ``(P, D // 2, 2)``, float32 or float64, with ``windows``' ``reach`` and the grid's rows.
        rope_split: real channels of (time, height, width).
        grid: ``(h, w)`` tokens of a frame.

    Returns:
        ``(B, F*T, Hq, D)`` in the values' dtype (or autocast's).
    """
    spatial, temporal = _turns(rope, rope_split, grid)
    q = _turn_in_space(q, spatial)
    pages = _pages(own, spatial)
    earlier = pages if past is None else _pages(past, spatial)
    queries = q.split([window.frames * len(spatial) for window in windows], dim=1)
    blocks = zip(windows, queries, strict=True)
    return torch.cat([_attend_block(window, query, pages, earlier, temporal) for window, query in blocks], dim=1)


def _attend_block(
    window: BlockWindow, q: torch.Tensor, own: Pages, past: Pages, temporal: torch.Tensor
) -> torch.Tensor:
    """Attention of one block: ``q (B, n*T, Hq, D)`` turned in space alone, as are the keys in the pages."""
    batch = q.shape[0]
    frames = len(own[0]) // batch
    keys, values = (
        torch.stack(
            [
                (mine if frame >= window.start else earlier)[sample * frames + frame]
                for sample, row in enumerate(window.table)
                for frame in row
            ]
        ).unflatten(0, (batch, -1))
        for mine, earlier in zip(own, past, strict=True)
    )  # (B, count, T, Hkv, D)
    keys = _turn(keys, temporal[window.positions][:, :, None, None])
    q = _turn(q.unflatten(1, (window.frames, -1)), temporal[window.own][:, None, None])
    mask = None
    if window.held is not None:
        mask = window.held.repeat_interleave(values.shape[2], dim=1)[:, None, None]
    q, keys, values = (y.to(values.dtype).flatten(1, 2).transpose(1, 2) for y in (q, keys, values))
    grouped = q.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=grouped).transpose(1, 2)


def _pages(keys_values: KeysValues, spatial: torch.Tensor) -> Pages:
    """Canonical keys, and values, of each frame."""
    keys, values = keys_values
    keys = _turn_in_space(keys, spatial)
    k, v = (y.unflatten(1, (-1, len(spatial))).flatten(0, 1).unbind() for y in (keys, values))
    return k, v


def _turns(rope: torch.Tensor, rope_split: Sequence[int], grid: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """By what channel pairs turn, as complex numbers: tokens in space ``(T, D // 2)``, frames in time ``(P, D // 2)``.

    Pairs of the other axes turn by 1. That is exact, and a product over all channels is several times as fast on a CPU
    as one over a part of them and a concatenation.
    """
    height, width = grid
    time, tall = rope_split[0] // 2, rope_split[1] // 2
    table = torch.view_as_complex(rope)
    spatial = table.new_ones(height, width, table.shape[1])
    spatial[:, :, time : time + tall] = table[:height, None, time : time + tall]
    spatial[:, :, time + tall :] = table[None, :width, time + tall :]
    temporal = table.clone()
    temporal[:, time:] = 1
    return spatial.flatten(0, 1), temporal


def _turn_in_space(x: torch.Tensor, spatial: torch.Tensor) -> torch.Tensor:
    """Turns ``(B, F*T, H, D)`` by height and width, which temporal positions do not touch."""
    return _turn(x.unflatten(1, (-1, len(spatial))), spatial[:, None]).flatten(1, 2)


def _turn(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Turns channel pairs ``(2 i, 2 i + 1)``; in float32 at least, which is what complex numbers come in."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * by).flatten(-2)
