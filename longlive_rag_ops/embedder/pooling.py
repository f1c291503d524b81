"""Embeddings without training: means of the latent's channels."""

from __future__ import annotations

import torch
from torch.nn import functional as F

CELLS = 4  # rows and columns of `grid_pool`


def average_pool(frames: torch.Tensor) -> torch.Tensor:
    """Mean over height and width: ``(N, C, H, W)`` floating point to ``(N, C)``, float32 or wider.

    What LongLive-RAG's code falls back to without an autoencoder.
    """
    return _checked(frames).mean(dim=(-2, -1))


def grid_pool(frames: torch.Tensor) -> torch.Tensor:
    """Means over a grid of 4 x 4 cells: ``(N, C, H, W)`` floating point to ``(N, 16 C)``, float32 or wider.

    It keeps the layout of a picture: vectors of unrelated pictures are less alike than by `average_pool`, and the same
    place seen from another side may not be recognised.
    """
    return F.adaptive_avg_pool2d(_checked(frames), CELLS).flatten(1)


def _checked(frames: torch.Tensor) -> torch.Tensor:
    if not isinstance(frames, torch.Tensor) or frames.dim() != 4 or not frames.is_floating_point():
        got = f"{frames.dtype} of shape {tuple(frames.shape)}" if isinstance(frames, torch.Tensor) else type(frames)
        raise ValueError(f"frames must be floating point of shape (frames, channels, height, width), got {got}")
    # In the steps of bfloat16, 0.004 near 1, many cosines would be equal.
    return frames.to(torch.promote_types(frames.dtype, torch.float32))
