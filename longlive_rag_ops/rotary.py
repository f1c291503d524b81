"""Tables of the 3-D rotary embedding of the Wan family (RoFormer, arXiv 2104.09864, over time, height and width)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .config import check_int


def default_split(head_dim: int) -> tuple[int, int, int]:
    """Real channels given to (time, height, width): ``[d - 4*(d//6), 2*(d//6), 2*(d//6)]``, as in Wan 2.1."""
    check_int("head_dim", head_dim, 2)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, because channels are rotated in pairs; got {head_dim}")
    sixth = head_dim // 6
    return head_dim - 4 * sixth, 2 * sixth, 2 * sixth


def check_split(split: Sequence[int], head_dim: int, name: str = "rope_split") -> list[int]:
    """Returns ``split`` as a list when it is three even numbers that add up to ``head_dim``; names it otherwise."""
    channels = list(split)
    if len(channels) != 3 or sum(channels) != head_dim or any(c < 0 or c % 2 for c in channels):
        raise ValueError(f"{name} must be three even numbers that add up to head_dim ({head_dim}), got {channels}")
    return channels


def rotary_table(
    head_dim: int,
    positions: int = 1024,
    theta: float = 10000.0,
    split: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Cosine and sine of every channel pair's angle at every position.

    Each axis owns ``c`` channels, and its pair ``i`` turns by ``position * theta ** (-2 i / c)``. Pairs are
    interleaved: channels ``2 i`` and ``2 i + 1``. Computed in float64 and rounded once to ``dtype``.

    Args:
        head_dim: channels of a head.
        positions: rows of the table, the largest position plus one.
        theta: base of the frequencies.
        split: real channels of (time, height, width); `default_split` when not given.
        dtype: float32 or float64.

    Returns:
        ``(positions, head_dim // 2, 2)``: cosine, sine.
    """
    channels = check_split(default_split(head_dim) if split is None else split, head_dim, "split")
    check_int("positions", positions, 1)
    if not dtype.is_floating_point or dtype.itemsize < 4:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    frequencies = torch.cat([theta ** -(torch.arange(0, c, 2, dtype=torch.float64) / max(c, 1)) for c in channels])
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(device=device, dtype=dtype)
