"""The simplest embedding: the mean of each latent channel, as LongLive-RAG's code has it without an autoencoder."""

from __future__ import annotations

import torch


def average_pool(frames: torch.Tensor) -> torch.Tensor:
    """Mean over height and width: ``(N, C, H, W)`` floating point to ``(N, C)``."""
    return frames.mean(dim=(-2, -1))
