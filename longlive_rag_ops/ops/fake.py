"""The engine for fake tensors: results with the right shape, dtype and device, nothing computed or mutated."""

from __future__ import annotations

from typing import Any

import torch

from ..reference import lse_dtype


def topk_retrieve(
    query: torch.Tensor,
    index: torch.Tensor,
    index_ids: torch.Tensor,
    index_length: torch.Tensor,
    end_frame: torch.Tensor,
    k: int,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and scores ``(B, k)``."""
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=lse_dtype(query.dtype))


def write_frames(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Rotated queries like ``q``, contiguous."""
    return q.new_empty(q.shape)


def place_frames(*rest: Any) -> None:
    """Nothing is returned."""


def window_attend(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    slots: torch.Tensor | None,
    run: int | None,
    scale: float | None,
    return_lse: bool,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out like ``q``, contiguous; lse ``(B, Hq, S)`` or ``(0,)``."""
    shape = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=lse_dtype(q.dtype))


def retrieve_attend(q: torch.Tensor, *rest: Any, return_lse: bool, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `window_attend`."""
    return window_attend(q, q, None, None, None, return_lse)


def merge_attention(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One part's shapes."""
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
