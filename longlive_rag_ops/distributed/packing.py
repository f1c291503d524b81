"""Tensors of several dtypes as one row of bytes, so that one collective of a fixed size moves them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Layout = Sequence[tuple[tuple[int, ...], torch.dtype]]


def pack(*tensors: torch.Tensor) -> torch.Tensor:
    """``(n,)`` uint8 with the bits of the tensors, one after the other; wider dtypes first."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def unpack(rows: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """What `pack` was given by each rank, stacked.

    Args:
        rows: ``(ranks, n)`` uint8, contiguous.
        layout: shape and dtype of each tensor.

    Returns:
        ``(ranks, *shape)`` each.
    """
    parts, at = [], 0
    for shape, dtype in layout:
        size = math.prod(shape) * dtype.itemsize
        parts.append(rows[:, at : at + size].contiguous().view(dtype).view(len(rows), *shape))
        at += size
    return parts
